"""Run a function on N ranks, from a notebook cell or a script.

Ranks are forked from a server (multiprocessing's forkserver) that has imported torch and the libraries once and never
touches CUDA: a launch takes a fraction of a second, also when this process has used CUDA itself.
"""

import contextlib
import functools
import linecache
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import cloudpickle

from helpers.errors import UserError
from helpers.hardware import Machine, backend_for, describe_machine
from helpers.launch import worker
from helpers.launch.environment import environment
from helpers.launch.failure import RankError, died, hung, raised
from helpers.launch.shared_memory import remove, segments_of
from helpers.memory.measured import Measured, RankMemory
from helpers.memory.nvml import Sampler
from helpers.memory.phases import read_phases
from helpers.memory.timeline import Timeline

ROOT = Path(__file__).resolve().parents[2]
# After the first sign of a failure: another rank may be the cause, and its message on the way.
CAUSE_SECONDS = 0.25
ANSWER_SECONDS = 2.0  # for ranks to say where they are
LEAVE_SECONDS = 10.0  # for ranks to close their connections after all have returned


@dataclass(frozen=True)
class Progress:
    """What a rank reported with ``report_progress``; ``seconds`` since its function began."""

    rank: int
    done: int
    total: int
    seconds: float
    values: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class RunResult:
    """``results[r]`` is what rank r's function returned, tensors on the CPU.

    ``seconds`` is the wall time from the first rank's start of the function to the last one's end, ``start_seconds``
    what it took to have all ranks ready before.
    """

    results: list[Any]
    memory: Measured
    seconds: float
    start_seconds: float
    backend: str

    def __repr__(self) -> str:
        """One line: a notebook shows it where a cell ends with a run."""
        ranks = f"{len(self.results)} rank{'s' if len(self.results) > 1 else ''}"
        return f"<{ranks} over {self.backend}: ready after {self.start_seconds:.2f} s, {self.seconds:.2f} s of work>"


def run(
    fn: Callable[..., Any],
    nprocs: int = 2,
    *,
    timeout: float = 300.0,
    on_progress: Callable[[Progress], None] | None = None,
    **kwargs: Any,
) -> RunResult:
    """Execute ``fn(**kwargs)`` on ``nprocs`` fresh processes that form torch's default process group.

    NCCL with a GPU for every rank where there are as many, gloo on the CPU otherwise; the function need not know
    (``helpers.launch.device()`` is the rank's device). What ranks print appears at once, marked with the rank.

        def hello(text):
            print(text, dist.get_rank())
            return dist.get_world_size()

        run(hello, nprocs=2, text="rank").results      # [2, 2]

    ``timeout`` is in seconds and ends a hang. ``on_progress`` gets what ranks report with ``report_progress``.

    Raises :class:`RankError` with the rank's number and traceback when a rank raises, dies or the time is over; all
    ranks are ended first, as they are on Ctrl-C or a kernel interrupt. Raises :class:`UserError` for bad arguments.
    """
    machine = describe_machine()
    backend = backend_for(nprocs, machine)
    if timeout <= 0:
        raise UserError(f"timeout is {timeout}; give the seconds after which a hang is ended")
    if backend == "gloo" and machine.gpus:
        _say_once(f"{nprocs} ranks but {len(machine.gpus)} GPU(s): running on the CPU over gloo")
    payload = _pickled(fn, kwargs)
    _start_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        with Sampler() as sampler, _Ranks(nprocs) as ranks:
            for rank in range(nprocs):
                ranks.start(_setup(rank, nprocs, backend, folder, machine, timeout, payload))
            ranks.collect(timeout, on_progress)
            ranks.leave()
        # A rank's last lines, also where it was killed, have been read: phases are complete.
        phases = read_phases(sorted(folder.glob("phases-*.jsonl")))
    reports, timeline = ranks.done, sampler.timeline()
    return RunResult(
        [cloudpickle.loads(report.result) for report in reports],
        Measured(_with_nvml(reports, timeline, backend), timeline, phases),
        max(report.moment for report in reports) - min(ready.moment for ready in ranks.ready),
        max(ready.moment for ready in ranks.ready) - ranks.begun,
        backend,
    )


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)


def _with_nvml(reports: Sequence[worker.Done], timeline: Timeline, backend: str) -> list[RankMemory]:
    deltas = {gpu.index: gpu.delta for gpu in timeline.gpus} if backend == "nccl" else {}
    return [replace(report.memory, nvml=deltas.get(rank)) for rank, report in enumerate(reports)]


