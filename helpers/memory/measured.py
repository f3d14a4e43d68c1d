"""Hold what a run measured of its memory: torch's allocator and NVML per rank, the curve and the phases."""

from collections.abc import Sequence
from dataclasses import dataclass

from helpers.memory.phases import Phase
from helpers.memory.timeline import Timeline


@dataclass(frozen=True)
class RankMemory:
    """Peaks of one rank in bytes; None if not available (torch's and NVML's without a GPU).

    Attributes:
        allocated: Given to tensors by torch's caching allocator.
        reserved: Held by torch's caching allocator.
        nvml: Held by the rank's GPU above what it held before the run.
        resident: Resident set of the rank's process in host memory.
    """

    allocated: int | None
    reserved: int | None
    nvml: int | None
    resident: int


@dataclass(frozen=True)
class Measured:
    """The memory of one run.

    Attributes:
        ranks: Peaks of each rank.
        timeline: NVML's curves.
        phases: Phases that the ranks marked.
    """

    ranks: Sequence[RankMemory]
    timeline: Timeline
    phases: Sequence[Phase]
