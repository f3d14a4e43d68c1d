"""Two things to settle before DeepSpeed starts; both only save memory and time."""

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
