"""Run a function on N ranks, from a notebook cell or a script."""

import functools
import linecache
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle

from helpers.errors import UserError
from helpers.hardware import Machine, backend_for, describe_machine
from helpers.launch.messages import Done, RankSetup
from helpers.launch.processes import Progress, RankProcesses
from helpers.launch.server import start_server
from helpers.memory.measured import Measured, RankMemory
from helpers.memory.phases import read_phases
from helpers.memory.sampler import Sampler
from helpers.memory.timeline import Timeline


@dataclass(frozen=True, repr=False)
class RunResult:
    """What the ranks of one run returned, and what the run cost.

    Attributes:
        results: What each rank's function returned, by rank; tensors are on the CPU.
        memory: Peaks of each rank in bytes, NVML's curves, and the phases that ranks marked.
        seconds: Time from the first rank's call of the function to the last rank's return.
        start_seconds: Time before that, until all ranks had started; NCCL connects several ranks in it.
        backend: ``"nccl"`` or ``"gloo"``.
    """

    results: list[Any]
    memory: Measured
    seconds: float
    start_seconds: float
    backend: str

    def __repr__(self) -> str:
        """Return one line: a notebook shows it if a cell ends with a run."""
        ranks = f"{len(self.results)} rank{'s' if len(self.results) > 1 else ''}"
        return f"<{ranks} over {self.backend}: ready after {self.start_seconds:.2f} s, {self.seconds:.2f} s of work>"


def run(
    fn: Callable[..., Any],
    nprocs: int = 2,
    *,
    timeout: float = 300.0,
    on_cpu: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **kwargs: Any,
) -> RunResult:
    """Run ``fn(**kwargs)`` on ``nprocs`` new processes that form torch's default process group.

    If there are enough GPUs, every rank gets one and the backend is NCCL; otherwise all ranks use the CPU and gloo. The
    function need not care: ``helpers.launch.device()`` is the rank's device. A rank on the CPU has one thread, or
    OMP_NUM_THREADS. Output of the ranks appears at once, marked with the rank.

        def hello(text):
            print(text, dist.get_rank())
            return dist.get_world_size()

        run(hello, nprocs=2, text="rank").results      # [2, 2]

    Args:
        fn: The function. It is sent by value, so it may be defined in a cell.
        nprocs: The number of ranks.
        timeout: Seconds after which ranks that hang are ended.
        on_cpu: Use the CPU and gloo even if there are enough GPUs.
        on_progress: Called with what ranks report through ``report_progress``.
        kwargs: The function's keyword arguments.

    Returns:
        What the ranks returned, their memory and their times.

    Raises:
        RankError: A rank raised, died, or did not return in time. The error has the rank and its traceback. All ranks
            are ended first, as they are on Ctrl-C or an interrupt of the kernel.
        UserError: Bad arguments.
    """
    _check_working_directory()
    machine = describe_machine()
    backend = backend_for(nprocs, machine)
    if on_cpu:
        backend = "gloo"
    if timeout <= 0:
        raise UserError(f"timeout is {timeout}; give the seconds after which a hang is ended")
    if backend == "gloo" and machine.gpus and not on_cpu:
        _print_once(f"{nprocs} ranks but {len(machine.gpus)} GPU(s): running on the CPU over gloo")
    payload = _pickle(fn, kwargs)
    start_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        with Sampler() as sampler, RankProcesses(nprocs) as processes:
            for rank in range(nprocs):
                processes.start(_rank_setup(rank, nprocs, backend, folder, machine, timeout, payload))
            processes.collect(timeout, on_progress)
            processes.exit()
        # The ranks have ended, so their phases are complete.
        phases = read_phases(sorted(folder.glob("phases-*.jsonl")))
    reports, timeline = processes.done, sampler.timeline()
    return RunResult(
        [_read_result(rank, report.result) for rank, report in enumerate(reports)],
        Measured(_add_nvml(reports, timeline, backend), timeline, phases),
        max(report.timestamp for report in reports) - min(ready.timestamp for ready in processes.ready),
        max(ready.timestamp for ready in processes.ready) - processes.start_timestamp,
        backend,
    )


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory has been deleted; os.chdir to another one") from None


def _read_result(rank: int, result: bytes) -> Any:
    try:
        return cloudpickle.loads(result)
    except Exception as error:
        raise UserError(
            f"the result of rank {rank} cannot be read here ({type(error).__name__}: {error}); "
            "return numbers, tensors, lists or dicts"
        ) from error


@functools.cache
def _print_once(line: str) -> None:
    print(line, flush=True)


def _add_nvml(reports: Sequence[Done], timeline: Timeline, backend: str) -> list[RankMemory]:
    """Add what NVML saw, which only the launcher knows, to what each rank measured."""
    deltas = {gpu.index: gpu.delta for gpu in timeline.gpus} if backend == "nccl" else {}
    return [replace(report.memory, nvml=deltas.get(rank)) for rank, report in enumerate(reports)]


def _pickle(fn: Callable[..., Any], kwargs: Mapping[str, Any]) -> bytes:
    try:
        return cloudpickle.dumps((fn, kwargs))
    except Exception as error:
        raise UserError(
            f"{getattr(fn, '__name__', fn)} cannot be sent to other processes ({type(error).__name__}: {error}); "
            "create such objects inside of the function"
        ) from error


def _rank_setup(
    rank: int, world_size: int, backend: str, folder: Path, machine: Machine, timeout: float, payload: bytes
) -> RankSetup:
    environ = dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    # Gloo would look up the machine's host name, which need not resolve. All ranks are here: loopback is enough.
    environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if backend == "nccl":
        environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # turns on NCCL's flight recorder, which explains a hang
    if backend == "gloo":
        # On a machine with GPUs: neither the function nor DeepSpeed may put tensors on one, where gloo cannot use them.
        environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # linecache marks sources that are in no file, such as notebook cells, by a modification time of None. A rank needs
    # them for its traceback.
    cells = {file: entry for file, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    threads = _threads(world_size, backend, machine)
    return RankSetup(rank, world_size, backend, folder, environ, os.getcwd(), cells, threads, timeout, payload)


def _threads(world_size: int, backend: str, machine: Machine) -> int:
    """Choose a rank's threads; an ``OMP_NUM_THREADS`` set by the user wins, because other programs may share the cores.

    Ranks on the CPU have one thread each, as under torchrun: more of them than cores would wait for each other, and a
    busy laptop would look like a hang. It is also fair, since one rank alone computes as fast as each of N.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # can be a list, one number per level of nesting
    if wanted.isdecimal():
        return max(1, int(wanted))
    return 1 if backend == "gloo" else max(1, machine.cpu_cores // world_size)
