"""Keep what NVML measured over time, one curve per GPU: plain data, small on disk."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.errors import UserError
from helpers.files import atomic_write
from helpers.memory.units import GIB

# A saved point takes at most 23 characters ("86400.123,343597383680,"), so a file stays below 200 KB for any length of
# a run and any number of GPUs.
SAVED_POINTS = 8000


@dataclass(frozen=True)
class GpuCurve:
    """Used memory of one GPU over time; at least one sample.

    Attributes:
        index: Of the GPU.
        name: Of its model.
        total_bytes: Its memory.
        seconds: When each sample was taken, since the timeline's start.
        used: Bytes in use at each sample.
    """

    index: int
    name: str
    total_bytes: int
    seconds: list[float]
    used: list[int]

    @property
    def baseline(self) -> int:
        """Bytes in use when sampling began: other processes, and what this one held already."""
        return self.used[0]

    @property
    def peak(self) -> int:
        """The largest number of bytes seen in use."""
        return max(self.used)

    @property
    def peak_seconds(self) -> float:
        """When the peak was first seen."""
        return self.seconds[self.used.index(self.peak)]

    @property
    def delta(self) -> int:
        """Peak minus baseline: what the sampled work added."""
        return self.peak - self.baseline

    @property
    def last(self) -> int:
        """Bytes in use when sampling ended."""
        return self.used[-1]


@dataclass(frozen=True)
class Timeline:
    """The curves of all visible GPUs.

    Attributes:
        start: ``time.time()`` at second 0, the clock with which ranks mark their phases.
        duration: Seconds.
        gpus: One curve per GPU.
        note: One line that explains why curves are missing or end early; None if they are complete.
    """

    start: float
    duration: float
    gpus: list[GpuCurve]
    note: str | None

    def summary(self) -> str:
        """Write one line per GPU with baseline, peak and difference in GiB, and the note if there is one."""
        lines = [
            f"GPU {gpu.index}: {gpu.baseline / GIB:.2f} GiB before, {gpu.peak / GIB:.2f} GiB at the peak "
            f"(+{gpu.delta / GIB:.2f}), {gpu.last / GIB:.2f} GiB after, of {gpu.total_bytes / GIB:.1f} GiB"
            for gpu in self.gpus
        ]
        return "\n".join(lines + ([self.note] if self.note else []))

    def save(self, path: str | Path) -> None:
        """Write as JSON below 200 KB: every curve downsampled to its share of the points, all peaks kept."""
        gpus = []
        for gpu in self.gpus:
            seconds, used = downsample(gpu.seconds, gpu.used, SAVED_POINTS // len(self.gpus))
            gpus.append(asdict(gpu) | {"seconds": [round(second, 3) for second in seconds], "used": used})
        record = {"start": self.start, "duration": self.duration, "gpus": gpus, "note": self.note}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Timeline":
        """Read what :meth:`save` wrote; raise :class:`UserError` if the file is something else."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            gpus = [GpuCurve(**gpu) for gpu in record["gpus"]]
            return cls(record["start"], record["duration"], gpus, record["note"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a saved memory timeline ({type(error).__name__}: {error})") from error


class CurveRecorder:
    """Collect the samples of one GPU in bounded memory.

    A training process holds the same bytes most of the time, so a flat stretch is kept as its two ends. Beyond
    ``limit`` points the curve is downsampled to half of them: days need no more memory than minutes.
    """

    def __init__(self, limit: int = 40_000) -> None:
        self.seconds: list[float] = []
        self.used: list[int] = []
        self._limit = limit

    def add(self, second: float, used: int) -> None:
        """Append one sample: ``used`` bytes at ``second``, which must not be before the last one."""
        if len(self.used) >= 2 and self.used[-2] == self.used[-1] == used:
            self.seconds[-1] = second
            return
        self.seconds.append(second)
        self.used.append(used)
        if len(self.used) > self._limit:
            self.seconds, self.used = downsample(self.seconds, self.used, self._limit // 2)


def downsample(seconds: list[float], used: list[int], limit: int) -> tuple[list[float], list[int]]:
    """Keep at most ``limit`` (>= 4) of the samples, chosen so that the drawn curve stays the same.

    Time is divided into ``limit // 4`` equal intervals; the first, last, lowest and highest sample of each are kept (M4
    aggregation: Jugel et al., VLDB 2014). So no peak is lost: within one interval's width of every sample, a kept one
    is at least as high.
    """
    if len(used) <= limit:
        return list(seconds), list(used)
    intervals = limit // 4
    width = (seconds[-1] - seconds[0]) / intervals
    kept: list[int] = []
    first = 0
    for interval in range(intervals):
        last_interval = interval == intervals - 1
        end = first
        while end < len(used) and (last_interval or seconds[end] < seconds[0] + (interval + 1) * width):
            end += 1
        if end > first:
            inside = range(first, end)
            kept += sorted({first, end - 1, min(inside, key=used.__getitem__), max(inside, key=used.__getitem__)})
        first = end
    return _pick(seconds, kept), _pick(used, kept)


def _pick(values: list, indices: Iterable[int]) -> list:
    return [values[index] for index in indices]
