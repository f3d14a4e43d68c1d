"""What one run measured of its memory: torch's allocator and NVML, by rank, with the curve and the phases."""

from collections.abc import Sequence
from dataclasses import dataclass

from helpers.memory.phases import Phase
from helpers.memory.timeline import Timeline


@dataclass(frozen=True)
class RankMemory:
    """Peaks of one rank in bytes; None where there is no such number (torch's and NVML's without a GPU).

    ``allocated`` and ``reserved`` are torch's caching allocator's, ``nvml`` is what the rank's GPU held above what it
    held before the run, ``resident`` is the resident set of the rank's process in host memory.
    """

    allocated: int | None
    reserved: int | None
    nvml: int | None
    resident: int


@dataclass(frozen=True)
class Measured:
    """``ranks[r]`` holds the peaks of rank r; ``timeline`` NVML's curves; ``phases`` what the ranks marked."""

    ranks: Sequence[RankMemory]
    timeline: Timeline
    phases: Sequence[Phase]
