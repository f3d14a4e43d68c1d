"""Show rows of text as a table: aligned columns in a terminal, a Markdown table in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        header: Title of each column.
        rows: One cell per column in each row.
        text_columns: The first columns, which hold text and are aligned left; numbers are aligned right.
        number_width: Smallest width of the other columns, in characters.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    number_width: int = 0

    def __str__(self) -> str:
        smallest = [0] * self.text_columns + [self.number_width] * (len(self.header) - self.text_columns)
        columns = zip(self.header, *self.rows, strict=True)
        widths = [max(least, *map(len, column)) for least, column in zip(smallest, columns, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < self.text_columns else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.header, *self.rows)
        )

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        numbers = len(self.header) - self.text_columns
        alignment = [*["---"] * self.text_columns, *["---:"] * numbers]
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.header, alignment, *self.rows))
