"""Simulate the allocator on a step's own allocations, because no formula gives what it holds beyond the tensors.

The real model, and under ZeRO the real DeepSpeed, run under FakeTensorMode, which computes shapes only, with the
operators that CUDA would use. allocations.py gives every storage to
:class:`~helpers.memory.allocator.SimulatedAllocator`. No GPU and no weights are needed, but torch and some seconds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.libraries.quiet import name_deepspeed_accelerator
from helpers.memory.predict.allocations import Allocations
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.fake_job import autocast, fake_batch, fake_model, fake_tensors, step_lengths

ADAM_STATES = 2


@dataclass(frozen=True)
class Trace:
    """The most that a simulated allocator held on one GPU.

    Attributes:
        allocated: Bytes of tensors (``torch.cuda.max_memory_allocated``).
        reserved: Bytes of the GPU (``torch.cuda.max_memory_reserved``).
    """

    allocated: int
    reserved: int


def trace(configuration: Configuration) -> Trace:
    """Run some steps of a job on fake tensors.

    Args:
        configuration: A job in one process, under DDP or under ZeRO, neither compiled nor quantised.

    Returns:
        What the allocator held.

    Raises:
        UserError: The configuration is another one.
    """
    c = configuration
    if reason := _beyond_operators(c):
        raise UserError(f"{reason}, which the model's operators do not show: the formula is better; leave --trace out")
    if c.strategy.zero_stage:
        name_deepspeed_accelerator()
        from helpers.memory.predict.traced_zero import trace_zero  # imports DeepSpeed, which takes seconds

        allocations = trace_zero(c)
    else:
        allocations = _trace_whole(c)
    return Trace(allocations.allocated, allocations.reserved)


def _beyond_operators(c: Configuration) -> str:
    """Name what allocates GPU memory besides the operators that a trace sees; empty if nothing does."""
    reasons = {
        "the compiler decides what compiled layers make": c.compiled,
        "quantised matrices are multiplied by kernels of their own": c.quantized,
        "adapters that share a dropout keep less": c.shared_dropout,
        "layers' inputs come back from host memory on another stream": c.offloaded_checkpoints,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _trace_whole(c: Configuration) -> Allocations:
    """Trace a job whose ranks hold the whole model: one process, or DDP with its buckets as one (states.py)."""
    allocations = Allocations(c.expandable_segments, "cpu", c.machine.cublas_workspace)
    with fake_tensors(), allocations:
        model = fake_model(c, "cpu", allocations)
        trained = [p for p in model.parameters() if p.requires_grad]
        bucket_elements = sum(p.numel() for p in trained) if c.strategy.kind == "ddp" else 0
        buckets = torch.empty(bucket_elements, dtype=trained[0].dtype)
        states: list[Tensor] = []
        for step, length in enumerate(step_lengths(c)):
            replaced = buckets  # DDP's first ones stay until the gradients of the second step
            if step == 1:
                buckets = torch.empty_like(buckets)
            for _ in range(c.gradient_accumulation_steps):
                inputs = fake_batch(c, length)
                with autocast(c):
                    loss = model(**inputs).loss
                loss.backward()
                del loss, inputs
            del replaced
            states = states or [torch.empty_like(p) for p in trained for _ in range(ADAM_STATES)]
            for parameter in trained:
                parameter.grad = None
    return allocations
