"""Check in less than a minute whether this machine can run the course: ``make ready``, or ``python -m helpers.ready``.

Each check prints one line: ok, note (the course runs) or problem (it does not), with what to do. After a problem the
exit status is 1.

:func:`look` finds the facts, and starts two ranks that really add up; :func:`judge` decides from the facts alone. An
older Python must be able to parse this module, and packages may be missing. So the top imports only Python's own
modules.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.hardware import Machine

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LAUNCH_SECONDS = 45  # after which the trial launch counts as hung
MOST_RANKS = 8  # that a chapter starts: the 2 x 2 x 2 mesh of chapter 05
# Peaks of all processes while a chapter ran on a CPU, notebook included (proportional set size): 1.2 GiB with chapter
# 05's eight ranks, 2.3 GiB in chapter 12, whose ranks torchrun starts, so that each imports the libraries.
COURSE_BYTES = 5 * GIB // 2
RANK_BYTES = GIB // 8  # a rank that `run` starts shares the libraries; its own tensors take less than this
SHARED_BYTES = GIB // 4  # for NCCL and data loaders; a container gets 64 MiB unless it asks for more
DISK_BYTES = 2 * GIB  # free: chapter 10 asks for one of them, or for eight if there is a GPU


@dataclass(frozen=True)
class Facts:
    """What was found on this machine.

    Attributes:
        system: As ``platform.system()`` names it.
        release: Of the kernel; says whether a Linux is WSL.
        python: Version of this Python, (major, minor).
        supported: The first version that the course supports and the first that it does not.
        start_methods: Ways in which multiprocessing can start a process here.
        shared_bytes: Free shared memory; 0 without any, None if the system has no folder for it (macOS).
        disk_bytes: Free bytes on the disk of the course.
        packages: Version that pyproject.toml asks for, and the installed one or None, of each package.
        machine: Hardware as the course sees it; None if a package that looks is missing.
        free_bytes: Host memory that is free; None as above.
        launches: Seconds of each trial launch by its name, or the error as text.
    """

    system: str
    release: str
    python: tuple[int, int]
    supported: tuple[tuple[int, int], tuple[int, int]]
    start_methods: tuple[str, ...]
    shared_bytes: int | None
    disk_bytes: int
    packages: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    machine: Machine | None = None
    free_bytes: int | None = None
    launches: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """The result of one check: ``kind`` is "ok", "note" or "problem"."""

    kind: str
    text: str

    def __str__(self) -> str:
        """Return the line as it is printed."""
        return f"{self.kind:9}{self.text}"


def look() -> Facts:
    """Find the facts; this starts processes if Python and the packages allow it.

    Returns:
        What :func:`judge` needs.
    """
    supported = supported_pythons()
    python = sys.version_info[:2]
    shared = Path("/dev/shm")
    shared_bytes = shutil.disk_usage(shared).free if shared.is_dir() else 0
    facts = Facts(
        platform.system(),
        platform.release(),
        python,
        supported,
        tuple(multiprocessing.get_all_start_methods()),
        None if platform.system() == "Darwin" else shared_bytes,
        shutil.disk_usage(ROOT).free,
        _packages() if supported[0] <= python < supported[1] else {},
    )
    if _blocked(facts):
        return facts

    from dataclasses import replace

    import psutil

    from helpers.hardware import default_nprocs, describe_machine

    machine = describe_machine()
    free = min(psutil.virtual_memory().available, machine.ram_bytes)
    launches = {"two ranks over gloo on the CPU": _try_launch(2, on_cpu=True)}
    if machine.gpus:
        launches[f"{default_nprocs(machine)} rank(s) over NCCL, one per GPU"] = _try_launch(default_nprocs(machine))
    return replace(facts, machine=machine, free_bytes=free, launches=launches)


def judge(facts: Facts) -> list[Line]:
    """Decide what the facts mean for the course.

    Args:
        facts: From :func:`look`, or made up by a test.

    Returns:
        A line for each check.
    """
    lines = [_system(facts), _python(facts), *_installed(facts), _shared(facts), _disk(facts)]
    if facts.machine is None or facts.free_bytes is None:
        return [*lines, Line("note", "memory, GPUs and a launch were not checked: solve the problem above first")]
    return [*lines, _memory(facts.free_bytes, facts.machine), *_gpus(facts.machine), *_launches(facts)]


def _system(facts: Facts) -> Line:
    name = f"{facts.system} {facts.release}"
    if facts.system == "Linux" and "microsoft" in facts.release.lower() and "wsl2" not in facts.release.lower():
        return Line("problem", f"{name}: this looks like WSL 1; in Windows, run: wsl --set-version <distribution> 2")
    if "forkserver" not in facts.start_methods:
        return Line("problem", f"{name} has no fork server, which starts the ranks; on Windows, use WSL2")
    if facts.system == "Linux":
        return Line("ok", name)
    return Line("note", f"{name}: the course is tested on Linux only; if something fails here, use the Containerfile")


def _python(facts: Facts) -> Line:
    first, beyond = facts.supported
    found, wanted = ".".join(map(str, facts.python)), f"3.{first[1]} to 3.{beyond[1] - 1}"
    if first <= facts.python < beyond:
        return Line("ok", f"Python {found}")
    return Line("problem", f"Python {found}: the course needs {wanted}; name one: make PYTHON=/path/to/python3.12")


def _installed(facts: Facts) -> list[Line]:
    if not facts.packages:
        return []
    remedy = "install with: make lab, or pip install -e '.[test]'"
    missing = [f"{name}=={wanted}" for name, (wanted, found) in facts.packages.items() if found is None]
    # A build for one CUDA version is called 2.13.0+cu130.
    other = [
        f"{name} {found} instead of {wanted}"
        for name, (wanted, found) in facts.packages.items()
        if found is not None and found.partition("+")[0] != wanted
    ]
    lines = [Line("problem", f"not installed: {', '.join(missing)}; {remedy}")] if missing else []
    lines += [Line("note", f"not the tested versions: {', '.join(other)}; {remedy}")] if other else []
    return lines or [Line("ok", f"{len(facts.packages)} packages, at the versions of pyproject.toml")]


def _shared(facts: Facts) -> Line:
    if facts.shared_bytes is None:
        return Line("ok", f"{facts.system} needs no folder for shared memory")
    if facts.shared_bytes == 0:
        return Line("problem", "/dev/shm is missing or full: start the container with --shm-size=1g, or free it")
    free = f"{facts.shared_bytes / GIB:.1f} GiB of shared memory free"
    if facts.shared_bytes < SHARED_BYTES:
        return Line("note", f"only {free}, too little for NCCL; start the container with --shm-size=1g")
    return Line("ok", free)


def _disk(facts: Facts) -> Line:
    free = f"{facts.disk_bytes / GIB:.1f} GiB free on the course's disk"
    if facts.disk_bytes < DISK_BYTES:
        return Line("problem", f"only {free}, and the chapters write files: {DISK_BYTES // GIB} GiB must be free")
    return Line("ok", free)


def _memory(free: int, machine: Machine) -> Line:
    found = f"{free / GIB:.1f} of {machine.ram_bytes / GIB:.1f} GiB of memory free"
    ranks, cores = ranks_that_fit(free), machine.cpu_cores
    if not ranks:
        return Line("problem", f"{found}, but the chapters take up to {COURSE_BYTES / GIB} GiB; close other programs")
    fit = f"{found}, {cores} core{'s' if cores > 1 else ''}: room for {ranks} ranks on the CPU, one thread each"
    if ranks < MOST_RANKS:
        return Line("note", f"{fit}; chapter 05 starts {MOST_RANKS}, so close other programs before it")
    turns = f"; more than {cores} take turns: right results, slow steps" if cores < ranks else ""
    return Line("ok", f"{fit}{turns}")


def ranks_that_fit(free: int) -> int:
    """Return how many ranks of a chapter's size fit into the host's memory; 0 if it is too little for the course.

    Args:
        free: Bytes of host memory that are free before a notebook is opened.
    """
    return 0 if free < COURSE_BYTES else 2 + (free - COURSE_BYTES) // RANK_BYTES


def _gpus(machine: Machine) -> list[Line]:
    names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    found = Line("ok", f"{len(machine.gpus)} GPU(s): {names}, driver {machine.driver}")
    none = Line("note", "no GPU: launches run on the CPU, and the recorded outputs show the measurements")
    return [found if machine.gpus else none, *(Line("note", note) for note in machine.notes)]


def _launches(facts: Facts) -> list[Line]:
    lines = []
    for name, outcome in facts.launches.items():
        if isinstance(outcome, str):
            lines.append(Line("problem", f"{name}: {outcome}; try again, and if it stays, use the Containerfile"))
        else:
            lines.append(Line("ok", f"{name}: the sum is right; {outcome:.0f} s, imports included"))
    return lines


def _blocked(facts: Facts) -> bool:
    """Whether hardware and launches cannot be looked at: the code that does it needs Python and the packages."""
    first, beyond = facts.supported
    if not first <= facts.python < beyond or "forkserver" not in facts.start_methods:
        return True
    return any(found is None for _, found in facts.packages.values())


def supported_pythons() -> tuple[tuple[int, int], tuple[int, int]]:
    """Read from pyproject.toml the first Python that the course supports and the first that it does not."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    first, beyond = re.findall(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', text, re.MULTILINE)[0]
    return (3, int(first)), (3, int(beyond))


