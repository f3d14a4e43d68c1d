"""The course's memory report: predicted, counted and measured bytes side by side, and names for what is left over.

    reports = [RankReport(rank, predicted, ledger.on("cuda"), memory) for rank, memory in enumerate(measured.ranks)]
    memory_table(reports)

The inputs are plain mappings of bytes. A number that nobody measured reads "not available"; none is made up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.errors import UserError
from helpers.memory.categories import CATEGORIES, ITEMS, OUTSIDE_TORCH
from helpers.memory.measured import RankMemory
from helpers.memory.units import Unit, unit_for

NOT_COUNTED, CACHE, CONTEXT = "not counted: temporaries", "allocator cache", "CUDA context and NCCL"
SOURCES = ("predicted", "counted", "allocated", "reserved", "NVML")


@dataclass(frozen=True)
class Difference:
    """The prediction is ``percent`` above (below where negative) what ``source`` says."""

    source: str
    percent: float


@dataclass(frozen=True)
class RankReport:
    """One rank's bytes: ``predicted`` by item, ``counted`` by category (see categories.py), and ``measured``.

    An item that is not named is predicted, or counted, to be 0. ``predicted`` may be empty. Raises
    :class:`UserError` on an unknown item, on what is no number of bytes, and on more allocated than reserved bytes.
    """

    rank: int
    predicted: Mapping[str, int]
    counted: Mapping[str, int]
    measured: RankMemory

    def __post_init__(self) -> None:
        _check(f"predicted of rank {self.rank}", self.predicted, ITEMS)
        _check(f"counted of rank {self.rank}", self.counted, CATEGORIES)
        measured = {name: self.totals[name] for name in ("allocated", "reserved", "NVML")}
        _check(f"measured of rank {self.rank}", {name: size for name, size in measured.items() if size is not None}, ())
        left = self.left_over[CACHE]
        if left is not None and left < 0:
            raise UserError(
                f"measured of rank {self.rank}: {self.measured.allocated} bytes allocated of {self.measured.reserved} "
                "reserved; give both peaks of the same run"
            )

    @property
    def totals(self) -> Mapping[str, int | None]:
        """Bytes by source; None where there is no such number."""
        return {
            "predicted": sum(self.predicted.values()) if self.predicted else None,
            "counted": sum(self.counted.values()),
            "allocated": self.measured.allocated,
            "reserved": self.measured.reserved,
            "NVML": self.measured.nvml,
        }

    @property
    def left_over(self) -> Mapping[str, int | None]:
        """What each source has beyond the one before it, in bytes, by its name; None where either has no number.

        The count is of one moment and the others are peaks, so a negative rest is possible. It says that the peaks
        were read over another stretch than the one counted in.
        """
        totals = self.totals
        return {
            NOT_COUNTED: _minus(totals["allocated"], totals["counted"]),
            CACHE: _minus(totals["reserved"], totals["allocated"]),
            CONTEXT: _minus(totals["NVML"], totals["reserved"]),
        }

    @property
    def difference(self) -> Difference | None:
        """How far the prediction is off, like against like; None where there is none, or nothing to compare it with.

        The whole against NVML, where the prediction has items outside of torch's memory and NVML a number. Else what
        lies in torch's memory, against the allocated bytes; and where torch counts none (on a CPU) the same against
        the ledger, without the allocator's rounding. What autograd keeps of logits and loss is in its activations.
        """
        if not self.predicted:
            return None
        totals = self.totals
        inside = {name: size for name, size in self.predicted.items() if name not in OUTSIDE_TORCH}
        if totals["NVML"] is not None and len(inside) < len(self.predicted):
            source, predicted = "NVML", sum(self.predicted.values())
        elif totals["allocated"] is not None:
            source, predicted = "allocated", sum(inside.values())
        else:
            source, predicted = "counted", sum(inside.values()) - inside.get("allocator rounding", 0)
        said = totals[source]
        return Difference(source, 100 * (predicted - said) / said) if said else None

    @property
    def bars(self) -> Mapping[str, Mapping[str, int] | None]:
        """Parts by source for :func:`helpers.plots.memory_sources`; each sums up to the source's total.

        A measured bar repeats what the sources before it account for, and adds the rest under its name. Where a rest
        is negative the bar has only one part, "not told apart".
        """
        parts = {name: size for name, size in self.counted.items() if size}
        bars: dict[str, Mapping[str, int] | None] = {"predicted": self.predicted or None, "counted": dict(parts)}
        for source, (name, rest) in zip(SOURCES[2:], self.left_over.items(), strict=True):
            total = self.totals[source]
            if total is None:
                bars[source] = None
                continue
            parts = parts | {name: rest} if rest is not None and rest >= 0 else {"not told apart": total}
            bars[source] = dict(parts)
        return bars


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; aligned where it is printed, a table where a notebook shows it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.header, *self.rows)
        )

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        alignment = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.header, alignment, *self.rows))


def memory_table(reports: Sequence[RankReport]) -> Table:
    """One row per category, left-over and total, one column per source, rank under rank; one unit throughout.

    Raises :class:`UserError` where there is no report.
    """
    if not reports:
        raise UserError("there is no report to show: make a RankReport per rank")
    unit = unit_for(total for report in reports for total in report.totals.values() if total is not None)
    rows = [row for report in reports for row in _rows(report, unit, len(reports) > 1)]
    return Table([unit.name, *SOURCES, "left over"], rows)


def _rows(report: RankReport, unit: Unit, several: bool) -> list[list[str]]:
    def text(size: int | None) -> str:
        return "not available" if size is None else unit.amount(size)

    empty = [""] * len(SOURCES)
    rows = [[f"rank {report.rank}", *empty, ""]] if several else []
    for item in ITEMS:
        predicted, counted = report.predicted.get(item, 0), report.counted.get(item, 0)
        if predicted or counted:
            cells = [text(predicted) if report.predicted else "", text(counted) if item in CATEGORIES else ""]
            rows.append([item, *cells, "", "", "", ""])
    for name, rest in report.left_over.items():
        rows.append([name, *empty, text(rest)])
    rows.append(["total", *(text(total) for total in report.totals.values()), ""])
    if report.difference:
        off = f"{report.difference.percent:+.1f} %"
        rows.append([f"predicted against {report.difference.source}", off, *empty[1:], ""])
    return rows


def _minus(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else whole - part


def _check(what: str, sizes: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, size in sizes.items():
        if known and name not in known:
            raise UserError(f"{what}: unknown item {name!r}; give some of {', '.join(known)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise UserError(f"{what}: {name!r} is {size!r}; give a whole number of bytes, 0 or more")
