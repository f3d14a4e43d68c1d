"""Work around what DeepSpeed does by default when it starts; nothing here imports it before that."""

import logging

import torch
import torch.distributed as dist


def skip_cpu_collectives() -> None:
    """Leave collectives on the CPU to gloo.

    Otherwise DeepSpeed compiles its own, through shared memory, at its first start: a minute or two, if the machine has
    a compiler at all.
    """
    import deepspeed.ops  # here, because its import already looks for a GPU

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def share_world_group() -> None:
    """Let DeepSpeed reduce over torch's world group instead of a copy of it.

    With NCCL the copy is a second communicator with its own buffers, which take many times what ZeRO-2 can save for a
    LoRA adapter. DeepSpeed made the copy because torch once could not translate the ranks of its world group.
    """
    from deepspeed.utils import groups

    groups._clone_world_group = lambda: dist.group.WORLD


def use_cpu_accelerator() -> None:
    """Make DeepSpeed use the CPU, even if it found a GPU when it was imported."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    set_accelerator(CPU_Accelerator())


def configure_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed use this rank's device and process group, and log only errors.

    Call it before ``deepspeed.initialize``, in an initialised process group. It also calls ``skip_cpu_collectives`` and
    ``share_world_group``.

    Args:
        device: This rank's device.
    """
    skip_cpu_collectives()
    share_world_group()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        use_cpu_accelerator()
    # Without this, zero.Init reads its configuration before it knows the number of ranks.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
