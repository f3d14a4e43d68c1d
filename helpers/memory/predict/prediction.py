"""The prediction: the moment of a step at which most is there, and what is there then, outside torch included."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.memory.categories import ITEMS
from helpers.memory.predict import constants
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.saved_tensors import FP32, saved_by_layer, saved_by_model, total_bytes
from helpers.memory.predict.states import states
from helpers.memory.predict.step import LOSS_BACKWARD, Step

# Items that are tensors: what torch.cuda.max_memory_allocated counts.
TENSORS = ITEMS[:7]


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU. ``items`` is what is there at the ``peak_phase``; ``phases`` the total of each phase.

    "parameters" includes the 16-bit copies of weights that autocast makes; "buffers" is cuBLAS's workspaces and the
    rotary frequencies. "allocator rounding" is all that torch's allocator holds beside the tensors; with its default
    setting that is fragmentation, of which much is measured and not derived.
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
        """What torch's allocator has handed out at the peak (``torch.cuda.max_memory_allocated``)."""
        return sum(self.items[name] for name in TENSORS)

    @property
    def reserved(self) -> int:
        """What torch's allocator holds of the GPU (``torch.cuda.max_memory_reserved``)."""
        return self.allocated + self.items["allocator rounding"]


def predict(configuration: Configuration) -> Prediction:
    """What the configuration needs on each GPU, from the second step on (the first has no optimizer states yet)."""
    tensors = Step(configuration).phases()
    sizes = {name: sum(held.values()) for name, held in tensors.items()}
    peak_phase = max(sizes, key=lambda name: sizes[name])
    outside = Counter(_outside_torch(configuration) | {"allocator rounding": _rounding(configuration, sizes)})
    held = tensors[peak_phase] + outside
    totals = {name: size + sum(outside.values()) for name, size in sizes.items()}
    items = MappingProxyType({name: held[name] for name in ITEMS})
    return Prediction(items, peak_phase, MappingProxyType(totals))


def _outside_torch(c: Configuration) -> dict[str, int]:
    """What no torch counter shows."""
    strategy = c.strategy
    if strategy.kind == "single":
        nccl = 0
    elif strategy.world_size > 1:
        nccl = strategy.communicators * constants.NCCL_SEVERAL_RANKS
    else:
        nccl = constants.NCCL_ONE_RANK + (strategy.communicators - 1) * constants.NCCL_ONE_RANK_FURTHER
    return {"CUDA context": constants.CUDA_CONTEXT, "NCCL": nccl}


def _rounding(c: Configuration, sizes: Mapping[str, int]) -> int:
    """What torch's caching allocator holds beyond the tensors; ``sizes`` is that of the tensors at each moment.

    Expandable segments grow by a page at their end, one for each pool (``map_block`` in CUDACachingAllocator.h):
    the tensors rounded up, and a page of the small pool. A hole stays, too, where every later tensor is larger than it:
    the block of the 16-bit logits when the loss asks for fp32 ones, or what flattening left; not both, for what the
    one leaves the other can use. That these are the holes was concluded from runs in notebooks/results/prediction.json;
    of three configurations that were added later, two are within 3 %, and one is 8 % lower than this says.

    The default allocator, moreover, cannot join free blocks of different segments. Derived here are only the causes
    that are clear; the rest depends on the order of every allocation. In those runs it is good to 11 %.
    """
    if c.expandable_segments:
        holes = max(_logits_block(c), _left_by_flattening(c))
        return -max(sizes.values()) % constants.LARGE_BUFFER + constants.SMALL_BUFFER + holes
    return _fragmented(c) + _left_by_flattening(c) + _beside_buckets(c, sizes)


def _logits_block(c: Configuration) -> int:
    """The 16-bit logits' block: free when the loss asks for fp32 ones, but too small for them."""
    tokens = min(c.tokens, c.loss_chunk or c.tokens)
    return tokens * c.shape.vocab * c.compute_bytes if c.compute_bytes < FP32 else 0


def _fragmented(c: Configuration) -> int:
    """What activations and logits leave.

    Rows of one length: each kept tensor's share of its segment, and the block of the 16-bit logits. Rows of different
    lengths: the measured share of the activations, which includes both.
    """
    saved = [*saved_by_model(c), *(saved_by_layer(c) if c.checkpointing else [])]
    if c.padded:
        return int(constants.FRAGMENTED_SHARE_OF_ACTIVATIONS * total_bytes(saved))
    return _logits_block(c) + sum(
        max(0, tensor.count) * (_segment_share(tensor.size) - tensor.size) for tensor in saved
    )


def _left_by_flattening(c: Configuration) -> int:
    """Free segments that DeepSpeed's flat tensors cannot use, as no single one is large enough.

    First, the trained parameters as the model was built with them: DeepSpeed makes its flat ones beside them where the
    card has room (``flatten_on_accelerator``, stage_1_and_2.py), ZeRO-3 those of this rank. Second, the flat gradients
    of this rank once more. That these are the two is inferred: ZeRO-1 and -2 held 4.00 bytes for each parameter
    beside their tensors (notebooks/results/prediction.json), with buckets of 1 GB 6.00.
    """
    if not c.strategy.zero_stage:
        return 0
    held = states(c)
    part = -(-c.trainable_parameters // (c.strategy.world_size if c.strategy.zero_stage == 3 else 1))
    return part * c.trainable_bytes + max(held.gradients, held.resident.get("gradients", 0))


def _beside_buckets(c: Configuration, sizes: Mapping[str, int]) -> int:
    """What backward of the loss held when DeepSpeed's buckets come, each larger than any fp32 copy of the logits."""
    buckets = states(c).buckets
    if c.padded or not buckets or c.strategy.reduce_bucket_size * c.trainable_bytes <= c.tokens * c.shape.vocab * FP32:
        return 0
    return max(0, sizes[LOSS_BACKWARD] + buckets - max(sizes.values()))


def _segment_share(size: int) -> int:
    """Bytes of the segment that a tensor of ``size`` bytes uses up (CUDACachingAllocator.cpp, get_allocation_size)."""
    size = -(-size // constants.BLOCK) * constants.BLOCK
    if size <= constants.SMALL:
        return size
    if size < constants.LARGE:
        return constants.LARGE_BUFFER // (constants.LARGE_BUFFER // size)
    return -(-size // constants.ROUND_LARGE) * constants.ROUND_LARGE
