"""The process of one rank: join the process group, call the function, and send the launcher what came of it."""

import contextlib
import copyreg
import faulthandler
import functools
import io
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import sysconfig
import threading
import time
import traceback
import types
from collections.abc import Callable
from datetime import timedelta
from linecache import cache as source_lines
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from helpers.errors import UserError
from helpers.launch.messages import EXIT, Done, Failed, Location, ProgressReport, RankSetup, Ready
from helpers.libraries.deepspeed import use_cpu_accelerator
from helpers.memory.measured import RankMemory
from helpers.memory.phases import PhaseLog, mark_in


class _Launcher:
    """The connection to the launcher, shared by the rank's main thread and the thread that listens for commands."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.may_exit = threading.Event()

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def listen(self, main_thread: int) -> None:
        """Obey the launcher's commands; if the launcher is gone, kill this rank and everything that it started.

        This needs a thread of its own: the main thread may hang in a collective.
        """
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                os.killpg(os.getpgid(0), signal.SIGKILL)
            if command == EXIT:
                self.may_exit.set()
                return
            self.send(locate(sys._current_frames()[main_thread]))


_launcher: _Launcher | None = None


def device() -> torch.device:
    """Return the device of this rank.

    Returns:
        The rank's own GPU under NCCL, otherwise the CPU.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def report_progress(done: int, total: int, **values: Any) -> None:
    """Report from a rank how far its function is; ``run`` passes it to ``on_progress``.

    Args:
        done: Steps done so far.
        total: Steps in all.
        values: Anything else to show, for instance the loss.

    Raises:
        UserError: This process is not a rank.
    """
    if _launcher is None:
        raise UserError("report_progress was called outside of a rank; call it in a function given to run()")
    _launcher.send(ProgressReport(done, total, values))


def main(setup: RankSetup, connection: Connection, stdout: Connection, stderr: Connection) -> None:
    """Run a rank, from the first line of its forked process to the end."""
    global _launcher
    os.setsid()  # lead a new process group (and session): killing the group also kills what the function starts
    _redirect(stdout, stderr)
    _launcher = launcher = _Launcher(connection)
    threading.Thread(target=launcher.listen, args=(threading.get_ident(),), daemon=True).start()
    try:
        _prepare(setup)
        fn, kwargs = cloudpickle.loads(setup.payload)
        _become_ordinary(fn)
        _join_process_group(setup)
        launcher.send(Ready(time.time()))
        result = fn(**kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # kernels run asynchronously: an error of one belongs to this function
        launcher.send(Done(_pickle(result), _memory(), time.time()))
    except BaseException as error:
        _flush()  # a line may be incomplete
        launcher.send(_failed(error))
        # If this rank ended now, its connections would close and the others would fail as well. The launcher kills all.
        while True:
            signal.pause()
    # For the same reason, a rank that has returned waits until every other rank has.
    launcher.may_exit.wait()
    mark_in(None)
    if dist.is_initialized():  # the function may have destroyed the group
        dist.destroy_process_group()
    _flush()


def _flush() -> None:
    with contextlib.suppress(ValueError, OSError):  # the function may have closed the stream
        sys.stdout.flush()


def _become_ordinary(fn: Callable[..., Any]) -> None:
    """Make what the function starts (pools, workers of data loaders) find what it would find in a notebook's process.

    multiprocessing has made the way in which this rank was started the default for its own children, and what a cell
    defines belongs to a ``__main__`` that these look into by name.
    """
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else "spawn", force=True)
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = getattr(fn, "__func__", fn)
    if isinstance(fn, types.FunctionType) and fn.__module__ == "__main__":
        main_module = types.ModuleType("__main__")
        main_module.__dict__.update({name: value for name, value in fn.__globals__.items() if name[:2] != "__"})
        main_module.__dict__[fn.__name__] = fn
        sys.modules["__main__"] = main_module


def _redirect(stdout: Connection, stderr: Connection) -> None:
    """Send both streams to the launcher, at the level of file descriptors: libraries in C print as well."""
    for stream, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(stream.fileno(), descriptor)
        stream.close()
    # Line-buffered, so that a line appears when it is complete; output that is not UTF-8 must not end the rank.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    faulthandler.enable(file=sys.stderr)


