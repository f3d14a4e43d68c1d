"""What to settle before DeepSpeed starts."""

import logging

import torch
import torch.distributed as dist


def skip_cpu_collectives() -> None:
    """Leave collectives on the CPU to gloo.

    DeepSpeed otherwise compiles shared-memory ones at its first start: a minute or two, and a compiler must be there.
    """
    import deepspeed.ops  # looks for its accelerator when it is imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def share_world_group() -> None:
    """Let DeepSpeed reduce over torch's own world group instead of a copy of it.

    Over NCCL a copy is a second communicator with buffers of its own, many times what ZeRO-2 can save of a LoRA
    adapter. The copy dates from when torch could not translate ranks of its world group; now it can.
    """
    from deepspeed.utils import groups

    groups._clone_world_group = lambda: dist.group.WORLD


def configure_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed work where this rank does, and log nothing but errors; before ``deepspeed.initialize``.

    It takes a GPU wherever there is one, also for ranks that run on the CPU because there are more of them than GPUs.
    Both functions above are called, too, and DeepSpeed gets the process group that exists: ``zero.Init`` would read its
    configuration before it knows how many ranks there are.
    """
    skip_cpu_collectives()
    share_world_group()
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
