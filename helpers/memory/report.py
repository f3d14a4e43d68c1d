"""Report memory: predicted, counted and measured bytes side by side, and a name for each remainder.

    reports = [RankReport(rank, predicted, ledger.on("cuda"), memory) for rank, memory in enumerate(measured.ranks)]
    memory_table(reports)

The inputs are plain mappings of bytes. A number that was not measured reads "not available".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from helpers.errors import UserError
from helpers.memory.categories import CATEGORIES, ITEMS, OUTSIDE_TORCH
from helpers.memory.measured import RankMemory
from helpers.memory.table import Table
from helpers.memory.units import Unit, unit_for

NOT_COUNTED, CACHE, CONTEXT = "not counted: temporaries", "allocator cache", "CUDA context and NCCL"
SOURCES = ("predicted", "counted", "allocated", "reserved", "NVML")
SAME_SHARE = 0.01  # of the first rank's largest total: a rank that differs by no more gets one row


@dataclass(frozen=True)
class Difference:
    """How far a prediction is off.

    Attributes:
        source: The measurement that it is compared with.
        percent: How far the prediction is above it; negative if it is below.
    """

    source: str
    percent: float


@dataclass(frozen=True)
class RankReport:
    """One rank's memory from all sources.

    Attributes:
        rank: The rank.
        predicted: Bytes by item (see categories.py); a missing item counts as 0. May be empty.
        counted: Bytes by category, from the ledger; a missing category counts as 0.
        measured: The rank's peaks.

    Raises:
        UserError: An item is unknown, a value is not a number of bytes, or more bytes are allocated than reserved.
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
        """Bytes by source; None if it has no number."""
        return {
            "predicted": sum(self.predicted.values()) if self.predicted else None,
            "counted": sum(self.counted.values()),
            "allocated": self.measured.allocated,
            "reserved": self.measured.reserved,
            "NVML": self.measured.nvml,
        }

    @property
    def left_over(self) -> Mapping[str, int | None]:
        """Bytes each source reports beyond the previous one, by name; None if either is unknown.

        The ledger counts at one point in time and the others are peaks, so a remainder can be negative: then the peaks
        were read over a stretch that does not contain that point.
        """
        totals = self.totals
        return {
            NOT_COUNTED: _minus(totals["allocated"], totals["counted"]),
            CACHE: _minus(totals["reserved"], totals["allocated"]),
            CONTEXT: _minus(totals["NVML"], totals["reserved"]),
        }

    @property
    def difference(self) -> Difference | None:
        """How far the prediction is off, like against like; None without a prediction or a measurement.

        If the prediction has items outside torch's memory and NVML has a number, everything is compared with NVML.
        Otherwise the part inside torch's memory is compared with the allocated bytes. On a CPU, for which torch counts
        none, it is compared with the ledger, without the allocator's allowance. The ledger counts what autograd saves
        of logits and loss as activations.
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
            source, predicted = "counted", sum(inside.values()) - inside.get("allocator allowance", 0)
        measured = totals[source]
        return Difference(source, 100 * (predicted - measured) / measured) if measured else None

    @property
    def bars(self) -> Mapping[str, Mapping[str, int] | None]:
        """Parts by source for :func:`helpers.plots.memory_sources`; each bar sums to its source's total.

        A measured bar repeats the parts of the sources before it, and adds the remainder under its name. If a remainder
        is negative, the bar has only one part, "not told apart". The prediction's items outside torch's memory are one
        part, because a measurement cannot tell them apart.
        """
        parts = {name: size for name, size in self.counted.items() if size}
        predicted = {name: size for name, size in self.predicted.items() if name not in OUTSIDE_TORCH}
        if len(predicted) < len(self.predicted):
            predicted[CONTEXT] = sum(self.predicted.get(name, 0) for name in OUTSIDE_TORCH)
        bars: dict[str, Mapping[str, int] | None] = {"predicted": predicted or None, "counted": dict(parts)}
        for source, (name, rest) in zip(SOURCES[2:], self.left_over.items(), strict=True):
            total = self.totals[source]
            if total is None:
                bars[source] = None
                continue
            parts = parts | {name: rest} if rest is not None and rest >= 0 else {"not told apart": total}
            bars[source] = dict(parts)
        return bars


def memory_table(reports: Sequence[RankReport]) -> Table:
    """Lay the reports out as one table: a row per category, remainder and total, a column per source.

    A rank whose numbers are all within 1 % of the first rank's total gets a single row: the largest difference.

    Args:
        reports: One report per rank; the ranks follow each other.

    Returns:
        The table, in one unit throughout.

    Raises:
        UserError: ``reports`` is empty.
    """
    if not reports:
        raise UserError("there is no report to show; make a RankReport for each rank")
    unit = unit_for(total for report in reports for total in report.totals.values() if total is not None)
    first, *others = reports
    rows = [[f"rank {first.rank}", *[""] * len(SOURCES), ""]] if others else []
    rows += _rows(first, unit)
    for report in others:
        apart = _largest_difference(report, first)
        same = apart is not None and apart <= SAME_SHARE * max(total or 0 for total in first.totals.values())
        within = f", within {unit.amount(apart)} {unit.name}" if apart else ""
        name = f"rank {report.rank}: same as rank {first.rank}{within}" if same else f"rank {report.rank}"
        rows.append([name, *[""] * len(SOURCES), ""])
        rows += [] if same else _rows(report, unit)
    return Table([unit.name, *SOURCES, "left over"], rows)


def rank_reports(
    predicted: Mapping[str, int], counted: Sequence[Mapping[str, int]], measured: Sequence[RankMemory]
) -> list[RankReport]:
    """Make the reports of a run whose ranks all have the same prediction.

    Args:
        predicted: Bytes by item.
        counted: Bytes by category, of each rank.
        measured: The peaks of each rank.

    Returns:
        One report per rank, in their order.
    """
    pairs = zip(counted, measured, strict=True)
    return [RankReport(rank, predicted, *pair) for rank, pair in enumerate(pairs)]


def totals_table(reports: Mapping[str, RankReport], more: Mapping[str, Mapping[str, int | None]]) -> Table:
    """Compare runs: a row for each, a column per source, and how far the prediction is off.

    Args:
        reports: One rank of each run, by the run's name.
        more: Further columns by title: bytes by run, None if unknown.

    Returns:
        The table, in one unit throughout.

    Raises:
        UserError: ``reports`` is empty.
    """
    if not reports:
        raise UserError("there is no report to show; make a RankReport for each run")
    unit = unit_for(total for report in reports.values() for total in report.totals.values() if total)
    rows = []
    for name, report in reports.items():
        sizes = [*report.totals.values(), *(column[name] for column in more.values())]
        off = f"{report.difference.percent:+.1f} %" if report.difference else ""
        rows.append([name.replace("\n", " "), *(_text(size, unit) for size in sizes), off])
    return Table([unit.name, *SOURCES, *more, "prediction"], rows)


def _largest_difference(report: RankReport, other: RankReport) -> int | None:
    """Return the largest number of bytes by which two reports differ; None if only one of them has some number."""
    largest = 0
    for mine, theirs in (
        (report.predicted, other.predicted),
        (report.counted, other.counted),
        (report.totals, other.totals),
        (report.left_over, other.left_over),
    ):
        for name in {*mine, *theirs}:
            one, two = mine.get(name, 0), theirs.get(name, 0)
            if (one is None) != (two is None):
                return None
            largest = max(largest, abs((one or 0) - (two or 0)))
    return largest


def _text(size: int | None, unit: Unit) -> str:
    return "not available" if size is None else unit.amount(size)


def _rows(report: RankReport, unit: Unit) -> list[list[str]]:
    text = partial(_text, unit=unit)
    empty = [""] * len(SOURCES)
    rows = []
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


def _minus(total: int | None, part: int | None) -> int | None:
    return None if total is None or part is None else total - part


def _check(what: str, sizes: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, size in sizes.items():
        if known and name not in known:
            raise UserError(f"{what}: unknown item {name!r}; give some of {', '.join(known)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise UserError(f"{what}: {name!r} is {size!r}; give a whole number of bytes, 0 or more")
