"""Mark the phases of a job ("load model", "train") on its ranks, and read them to draw over the memory curve.

Every rank appends to its own file, in wall-clock time (``time.time()``), so that another process on the same machine
can lay the phases over its samples.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import UserError
from helpers.files import drop_half_line


@dataclass(frozen=True)
class Phase:
    """One phase of one rank.

    Attributes:
        name: Of the phase.
        rank: That it ran on.
        start: When it began (``time.time()``).
        end: When it ended; None if it never did.
    """

    name: str
    rank: int
    start: float
    end: float | None


class PhaseLog:
    """Append the phases of one rank to a file that :func:`read_phases` reads."""

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path = Path(path)
        self.rank = rank
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_half_line(self.path)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark the block as phase ``name``; phases may nest. The end is marked even if the block raises."""
        self._append("begin", name)
        try:
            yield
        finally:
            self._append("end", name)

    def _append(self, event: str, name: str) -> None:
        record = {"event": event, "name": name, "rank": self.rank, "time": time.time(), "pid": os.getpid()}
        # One write call on a descriptor opened for appending: a reader never sees half a line, and a killed rank leaves
        # complete lines behind.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(descriptor)


_current: PhaseLog | None = None


def mark_in(log: PhaseLog | None) -> None:
    """Let :func:`phase` of this process mark in ``log`` from now on; None ends that."""
    global _current
    _current = log


def phase(name: str) -> AbstractContextManager[None]:
    """Mark a block of a rank as a phase of its run.

    with phase("forward"):
        loss = model(batch)

    Args:
        name: Of the phase; phases may nest.

    Returns:
        The context manager. It does nothing in a process without a log.
    """
    return _current.phase(name) if _current else nullcontext()


def read_phases(paths: Iterable[str | Path]) -> list[Phase]:
    """Read the phases that ranks marked.

    A phase of a process that died has no end. If a later process continued the same file (a resumed run), the phase
    ended at that process's first mark at the latest, which is taken as its end.

    Args:
        paths: One file per rank. A file may be empty, but has to exist.

    Returns:
        All phases, sorted by start.

    Raises:
        UserError: A file is missing, or a line of it is not a phase mark.
    """
    phases = [phase for path in paths for phase in _read_file(Path(path))]
    return sorted(phases, key=lambda phase: (phase.start, phase.rank))


def _read_file(path: Path) -> Iterator[Phase]:
    open_phases: list[Phase] = []
    process = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the phase log {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            mark = json.loads(line)
            event, timestamp = mark["event"], float(mark["time"])
            phase = Phase(mark["name"], mark["rank"], timestamp, None)
            if event not in ("begin", "end"):
                raise ValueError(f"event {event!r}")
            if mark["pid"] != process:
                yield from (_ended(left_open, timestamp) for left_open in open_phases)
                open_phases, process = [], mark["pid"]
            if event == "begin":
                open_phases.append(phase)
            else:
                # The innermost open phase of this name: marks nest like the blocks that wrote them.
                begun = next(i for i in reversed(range(len(open_phases))) if open_phases[i].name == phase.name)
                yield _ended(open_phases.pop(begun), timestamp)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise UserError(
                f"{path} line {number} is not a phase mark: {line[:80]!r}; delete the file and run again"
            ) from error
    yield from open_phases


def _ended(phase: Phase, timestamp: float) -> Phase:
    return Phase(phase.name, phase.rank, phase.start, timestamp)


def across_ranks(phases: Iterable[Phase]) -> list[Phase]:
    """Join the phases of all ranks: the n-th time a rank ran a phase joins the n-th time the others did.

    A joined phase lasts from the first rank's start to the last rank's end, and has no end if one rank's has none. It
    carries the rank that started first. The result is sorted by start.
    """
    occurrence: dict[tuple[str, int], int] = defaultdict(int)
    joined: dict[tuple[str, int], list[Phase]] = defaultdict(list)
    for phase in sorted(phases, key=lambda phase: phase.start):
        number = occurrence[phase.name, phase.rank]
        occurrence[phase.name, phase.rank] += 1
        joined[phase.name, number].append(phase)
    return sorted(
        (
            Phase(name, group[0].rank, group[0].start, _latest([phase.end for phase in group]))
            for (name, _), group in joined.items()
        ),
        key=lambda phase: phase.start,
    )


def _latest(ends: list[float | None]) -> float | None:
    known = [end for end in ends if end is not None]
    return max(known) if len(known) == len(ends) else None
