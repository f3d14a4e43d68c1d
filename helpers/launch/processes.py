"""Supervise the processes of one run: start them, collect their results, find out why one failed, end them all."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.launch import worker
from helpers.launch.failure import RankError, exception_error, exit_error, timeout_error
from helpers.launch.messages import (
    EXIT,
    REPORT_LOCATION,
    Done,
    Failed,
    Location,
    ProgressReport,
    RankSetup,
    Ready,
)
from helpers.launch.output import RankOutput
from helpers.launch.server import without_main_module
from helpers.launch.shared_memory import find_segments, remove_segments

# After the first sign of a failure: another rank may be its cause, and that rank's message still on the way.
CAUSE_SECONDS = 0.25
LOCATION_SECONDS = 2.0  # for ranks to report their location
LOOK_SECONDS = 0.2  # between two looks at a line that has no end yet
EXIT_SECONDS = 10.0  # for ranks to close their connections after all have returned


@dataclass(frozen=True)
class Progress:
    """What a rank reported with ``report_progress``.

    Attributes:
        rank: The rank that reported.
        done: Steps done so far.
        total: Steps in all.
        seconds: Time since the rank called the function.
        values: The other arguments of ``report_progress``.
    """

    rank: int
    done: int
    total: int
    seconds: float
    values: Mapping[str, Any]


@dataclass
class RankProcess:
    """The process of one rank, and what the launcher has received from it."""

    process: Any
    connection: Connection
    outputs: tuple[RankOutput, ...]
    ready: Ready | None = None
    done: Done | None = None
    failed: Failed | None = None
    location: Location | None = None
    disconnected: bool = False  # the connection is closed: no more messages
    ended: bool = False  # the process was seen to have ended


@dataclass
class RankProcesses:
    """The processes of one run, by rank. Leaving the block ends every process that still runs, for whatever reason."""

    world_size: int
    ranks: list[RankProcess] = field(default_factory=list)
    start_timestamp: float = field(default_factory=time.time)

    @property
    def ready(self) -> list[Ready]:
        """The messages of the ranks that have called the function."""
        return [rank.ready for rank in self.ranks if rank.ready]

    @property
    def done(self) -> list[Done]:
        """The messages of the ranks whose function has returned."""
        return [rank.done for rank in self.ranks if rank.done]

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        for rank in self.ranks:
            for output in rank.outputs:
                output.finish()
            rank.connection.close()
            rank.process.close()

    def start(self, setup: RankSetup) -> None:
        """Fork the next rank from the server."""
        context = multiprocessing.get_context("forkserver")
        our_end, rank_end = context.Pipe()
        outputs = (RankOutput(setup.rank, sys.stdout), RankOutput(setup.rank, sys.stderr))
        write_ends = [output.write_end for output in outputs]
        process = context.Process(target=worker.main, args=(setup, rank_end, *write_ends), name=f"rank {setup.rank}")
        self.ranks.append(RankProcess(process, our_end, outputs))
        try:
            with without_main_module():
                process.start()
        except (OSError, EOFError) as error:
            raise UserError(f"rank {setup.rank} could not be started ({error}); run the cell again") from error
        finally:
            # Only the rank may hold these ends, or its death would not close them and we would never notice.
            rank_end.close()
            for end in write_ends:
                end.close()

    def collect(self, timeout: float, on_progress: Callable[[Progress], None] | None) -> None:
        """Wait until every rank is done; show output and progress meanwhile. Raises RankError."""
        deadline = time.monotonic() + timeout
        failure_deadline: float | None = None
        while len(self.done) < self.world_size:
            now = time.monotonic()
            if failure_deadline is None and self._any_failed():
                failure_deadline = now + CAUSE_SECONDS
            if failure_deadline is not None and (now >= failure_deadline or self._all_finished()):
                raise self._first_failure()
            if now >= deadline:
                raise self._timeout(timeout)
            self._wait((failure_deadline or deadline) - now, on_progress)

    def exit(self) -> None:
        """Let the ranks close their connections and end, now that none of them needs another."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.connection.send(EXIT)
        deadline = time.monotonic() + EXIT_SECONDS
        while not all(rank.ended for rank in self.ranks) and time.monotonic() < deadline:
            self._wait(deadline - time.monotonic(), None)

    def _wait(self, seconds: float, on_progress: Callable[[Progress], None] | None) -> None:
        """Wait up to ``seconds`` for messages, output and ends of processes, and handle the first that come."""
        connections: dict[Any, RankProcess] = {rank.connection: rank for rank in self.ranks if not rank.disconnected}
        # Not `process.is_alive()`: a process that ends between the caller's check and this one would leave nothing to
        # wait for, and the wait would last until its time is over.
        sentinels: dict[Any, RankProcess] = {rank.process.sentinel: rank for rank in self.ranks if not rank.ended}
        outputs: dict[Any, RankOutput] = {
            output.read_end: output for rank in self.ranks for output in rank.outputs if output.open
        }
        if any(output.incomplete for output in outputs.values()):
            seconds = min(seconds, LOOK_SECONDS)
        for source in wait([*connections, *sentinels, *outputs], max(0.0, seconds)):
            if source in outputs:
                outputs[source].show()
            elif source in sentinels:
                sentinels[source].ended = True
            else:
                self._receive(connections[source], on_progress)
        for output in outputs.values():
            output.show_incomplete()

    def _receive(self, rank: RankProcess, on_progress: Callable[[Progress], None] | None) -> None:
        try:
            message = rank.connection.recv()
        except (EOFError, OSError):
            rank.disconnected = True
            return
        match message:
            case Ready():
                rank.ready = message
            case Done():
                rank.done = message
            case Failed():
                rank.failed = message
            case Location():
                rank.location = message
            case ProgressReport() if on_progress and rank.ready:
                seconds = time.time() - rank.ready.timestamp
                index = self.ranks.index(rank)
                on_progress(Progress(index, message.done, message.total, seconds, message.values))

    def _died(self) -> list[int]:
        """Return the ranks whose process ended without a result or an exception, all messages read."""
        return [
            index
            for index, rank in enumerate(self.ranks)
            if not (rank.done or rank.failed or rank.process.is_alive())
            and (rank.disconnected or not rank.connection.poll())
        ]

    def _any_failed(self) -> bool:
        return bool(self._died()) or any(rank.failed for rank in self.ranks)

    def _all_finished(self) -> bool:
        died = self._died()
        return all(rank.done or rank.failed or index in died for index, rank in enumerate(self.ranks))

    def _first_failure(self) -> RankError:
        """Find the rank that failed first. One that died is the cause of exceptions that others then raised."""
        if died := self._died():
            return exit_error(died[0], self.world_size, self.ranks[died[0]].process.exitcode)
        failed = {index: rank.failed for index, rank in enumerate(self.ranks) if rank.failed}
        first = min(failed, key=lambda index: failed[index].timestamp)
        return exception_error(first, self.world_size, failed[first])

    def _timeout(self, timeout: float) -> RankError:
        """Ask the ranks that have not returned for their location."""
        running = [rank for rank in self.ranks if not rank.done and not rank.disconnected]
        for rank in running:
            with contextlib.suppress(OSError):
                rank.connection.send(REPORT_LOCATION)
        deadline = time.monotonic() + LOCATION_SECONDS
        while any(rank.location is None and not rank.disconnected for rank in running) and time.monotonic() < deadline:
            self._wait(deadline - time.monotonic(), None)
        return timeout_error(
            timeout,
            {index: rank.location for index, rank in enumerate(self.ranks)},
            {index: rank.done is not None for index, rank in enumerate(self.ranks)},
        )

    def _kill(self) -> None:
        """Kill the ranks and all processes that they started, and remove the shared memory that these leave behind."""
        started = [rank.process for rank in self.ranks if rank.process.pid]
        groups = [process.pid for process in started]
        segments: set[Path] = set()
        if any(process.exitcode != 0 for process in started):
            _signal_groups(groups, signal.SIGSTOP)  # otherwise a segment could appear after we have looked
            segments = find_segments(groups)
        _signal_groups(groups, signal.SIGKILL)
        for process in started:
            process.kill()  # one that was forked just now does not lead a process group yet
            process.join()
        remove_segments(segments)


def _signal_groups(groups: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to process groups: a rank's group (see ``worker.main``) holds everything that the rank started."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
