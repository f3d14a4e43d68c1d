"""Predict peak memory: the phase of a step that needs most, and what it holds, including memory outside torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.memory.categories import ITEMS, OUTSIDE_TORCH
from helpers.memory.predict import constants
from helpers.memory.predict.allocator_allowance import allowance_bytes
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.step import Step

# Items that are tensors: what torch.cuda.max_memory_allocated counts.
TENSORS = ITEMS[:7]
# What ranks without a GPU do not have.
GPU_ONLY = (*OUTSIDE_TORCH, "allocator allowance", "buffers")


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes on one GPU.

    Attributes:
        items: Bytes per item of :data:`~helpers.memory.categories.ITEMS` at the peak. "parameters" includes the 16-bit
            copies of weights that autocast makes; "buffers" is cuBLAS's workspaces and the rotary frequencies.
            "allocator allowance" is what torch's allocator may hold beyond the tensors. With its default setting that
            is fragmentation, much of which is measured and not derived; a run may need less of it.
        peak_phase: The phase of a step at which most is held.
        phases: Total bytes at each phase.
    """

    items: Mapping[str, int]
    peak_phase: str
    phases: Mapping[str, int]

    @property
    def total(self) -> int:
        """What NVML shows at the peak."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """Bytes that torch's allocator has handed out at the peak (``torch.cuda.max_memory_allocated``)."""
        return sum(self.items[name] for name in TENSORS)

    @property
    def reserved(self) -> int:
        """Bytes that torch's allocator holds of the GPU (``torch.cuda.max_memory_reserved``)."""
        return self.allocated + self.items["allocator allowance"]

    def items_on(self, backend: str) -> dict[str, int]:
        """Return the items that can be compared with a run, which may have been on a CPU.

        Args:
            backend: Of the run's ranks: "nccl" if they had GPUs, else "gloo".

        Returns:
            Bytes by item; without GPUs, those of :data:`GPU_ONLY` are left out.
        """
        return {name: size for name, size in self.items.items() if backend == "nccl" or name not in GPU_ONLY}


def predict(configuration: Configuration, reserved: int | None = None) -> Prediction:
    """Predict the memory of one GPU, from the second step on (the first has no optimizer states yet).

    Args:
        configuration: The job.
        reserved: Bytes that the allocator holds at its peak, if traced.py simulated it; None takes a formula.

    Returns:
        The bytes at the peak by item, and the total of every phase.
    """
    step = Step(configuration)
    tensors = step.phases()
    sizes = {name: sum(held.values()) for name, held in tensors.items()}
    peak_phase = max(sizes, key=lambda name: sizes[name])
    allowance = allowance_bytes(step, sizes) if reserved is None else reserved - sizes[peak_phase]
    outside = Counter(_outside_torch(configuration) | {"allocator allowance": allowance})
    held = tensors[peak_phase] + outside
    totals = {name: size + sum(outside.values()) for name, size in sizes.items()}
    items = MappingProxyType({name: held[name] for name in ITEMS})
    return Prediction(items, peak_phase, MappingProxyType(totals))


def _outside_torch(configuration: Configuration) -> dict[str, int]:
    """Count what no counter of torch shows: measured constants."""
    strategy, machine = configuration.strategy, configuration.machine
    if strategy.kind == "single":
        nccl = 0
    elif strategy.world_size > 1:
        nccl = constants.NCCL_SMALL_BUFFERS if configuration.small_nccl_buffers else machine.nccl_several_ranks
    else:
        nccl = machine.nccl_one_rank
    return {"CUDA context": machine.cuda_context, "NCCL": nccl}
