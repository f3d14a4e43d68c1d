"""Know what a machine's libraries take of a GPU: constants of H100s, or what the calibration measured here.

``python -m helpers.finetune.calibrate`` measures them in ten seconds and writes them to the user's cache, by host and
GPU model. The commands that predict use them from then on; ``predict`` itself does so only if it is asked to, so that
its answers are the same everywhere.
"""

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from helpers.files import atomic_write
from helpers.memory.nvml import open_nvml
from helpers.memory.predict import constants


@dataclass(frozen=True)
class MachineConstants:
    """Bytes of a GPU's memory that no formula gives; the defaults are those of H100s (constants.py).

    Attributes:
        cuda_context: The CUDA context, with the libraries and kernels that training loads.
        nccl_one_rank: A communicator of one rank.
        nccl_several_ranks: A communicator of several ranks.
        cublas_workspace: Of each thread that multiplies matrices; counted by torch.
    """

    cuda_context: int = constants.CUDA_CONTEXT
    nccl_one_rank: int = constants.NCCL_ONE_RANK
    nccl_several_ranks: int = constants.NCCL_SEVERAL_RANKS
    cublas_workspace: int = constants.CUBLAS_WORKSPACE


def cache_file() -> Path:
    """Return the file of the calibrations, in the user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "multi-gpu-training-course" / "gpu_memory.json"


def machine_name() -> str | None:
    """Name this machine by its host and its first GPU; None without a GPU."""
    devices = open_nvml().visible()
    return f"{platform.node()}: {devices[0].name}" if devices else None


def calibrated() -> MachineConstants:
    """Return what the calibration measured on this machine, or the constants of H100s if there was none."""
    found = _read().get(machine_name() or "")
    try:
        return MachineConstants(**found) if found else MachineConstants()
    except TypeError:  # written by another version
        return MachineConstants()


def store(name: str, measured: MachineConstants) -> Path:
    """Add a machine's calibration to those of others; return the file."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _read() | {name: dataclasses.asdict(measured)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _read() -> dict[str, dict[str, int]]:
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
