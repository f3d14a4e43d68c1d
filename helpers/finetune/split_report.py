"""Report what a data file holds: how it is written, how many rows, how long they are."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens per row, before truncation."""

    mean: float
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class SplitReport:
    """What a split holds.

    Attributes:
        path: The file.
        format: How the file and its rows are written.
        rows: How many there are.
        truncated: Rows that are too long.
        untrainable: Those of them that keep no trained token.
        tokens: Their lengths.
        notes: One line for each thing about the data that their author may not expect.
    """

    path: Path
    format: str
    rows: int
    truncated: int
    untrainable: int
    tokens: TokenStatistics
    notes: list[str]

    def __str__(self) -> str:
        tokens = self.tokens
        return (
            f"{self.path} ({self.format}): {self.rows:,} rows; tokens per row: mean {tokens.mean:.0f}, "
            f"median {tokens.p50}, 95th percentile {tokens.p95}, longest {tokens.max}; "
            f"{self.truncated:,} rows truncated, {self.untrainable:,} of them with nothing left to train"
        )
