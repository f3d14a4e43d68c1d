"""Describe this machine, and derive the backend, the precision and NCCL's settings from it.

Only :func:`describe_machine` and :func:`apply_nccl_environment` look at the machine; all other functions decide from
what these found. Both ask NVML (NVIDIA's management library), which creates no CUDA context.
"""

import importlib.metadata
import os
import platform
import re
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import UserError
from helpers.memory.nvml import Nvml, open_nvml
from helpers.memory.units import GIB

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use.

    Attributes:
        name: As the driver calls it.
        total_bytes: Its memory; None if NVML does not report it, because the GPU shares the host's memory.
        capability: CUDA compute capability, (major, minor).
    """

    name: str
    total_bytes: int | None
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The hardware and software that a process can use; ``dataclasses.asdict`` makes it ready for JSON.

    Attributes:
        gpus: The GPUs that torch can use, in torch's order.
        driver: Version of the NVIDIA driver; None without a driver.
        cpu_cores: Cores that this process may use.
        ram_bytes: Host memory that this process may use.
        system: Operating system and processor, for instance "Linux x86_64".
        versions: Version of Python and of each package in :data:`PACKAGES`.
        notes: Lines that a user should read, for instance why a GPU stays unused.
    """

    gpus: tuple[Gpu, ...]
    driver: str | None
    cpu_cores: int
    ram_bytes: int
    system: str
    versions: dict[str, str]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Summarise the machine in a few lines for the top of a notebook.

        Returns:
            Lines with the GPUs, the CPU, the versions, the ranks and the precision that follow from them, and notes.
        """
        lines = [f"GPU       {line}" for line in _gpu_lines(self)]
        lines.append(f"CPU       {self.cpu_cores} cores, {self.ram_bytes / GIB:.1f} GiB of memory, {self.system}")
        lines.append("versions  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        nprocs = default_nprocs(self)
        precision = {"bf16": "bf16", "fp16": "fp16 with loss scaling", "no": "fp32"}[mixed_precision(self)]
        lines.append(
            f"so        {nprocs} rank{'s' if nprocs > 1 else ''} over {backend_for(nprocs, self)}, {precision}"
        )
        return "\n".join(lines + [f"note      {note}" for note in self.notes])


def _gpu_lines(machine: Machine) -> list[str]:
    lines = []
    for gpu, count in Counter(machine.gpus).items():
        memory = "memory not reported by NVML" if gpu.total_bytes is None else f"{gpu.total_bytes / GIB:.1f} GiB"
        major, minor = gpu.capability
        lines.append(f"{count} x {gpu.name}, {memory}, compute capability {major}.{minor}, driver {machine.driver}")
    return lines or ["none"]


def describe_machine(nvml: Nvml | None = None) -> Machine:
    """Look at this machine and at the installed packages, without creating a CUDA context.

    Args:
        nvml: Where to ask about GPUs; None opens NVML.

    Returns:
        The GPUs, cores, memory and versions that a process on this machine can use.
    """
    import torch  # here, so that planning on a laptop does not import torch

    nvml = nvml or open_nvml()
    gpus, notes = _gpus_from_torch(nvml) if nvml.unavailable else _gpus_from_nvml(nvml, torch.version.cuda)
    return Machine(
        gpus=gpus,
        driver=nvml.driver,
        cpu_cores=_cpu_cores(),
        ram_bytes=_ram_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        notes=tuple(notes),
    )


def _gpus_from_nvml(nvml: Nvml, torch_cuda: str | None) -> tuple[tuple[Gpu, ...], list[str]]:
    devices = nvml.visible()
    readings = [nvml.first_reading(device) for device in devices]
    gpus = tuple(
        Gpu(device.name, reading.total if reading else None, device.capability)
        for device, reading in zip(devices, readings, strict=True)
    )
    hidden = len(nvml.installed_names())
    if not gpus:
        if nvml.notes or not hidden:
            return (), nvml.notes
        return (), [f"{hidden} GPU(s) installed, none visible: CUDA_VISIBLE_DEVICES hides them"]
    mismatch = cuda_mismatch(torch_cuda, nvml.cuda)
    if mismatch:
        return (), [f"{len(gpus)} GPU(s) stay unused ({gpus[0].name}): {mismatch}", *nvml.notes]
    if len({gpu.name for gpu in gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return gpus, [
            "GPUs of several models: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or torch and NVML number them apart",
            *nvml.notes,
        ]
    return gpus, nvml.notes


def _gpus_from_torch(nvml: Nvml) -> tuple[tuple[Gpu, ...], list[str]]:
    """Ask torch for GPUs if NVML is missing (AMD GPUs, some containers); this may create a CUDA context."""
    import torch

    if not torch.cuda.is_available():
        return (), [str(nvml.unavailable)]
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in properties)
    return gpus, [str(nvml.unavailable)]


def cuda_mismatch(torch_cuda: str | None, driver_cuda: tuple[int, int] | None) -> str | None:
    """Explain why this torch cannot use the GPUs of this driver, and how to fix it; None if it can.

    A driver runs every CUDA version up to its own, and newer minor versions of its own major one (NVIDIA, "CUDA
    Compatibility").

    Args:
        torch_cuda: ``torch.version.cuda``.
        driver_cuda: The newest CUDA version that the driver reports, (major, minor).
    """
    if torch_cuda is None:
        return "the installed torch is built without CUDA; install the CUDA build of torch"
    if driver_cuda is not None and int(torch_cuda.split(".")[0]) > driver_cuda[0]:
        supported = ".".join(map(str, driver_cuda))
        return f"torch is built for CUDA {torch_cuda}, the driver supports CUDA {supported}; update the NVIDIA driver"
    return None


def default_nprocs(machine: Machine) -> int:
    """Return one rank per GPU; without GPUs two ranks, the smallest number that communicates."""
    return len(machine.gpus) or 2


def backend_for(nprocs: int, machine: Machine) -> str:
    """Return ``"nccl"`` if every rank can have its own GPU, otherwise ``"gloo"``, which runs on the CPU."""
    if nprocs < 1:
        raise UserError(f"nprocs is {nprocs}; a job needs at least 1 rank")
    return "nccl" if nprocs <= len(machine.gpus) else "gloo"


def mixed_precision(machine: Machine) -> str:
    """Choose ``"bf16"``, ``"fp16"`` or ``"no"``, as the HF Trainer and accelerate name them.

    bf16 needs compute capability 8.0 (Ampere) on every GPU. fp16 needs loss scaling; without it small gradients become
    0 and large ones infinite.

    Args:
        machine: This machine, from :func:`describe_machine`.

    Returns:
        The precision of training; ``"no"`` is fp32, on the CPU.
    """
    if not machine.gpus:
        return "no"
    return "bf16" if all(gpu.capability >= (8, 0) for gpu in machine.gpus) else "fp16"


# accelerate's own test is `"RTX 40" in name`, which is also true of the professional RTX 4000.
NO_PEER_TO_PEER = re.compile(r"GeForce RTX [34]0|RTX 40")


def nccl_environment(gpu_names: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that NCCL needs on a machine with these GPUs.

    Consumer GPUs of the RTX 30 and 40 series have no peer-to-peer over PCIe; with older drivers NCCL tries it and
    hangs. accelerate 1.15 refuses to start if two or more GPUs are installed, one of them an "RTX 40", the driver is
    older than 550.40.07, and either variable is not set.

    Args:
        gpu_names: Names of all installed GPUs, visible or not.

    Returns:
        Value of each variable; empty if NCCL needs none.
    """
    affected = len(gpu_names) > 1 and any(NO_PEER_TO_PEER.search(name) for name in gpu_names)
    return {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"} if affected else {}


def apply_nccl_environment(nvml: Nvml | None = None, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Set what :func:`nccl_environment` returns for this machine; variables that are set already stay.

    Call it before NCCL starts.

    Args:
        nvml: Where to ask for the installed GPUs; None opens NVML.
        environ: The variables to change; None means ``os.environ``.

    Returns:
        A line that tells the user what was set; None if there was nothing to set.
    """
    # Not a default argument: `datasets.map` with several processes replaces the object os.environ.
    environ = os.environ if environ is None else environ
    names = (nvml or open_nvml()).installed_names()
    missing = {name: value for name, value in nccl_environment(names).items() if name not in environ}
    if not missing:
        return None
    environ.update(missing)
    affected = next(name for name in names if NO_PEER_TO_PEER.search(name))
    settings = " ".join(f"{name}={value}" for name, value in missing.items())
    return (
        f"{affected}: set {settings}, since such GPUs have no peer-to-peer over PCIe "
        f"(with an NVLink bridge between them, set NCCL_P2P_DISABLE=0 yourself)"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_cores() -> int:
    """Count the cores that this process may use, given its CPU affinity and a container's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return min(available, max(1, int(quota) // int(period))) if quota.isdigit() else available


def _ram_bytes() -> int:
    """Return the host memory that this process may use: the machine's, or a container's lower limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max")
    return min(physical, int(limit)) if limit.isdigit() else physical


def _cgroup(name: str) -> str:
    """Read a limit of the container (control groups, version 2); "max" or empty without one."""
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        return ""