def _pickled(fn: Callable[..., Any], kwargs: Mapping[str, Any]) -> bytes:
    try:
        return cloudpickle.dumps((fn, kwargs))
    except Exception as error:
        raise UserError(
            f"{getattr(fn, '__name__', fn)} cannot be sent to other processes ({type(error).__name__}: {error}); "
            "create such objects inside of the function"
        ) from error


def _setup(
    rank: int, nprocs: int, backend: str, folder: Path, machine: Machine, timeout: float, payload: bytes
) -> worker.Setup:
    environ = dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nprocs),
        "LOCAL_WORLD_SIZE": str(nprocs),
    }
    # Everything is on this machine, whatever its name resolves to.
    environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if backend == "nccl":
        environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # NCCL's flight recorder: what a hang is explained from
    if backend == "gloo":
        environ["CUDA_VISIBLE_DEVICES"] = ""  # the same cell must not find a GPU that it cannot use
    # What a traceback would look up on disk and not find: the lines of notebook cells.
    cells = {file: entry for file, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    threads = max(1, machine.cpu_cores // nprocs)
    return worker.Setup(rank, nprocs, backend, folder, environ, os.getcwd(), cells, threads, timeout, payload)


_server_lock = threading.Lock()
_server_started = False


def _start_server() -> None:
    """Start the process that ranks are forked from, once; it ends with this process."""
    global _server_started
    with _server_lock:
        first, _server_started = not _server_started, True
        if first:
            print("first launch: importing torch, transformers, peft, deepspeed for all launches to come", flush=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["helpers.launch.preload"])
        # The server looks for that module before it knows this process's sys.path.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with environment({"PYTHONPATH": path}):
            forkserver.ensure_running()


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """multiprocessing would run the caller's script once more in every rank; the function travels by value instead."""
    with _server_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _Lines:
    """A pipe that a rank writes to; whole lines are shown, marked with the rank."""

    def __init__(self, rank: int, shown_on: TextIO) -> None:
        self._mark = f"[rank {rank}] "
        self._shown_on = shown_on
        self._rest = b""
        self.open = True
        self.read_end, self.write_end = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.read_end.fileno(), False)

    def show(self) -> None:
        """Show the lines that have come."""
        try:
            data = os.read(self.read_end.fileno(), 1 << 16)
        except BlockingIOError:
            return
        self.open = bool(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._show_line(line)

    def finish(self) -> None:
        """Show what there is, an unfinished line included, and close the pipe.

        Not until the pipe ends: a process that the rank started may still have it.
        """
        while self.open and wait([self.read_end], 0):
            self.show()
        if self._rest:
            self._show_line(self._rest)
        self.read_end.close()

    def _show_line(self, line: bytes) -> None:
        print(self._mark + line.decode("utf-8", "replace"), file=self._shown_on, flush=True)


@dataclass
class _Rank:
    """A rank as the launcher sees it."""

    process: Any
    connection: Connection
    streams: tuple[_Lines, _Lines]
    ready: worker.Ready | None = None
    done: worker.Done | None = None
    failed: worker.Failed | None = None
    where: worker.Whereabouts | None = None
    silent: bool = False  # nothing will come over the connection any more
    ended: bool = False  # its process was seen to have ended


@dataclass
class _Ranks:
    """The ranks of one run. Leaving the block ends every process that is still there, for whatever reason."""

    nprocs: int
    ranks: list[_Rank] = field(default_factory=list)
    begun: float = field(default_factory=time.time)

    @property
    def ready(self) -> list[worker.Ready]:
        return [rank.ready for rank in self.ranks if rank.ready]

    @property
    def done(self) -> list[worker.Done]:
        return [rank.done for rank in self.ranks if rank.done]

    def __enter__(self) -> "_Ranks":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        for rank in self.ranks:
            for stream in rank.streams:
                stream.finish()
            rank.connection.close()
            rank.process.close()

    def start(self, setup: worker.Setup) -> None:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        streams = (_Lines(setup.rank, sys.stdout), _Lines(setup.rank, sys.stderr))
        write_ends = [stream.write_end for stream in streams]
        process = context.Process(target=worker.main, args=(setup, theirs, *write_ends), name=f"rank {setup.rank}")
        self.ranks.append(_Rank(process, ours, streams))
        try:
            with _without_main_module():
                process.start()
        except (OSError, EOFError) as error:
            raise UserError(f"rank {setup.rank} could not be started ({error}); run the cell again") from error
        finally:
            theirs.close()
            for end in write_ends:
                end.close()

    def collect(self, timeout: float, on_progress: Callable[[Progress], None] | None) -> None:
        """Wait until every rank is done, showing lines and progress meanwhile. Raises RankError."""
        limit = time.monotonic() + timeout
        failing_until: float | None = None
        while len(self.done) < self.nprocs:
            now = time.monotonic()
            if failing_until is None and self._failures():
                failing_until = now + CAUSE_SECONDS
            if failing_until is not None and (now >= failing_until or self._all_have_spoken()):
                raise self._cause()
            if now >= limit:
                raise self._hung(timeout)
            self._wait((failing_until or limit) - now, on_progress)

    def leave(self) -> None:
        """Let the ranks close their connections and end, now that none needs another."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.connection.send(worker.LEAVE)
        limit = time.monotonic() + LEAVE_SECONDS
        while not all(rank.ended for rank in self.ranks) and time.monotonic() < limit:
            self._wait(limit - time.monotonic(), None)

    def _wait(self, seconds: float, on_progress: Callable[[Progress], None] | None) -> None:
        """Handle what comes within ``seconds``: one round."""
        talking = {rank.connection: rank for rank in self.ranks if not rank.silent}
        # Not those that are alive: one that ends between the caller's look and this one would be waited for in vain.
        living = {rank.process.sentinel: rank for rank in self.ranks if not rank.ended}
        printing = {stream.read_end: stream for rank in self.ranks for stream in rank.streams if stream.open}
        for source in wait([*talking, *living, *printing], max(0.0, seconds)):
            if source in printing:
                printing[source].show()
            elif source in living:
                living[source].ended = True
            else:
                self._receive(talking[source], on_progress)

    def _receive(self, rank: _Rank, on_progress: Callable[[Progress], None] | None) -> None:
        try:
            message = rank.connection.recv()
        except (EOFError, OSError):
            rank.silent = True
            return
        match message:
            case worker.Ready():
                rank.ready = message
            case worker.Done():
                rank.done = message
            case worker.Failed():
                rank.failed = message
            case worker.Whereabouts():
                rank.where = message
            case worker.ProgressReport() if on_progress:
                seconds = time.time() - rank.ready.moment
                number = self.ranks.index(rank)
                on_progress(Progress(number, message.done, message.total, seconds, message.values))

    def _dead(self) -> list[int]:
        """Ranks whose process ended without a result or an exception, all messages read."""
        return [
            number
            for number, rank in enumerate(self.ranks)
            if not (rank.done or rank.failed or rank.process.is_alive()) and (rank.silent or not rank.connection.poll())
        ]

    def _failures(self) -> bool:
        return bool(self._dead()) or any(rank.failed for rank in self.ranks)

    def _all_have_spoken(self) -> bool:
        dead = self._dead()
        return all(rank.done or rank.failed or number in dead for number, rank in enumerate(self.ranks))

    def _cause(self) -> RankError:
        """The failure that came first. A rank that died silently is the cause of what others then raised."""
        for number in self._dead():
            return died(number, self.nprocs, self.ranks[number].process.exitcode)
        failed = [(rank.failed.moment, number) for number, rank in enumerate(self.ranks) if rank.failed]
        number = min(failed)[1]
        return raised(number, self.nprocs, self.ranks[number].failed)

    def _hung(self, timeout: float) -> RankError:
        asked = [rank for rank in self.ranks if not rank.done and not rank.silent]
        for rank in asked:
            with contextlib.suppress(OSError):
                rank.connection.send(worker.WHERE_ARE_YOU)
        limit = time.monotonic() + ANSWER_SECONDS
        while any(rank.where is None and not rank.silent for rank in asked) and time.monotonic() < limit:
            self._wait(limit - time.monotonic(), None)
        return hung(
            timeout,
            {number: rank.where for number, rank in enumerate(self.ranks)},
            {number: rank.done is not None for number, rank in enumerate(self.ranks)},
        )

    def _end(self) -> None:
        """Kill what is still there, processes that ranks started included, and what only they could have removed."""
        started = [rank.process for rank in self.ranks if rank.process.pid]
        groups = [process.pid for process in started]
        left: set[Path] = set()
        if any(process.exitcode != 0 for process in started):
            _signal_groups(groups, signal.SIGSTOP)  # or a segment could appear after we looked
            left = segments_of(groups)
        _signal_groups(groups, signal.SIGKILL)
        for process in started:
            process.kill()  # one that has only just been forked is not yet a group of its own
            process.join()
        remove(left)


def _signal_groups(groups: Sequence[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
