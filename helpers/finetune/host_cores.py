"""Give each rank its share of the CPU's cores if the optimizer runs on the CPU."""

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch

from helpers.finetune.extensions import needed_extensions
from helpers.finetune.ranks import Ranks
from helpers.finetune.recorder import gather_objects


def share_of(cores: list[int], place: int, ranks: int) -> list[int]:
    """Return the cores of one of the ranks on a host.

    Args:
        cores: Those that all of them may use, sorted: neighbours share their memory.
        place: The rank's place among them.
        ranks: How many there are.

    Returns:
        As many cores for each rank; all of them if there are fewer than ranks.
    """
    count = len(cores) // ranks
    return cores[place * count : (place + 1) * count] or cores


def use_own_cores(deepspeed: Mapping[str, Any] | None, ranks: Ranks) -> list[str]:
    """Restrict this rank to its share of the cores, with a thread on each, if DeepSpeed's Adam runs on the CPU.

    torchrun gives a rank one thread, on which Adam would take most of a step. A rank's threads then are close to its
    part of the host's memory, too. A launcher that has divided the cores already is left alone. Every rank has to call
    it, when the process group exists.

    Args:
        deepspeed: Contents of the DeepSpeed file; None without one.
        ranks: This process's place.

    Returns:
        A line to print; empty if the cores stay as they are.
    """
    if "cpu_adam" not in needed_extensions(dict(deepspeed or {})) or not hasattr(os, "sched_setaffinity"):
        return []
    cores, host = sorted(os.sched_getaffinity(0)), socket.gethostname()
    if all(other == cores for name, other in gather_objects((host, cores)) if name == host):
        cores = share_of(cores, ranks.local_rank, ranks.local_world_size)
        os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))  # for the threads of DeepSpeed's extension, loaded later
    torch.set_num_threads(len(cores))
    return [f"Adam runs on the CPU: {len(cores)} cores and threads for each rank"]
