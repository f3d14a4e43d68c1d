"""One rank: a forked process that joins the process group, runs the function, and tells the launcher what came of it.

It speaks with the launcher over one connection. To it go :class:`Ready`, :class:`ProgressReport`, :class:`Done`,
:class:`Failed` and :class:`Whereabouts`; from it come the two words below.
"""

import faulthandler
import io
import os
import pickle
import resource
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from linecache import cache as source_lines
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from helpers.errors import UserError
from helpers.memory.measured import RankMemory
from helpers.memory.phases import PhaseLog, mark_in

WHERE_ARE_YOU, LEAVE = "where are you", "leave"


@dataclass(frozen=True)
class Setup:
    """What a rank needs to begin. ``payload`` is the pickled (function, keyword arguments)."""

    rank: int
    nprocs: int
    backend: str
    folder: Path
    environ: Mapping[str, str]
    working_directory: str
    sources: Mapping[str, tuple]
    threads: int
    timeout: float
    payload: bytes


@dataclass(frozen=True)
class Ready:
    moment: float


@dataclass(frozen=True)
class ProgressReport:
    done: int
    total: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    result: bytes
    memory: RankMemory
    moment: float


@dataclass(frozen=True)
class Failed:
    """The exception that ended a rank: its type, its traceback from the function on."""

    type: str
    traceback: str
    moment: float


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is: the collective that it waits in (None: in none), and the user's line that led there."""

    collective: str | None
    place: str
    pending_on_gpu: tuple[str, ...]


class _ToLauncher:
    """The connection, shared by the rank's main thread and the one that answers the launcher."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.may_leave = threading.Event()

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def answer(self, main_thread: int) -> None:
        """Do what the launcher asks; where the launcher is gone, end this rank and all that it started."""
        while True:
            try:
                word = self._connection.recv()
            except (EOFError, OSError):
                os.killpg(os.getpgid(0), signal.SIGKILL)
            if word == LEAVE:
                self.may_leave.set()
                return
            self.send(whereabouts(sys._current_frames()[main_thread]))


_launcher: _ToLauncher | None = None


def device() -> torch.device:
    """The device of this rank: its own GPU under nccl, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def report_progress(done: int, total: int, **values: Any) -> None:
    """Tell ``run``'s ``on_progress`` that ``done`` of ``total`` steps are done; ``values`` is what else to show."""
    if _launcher is None:
        raise UserError("report_progress was called outside of a rank; call it in a function given to run()")
    _launcher.send(ProgressReport(done, total, values))


def main(setup: Setup, connection: Connection, stdout: Connection, stderr: Connection) -> None:
    """What a forked process does, from its first line to its end."""
    global _launcher
    os.setsid()  # a process group of its own, so that all that the rank starts can be ended with it
    _redirect(stdout, stderr)
    _launcher = to_launcher = _ToLauncher(connection)
    threading.Thread(target=to_launcher.answer, args=(threading.get_ident(),), daemon=True).start()
    try:
        _prepare(setup)
        fn, kwargs = cloudpickle.loads(setup.payload)
        _join_process_group(setup)
        to_launcher.send(Ready(time.time()))
        result = fn(**kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # an error of a kernel that still runs belongs to this function
        to_launcher.send(Done(_pickled(result), _memory(), time.time()))
    except BaseException as error:
        sys.stdout.flush()  # a line that was begun
        to_launcher.send(_failed(error))
        # The launcher ends all ranks; one that left by itself would make the others fail as well.
        while True:
            signal.pause()
    # As long as another rank works, this one must not close its connections to it.
    to_launcher.may_leave.wait()
    mark_in(None)
    dist.destroy_process_group()
    sys.stdout.flush()


def _redirect(stdout: Connection, stderr: Connection) -> None:
    """Both streams into the launcher's pipes, at the level of descriptors: libraries in C print, too."""
    for stream, number in ((stdout, 1), (stderr, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    # A line goes out when it is whole; what is no UTF-8 does not end the rank.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    faulthandler.enable(file=sys.stderr)


def _prepare(setup: Setup) -> None:
    os.environ.clear()
    os.environ.update(setup.environ)
    os.chdir(setup.working_directory)
    source_lines.update(setup.sources)
    torch.set_num_threads(setup.threads)
    mark_in(PhaseLog(setup.folder / f"phases-{setup.rank:03}.jsonl", setup.rank))


def _join_process_group(setup: Setup) -> None:
    if setup.backend == "nccl":
        torch.cuda.set_device(setup.rank)
    # A file and no port: launches at the same time cannot meet. The process group's own limit comes after the
    # launcher's, which knows better what to say.
    store = dist.FileStore(str(setup.folder / "store"), setup.nprocs)
    limit = timedelta(seconds=setup.timeout + 60)
    dist.init_process_group(setup.backend, store=store, rank=setup.rank, world_size=setup.nprocs, timeout=limit)


class _ResultPickler(cloudpickle.Pickler):
    """Tensors go as they are on the CPU: the launcher's process must not get a CUDA context by reading a result."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def _pickled(result: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        _ResultPickler(buffer).dump(result)
    except Exception as error:
        raise UserError(
            f"the function's result cannot be sent to the notebook ({error}); return numbers, tensors, lists or dicts"
        ) from None
    return buffer.getvalue()


def _memory() -> RankMemory:
    """This rank's peaks; what NVML saw is the launcher's to add."""
    on_gpu = torch.cuda.is_initialized()
    kib = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS
    return RankMemory(
        allocated=torch.cuda.max_memory_allocated() if on_gpu else None,
        reserved=torch.cuda.max_memory_reserved() if on_gpu else None,
        nvml=None,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib,
    )


def _failed(error: BaseException) -> Failed:
    # The first frame is main's, above.
    lines = traceback.format_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    return Failed(type(error).__name__, "".join(lines), time.time())


# The longer ones first: site-packages lies inside of stdlib.
LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def whereabouts(frame: FrameType) -> Whereabouts:
    """Where ``frame`` is: the outermost function of torch's collectives in its stack, and the innermost user's line."""
    stack = traceback.extract_stack(frame)
    collective = next((entry.name for entry in stack if entry.filename.endswith(_COLLECTIVES)), None)
    own = [entry for entry in stack if not entry.filename.startswith((*LIBRARIES, "<frozen", __file__))]
    innermost = own[-1] if own else stack[-1]
    place = f'File "{innermost.filename}", line {innermost.lineno}: {innermost.line}'
    return Whereabouts(collective, place, _pending_on_gpu())


def _pending_on_gpu() -> tuple[str, ...]:
    """NCCL's collectives that were enqueued and did not end, from torch's flight recorder.

    Under NCCL a collective returns at once, and the CPU waits somewhere later, where a result is read.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_initialized():
        return ()
    try:
        recorded = pickle.loads(dump(includeCollectives=True, includeStackTraces=False, onlyActive=True))
        return tuple(entry["profiling_name"] for entry in recorded.get("entries", ()))
    except Exception as error:  # where the rank is matters more than this
        return (f"unknown ({error})",)