def _packages() -> dict[str, tuple[str, str | None]]:
    import tomllib  # since Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, tuple[str, str | None]] = {}
    for requirement in project["dependencies"]:
        name, _, wanted = requirement.partition("==")
        try:
            found[name] = wanted, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = wanted, None
    return found


def _try_launch(nprocs: int, on_cpu: bool = False) -> float | str:
    """Let ranks add up their numbers: return the seconds, or what went wrong as one line."""
    import time

    from helpers.launch import run

    begin = time.monotonic()
    try:
        sums = run(_sum_of_ranks, nprocs, timeout=LAUNCH_SECONDS, on_cpu=on_cpu).results
    except Exception as error:  # whatever it is, the other lines still help
        lines = str(error).splitlines() or [type(error).__name__]
        return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"  # without the traceback between them
    expected = nprocs * (nprocs - 1) // 2
    return time.monotonic() - begin if sums == [expected] * nprocs else f"wrong sums {sums}, not {expected}"


def _sum_of_ranks() -> int:
    import torch
    import torch.distributed as dist

    from helpers.launch import device

    total = torch.tensor(dist.get_rank(), device=device())
    dist.all_reduce(total)
    return int(total.item())


def main() -> None:
    """Print a line per check; the exit status is 1 if the course cannot run."""
    lines = judge(look())
    print("\n".join(map(str, lines)))
    sys.exit(any(line.kind == "problem" for line in lines))


if __name__ == "__main__":
    main()
