"""The prediction: the moment of a step at which most is there, and what is there then, outside torch included."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.memory.categories import ITEMS
from helpers.memory.predict import constants
from helpers.memory.predict.activations import FP32, kept, layer, total
from helpers.memory.predict.shapes import Configuration
from helpers.memory.predict.step import Step

# Items that are tensors: what torch.cuda.max_memory_allocated counts.
TENSORS = ITEMS[:7]


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU. ``items`` is what is there at the ``peak`` moment; ``moments`` the total of each moment.

    "parameters" includes the 16-bit copies of weights that autocast makes; "buffers" is cuBLAS's workspace and the
    rotary frequencies.
    """

    items: Mapping[str, int]
    peak: str
    moments: Mapping[str, int]

    @property
    def total(self) -> int:
        """What NVML shows at the peak."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """What torch's allocator has handed out at the peak (``torch.cuda.max_memory_allocated``)."""
        return sum(self.items[name] for name in TENSORS)

    @property
    def reserved(self) -> int:
        """What torch's allocator holds of the GPU (``torch.cuda.max_memory_reserved``)."""
        return self.allocated + self.items["allocator rounding"]


def predict(configuration: Configuration) -> Prediction:
    """What the configuration needs on each GPU, from the second step on (the first has no optimizer states yet)."""
    fixed = _outside_torch(configuration) | {"allocator rounding": _rounding(configuration)}
    moments = {name: Counter(held) + Counter(fixed) for name, held in Step(configuration).moments().items()}
    totals = {name: sum(held.values()) for name, held in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    items = {name: moments[peak][name] for name in ITEMS}
    return Prediction(MappingProxyType(items), peak, MappingProxyType(totals))


def _outside_torch(c: Configuration) -> dict[str, int]:
    """What no torch counter shows."""
    communicators = constants.ZERO_3_COMMUNICATORS if c.strategy.stage == 3 else 1
    nccl = constants.NCCL_SEVERAL_RANKS if c.strategy.ranks > 1 else constants.NCCL_ONE_RANK
    return {
        "CUDA context": constants.CUDA_CONTEXT,
        "NCCL": 0 if c.strategy.kind == "single" else communicators * nccl,
    }


def _rounding(c: Configuration) -> int:
    """What torch's caching allocator holds beyond the tensors.

    Rows of one length: each kept tensor's share of its segment, and the segment of the 16-bit logits, which is free
    when the loss asks for fp32 ones but too small for them. Rows of different lengths: the measured share of the
    activations, which includes both.
    """
    saved = [*kept(c), *(layer(c) if c.checkpointing else [])]
    if c.padded:
        return int(constants.FRAGMENTED_SHARE_OF_ACTIVATIONS * total(saved))
    logits = c.tokens * c.shape.vocab * c.compute_bytes if c.compute_bytes < FP32 else 0
    return logits + sum(max(0, tensor.count) * (_segment_share(tensor.size) - tensor.size) for tensor in saved)


def _segment_share(size: int) -> int:
    """Bytes of the segment that a tensor of ``size`` bytes uses up (CUDACachingAllocator.cpp, get_allocation_size)."""
    size = -(-size // constants.BLOCK) * constants.BLOCK
    if size <= constants.SMALL:
        return size
    if size < constants.LARGE:
        return constants.LARGE_BUFFER // (constants.LARGE_BUFFER // size)
    return -(-size // constants.ROUND_LARGE) * constants.ROUND_LARGE