def _prepare(setup: RankSetup) -> None:
    """Give this process the caller's environment: the server was started earlier, perhaps with another one."""
    os.environ.clear()
    os.environ.update(setup.environ)
    os.chdir(setup.working_directory)
    source_lines.update(setup.sources)
    torch.set_num_threads(setup.threads)
    if setup.backend == "gloo":
        use_cpu_accelerator()  # the server, which this process is a copy of, may have seen a GPU
    mark_in(PhaseLog(setup.folder / f"phases-{setup.rank:03}.jsonl", setup.rank))


def _join_process_group(setup: RankSetup) -> None:
    gpu = torch.device("cuda", setup.rank) if setup.backend == "nccl" else None
    if gpu:
        torch.cuda.set_device(gpu)
        _start_autograd(gpu)
    # Ranks find each other through a file, not through a port that a simultaneous launch could take.
    store = dist.FileStore(str(setup.folder / "store"), setup.world_size)
    # Longer than the launcher's own limit, which explains a hang better.
    limit = timedelta(seconds=setup.timeout + 60)
    dist.init_process_group(
        setup.backend,
        store=store,
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=limit,
        # With its GPU named, NCCL connects the ranks now and not in their first collective, and a barrier need not
        # guess the GPU. A single rank has nobody to connect to: it would hold half a GiB that it never uses.
        device_id=gpu if setup.world_size > 1 else None,
    )


def _start_autograd(gpu: torch.device) -> None:
    """Start autograd's thread for this GPU, and make the GPU's context current in it.

    Torch sets a thread's GPU only if it is not the thread's default, GPU 0. So on GPU 0 a first backward that begins
    with a matmul would find no context, and cuBLAS would warn. The empty tensor takes no memory and loads no kernel.
    """
    x = torch.empty(0, device=gpu, requires_grad=True)
    x.register_hook(lambda _: torch.cuda.synchronize())  # called by autograd's thread
    x.backward(torch.empty_like(x))


class _ResultPickler(cloudpickle.Pickler):
    """Pickle tensors as CPU tensors: reading a result must not create a CUDA context in the launcher's process.

    Exceptions are pickled by their attributes: Python's own way calls the class with ``args``, which need not be what
    its ``__init__`` takes.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(obj, BaseException) and isinstance(type(obj).__init__, types.FunctionType):
            if type(obj).__reduce__ is BaseException.__reduce__:
                return copyreg.__newobj__, (type(obj), *obj.args), obj.__dict__  # type: ignore[attr-defined]
        return super().reducer_override(obj)


def _pickle(result: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        _ResultPickler(buffer).dump(result)
    except Exception as error:
        raise UserError(
            f"the function's result cannot be sent to the notebook ({error}); return numbers, tensors, lists or dicts"
        ) from None
    return buffer.getvalue()


def _memory() -> RankMemory:
    """Measure this rank's peaks; the launcher adds what NVML saw."""
    on_gpu = torch.cuda.is_initialized()
    kib = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on macOS in bytes
    return RankMemory(
        allocated=torch.cuda.max_memory_allocated() if on_gpu else None,
        reserved=torch.cuda.max_memory_reserved() if on_gpu else None,
        nvml=None,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib,
    )


def _failed(error: BaseException) -> Failed:
    # The first frame is that of `main` above.
    lines = traceback.format_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    return Failed(type(error).__name__, "".join(lines), time.time())


# The longer paths first: site-packages is a folder inside stdlib.
LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def locate(frame: FrameType) -> Location:
    """Find the outermost of torch's collectives in a frame's stack, and the innermost line of the user's own code."""
    stack = traceback.extract_stack(frame)
    collective = next((entry.name for entry in stack if entry.filename.endswith(_COLLECTIVES)), None)
    own = [entry for entry in stack if not entry.filename.startswith((*LIBRARIES, "<frozen", __file__))]
    innermost = own[-1] if own else stack[-1]
    line = f'File "{innermost.filename}", line {innermost.lineno}: {innermost.line}'
    return Location(collective, line, _pending_on_gpu())


def _pending_on_gpu() -> tuple[str, ...]:
    """Return NCCL's collectives that were started and have not finished, from torch's flight recorder.

    Under NCCL a collective returns at once, and the CPU waits later, where it reads a result: the stack alone does not
    show which collective hangs.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_initialized():
        return ()
    try:
        recorded = pickle.loads(dump(includeCollectives=True, includeStackTraces=False, onlyActive=True))
        return tuple(entry["profiling_name"] for entry in recorded.get("entries", ()))
    except Exception as error:  # the location of the rank matters more than this
        return (f"unknown ({error})",)
