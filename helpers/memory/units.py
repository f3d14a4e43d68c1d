"""Write bytes as text in GiB, MiB or KiB, with one unit for all numbers of a table or figure."""

from collections.abc import Iterable
from dataclasses import dataclass

KIB = 2**10
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Unit:
    """A unit of memory.

    Attributes:
        name: As printed.
        size: Bytes.
    """

    name: str
    size: int

    def amount(self, count: int) -> str:
        """Write ``count`` bytes in this unit with two decimals; a value that would round to zero is "<0.01"."""
        value = count / self.size
        if 0 < abs(value) < 0.005:
            return "<0.01" if count > 0 else ">-0.01"
        return f"{value:,.2f}"


def unit_for(counts: Iterable[int]) -> Unit:
    """Choose the unit for numbers that are shown together.

    Args:
        counts: Bytes, negative ones included.

    Returns:
        The largest of GiB, MiB and KiB of which the largest number has at least one; KiB if it is smaller still.
    """
    largest = max(map(abs, counts), default=0)
    if largest >= GIB:
        return Unit("GiB", GIB)
    return Unit("MiB", MIB) if largest >= MIB else Unit("KiB", KIB)
