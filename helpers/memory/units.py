"""Bytes as text: GiB, MiB or KiB (2**30, 2**20, 2**10 bytes), one unit for all the numbers that stand together."""

from collections.abc import Iterable
from dataclasses import dataclass

KIB = 2**10
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Unit:
    """``size`` bytes, written ``name``."""

    name: str
    size: int

    def amount(self, count: int) -> str:
        """``count`` bytes in this unit, two decimals. What would round to nothing is "<0.01": it is not nothing."""
        value = count / self.size
        if 0 < abs(value) < 0.005:
            return "<0.01" if count > 0 else ">-0.01"
        return f"{value:,.2f}"


def unit_for(counts: Iterable[int]) -> Unit:
    """GiB where the largest of ``counts`` (bytes) has at least one, else MiB; KiB for toys that do not have one."""
    largest = max(map(abs, counts), default=0)
    if largest >= GIB:
        return Unit("GiB", GIB)
    return Unit("MiB", MIB) if largest >= MIB else Unit("KiB", KIB)
