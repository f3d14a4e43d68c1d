"""When the memory peaks: the moments of a step, what each holds, and the largest of them.

Peaks of different moments do not add up. DeepSpeed allocates ZeRO-2's buckets at the first gradient, and by then the
logits are gone; gradients exist only when their activations are freed. So each moment is summed on its own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.memory.predict import constants
from helpers.memory.predict.activations import (
    ATTENTION_INPUTS,
    FP32,
    Saved,
    casts_weights,
    checkpoints,
    kept,
    kept_until_attention_adapters,
    layer,
    total,
)
from helpers.memory.predict.shapes import Configuration
from helpers.memory.predict.states import States, states

ITEMS = (
    "parameters",
    "gradients",
    "optimizer states",
    "buffers",
    "activations",
    "logits and loss",
    "communication buffers",
    "CUDA context",
    "NCCL",
    "allocator rounding",
)
# Items that are tensors: what torch.cuda.max_memory_allocated counts.
TENSORS = ITEMS[:7]
LOSS = "end of forward, loss"
LOSS_BACKWARD = "backward of the loss"
OUTPUT_BACKWARD = "backward of the output layer"
LAST_LAYER = "backward of the last layer"
FIRST_GRADIENT = "first gradient"
FIRST_LAYER = "backward of the first layer"
EMBEDDING = "backward of the embedding"
STEP = "optimizer step"


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
    moments = {name: Counter(held) + Counter(fixed) for name, held in _moments(configuration).items()}
    totals = {name: sum(held.values()) for name, held in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    items = {name: moments[peak][name] for name in ITEMS}
    return Prediction(MappingProxyType(items), peak, MappingProxyType(totals))


def _moments(c: Configuration) -> dict[str, Counter[str]]:
    """The tensors alive at each moment of a step."""
    owned = states(c)
    gathered = _gathered(c, owned)
    resident = Counter({**owned.resident, "buffers": _buffers(c)})
    saved = kept(c)
    forward = resident + gathered
    forward["activations"] += total(saved)
    forward["parameters"] += total(saved, weights=True)
    if c.accumulation > 1:  # those of the micro-batches before
        forward["gradients"] += owned.gradients
    backward = Counter({"communication buffers": owned.buckets})
    logits = c.tokens * c.shape.vocab
    # Loss: 16-bit logits, their fp32 copy, log-softmax (ForCausalLMLoss). An fp32 model needs no copy.
    loss = logits * (FP32 + FP32 + (c.compute_bytes if c.compute_bytes < FP32 else 0))
    moments = {
        LOSS: forward + Counter({"logits and loss": loss, "parameters": _cached_casts(c, saved)}),
        # Kept log-softmax, nll_loss's gradient and log-softmax's, all fp32; the logits themselves are freed.
        LOSS_BACKWARD: forward + Counter({"logits and loss": 3 * FP32 * logits}),
        OUTPUT_BACKWARD: forward + Counter({"logits and loss": logits * c.compute_bytes}) + _output_layer(c, owned),
    }
    before = Counter() if c.accumulation == 1 else Counter({"gradients": owned.gradients})
    # DeepSpeed makes its buckets at the first gradient: the output layer's, or an adapter's within the last layer.
    late = c.lora is not None and set(c.lora.targets) <= set(ATTENTION_INPUTS)
    last = resident + gathered + before + _gradients(c, owned, _after_output(c))
    last += Counter() if late else backward
    last["activations"] += total(saved) + _layer_backward(c)
    last["parameters"] += total(saved, weights=True)
    first = resident + gathered + backward + before + _gradients(c, owned, _before_first(c))
    first["activations"] += _layer_backward(c)
    if c.checkpointing:
        recomputed = Counter({"activations": total(layer(c)), "parameters": total(layer(c), weights=True)})
        last += recomputed
        first += recomputed
        first["activations"] += total(checkpoints(c)) // c.shape.layers
    else:
        first["activations"] += total(layer(c))
        first["parameters"] += total(layer(c), weights=True)
    moments |= {LAST_LAYER: last, FIRST_LAYER: first}
    if late:
        gradient = resident + gathered + backward + before
        freed = 0 if c.checkpointing else total(layer(c))
        gradient["activations"] += (
            total(saved) - freed + total(kept_until_attention_adapters(c)) + _attention_backward(c)
        )
        moments[FIRST_GRADIENT] = gradient
    if c.lora is None:
        stream = Counter({"activations": c.tokens * c.shape.hidden * c.stream_bytes})
        moments[EMBEDDING] = resident + gathered + backward + stream + Counter({"gradients": owned.gradients})
    moments[STEP] = resident + Counter({"gradients": owned.gradients + owned.step})
    return moments


def _buffers(c: Configuration) -> int:
    """cuBLAS's workspace and the rotary frequencies (two copies, head_dim / 4 of them)."""
    return constants.CUBLAS_WORKSPACE + 2 * FP32 * (c.shape.head_dim // 4)


def _gathered(c: Configuration, owned: States) -> Counter[str]:
    return Counter({"communication buffers": owned.gathered})


def _cached_casts(c: Configuration, saved: list[Saved]) -> int:
    """Autocast remembers its casts of weights until forward ends, though checkpointing does not keep them."""
    if not casts_weights(c) or not c.checkpointing:
        return 0
    return (c.shape.layers * c.shape.layer_matrices) * c.compute_bytes


def _gradients(c: Configuration, owned: States, done: int) -> Counter[str]:
    """Gradients of the ``done`` parameters that backward has passed, at most what the strategy keeps of them."""
    if c.accumulation > 1 or not owned.gradients:  # they are there already
        return Counter()
    # DeepSpeed's stage 2 makes room for its whole part at the first reduction.
    whole = c.strategy.stage == 2 and done > 0
    return Counter({"gradients": owned.gradients if whole else min(owned.gradients, done * c.trained_bytes)})


def _after_output(c: Configuration) -> int:
    return c.shape.embedding if c.lora is None else 0


def _before_first(c: Configuration) -> int:
    """Parameters whose gradients are there in the first layer's MLP: all but its own and the embedding's."""
    if c.lora:
        return c.trained
    first = c.shape.layer_parameters - c.shape.hidden * c.shape.intermediate
    return c.trained - first - (0 if c.shape.tied else c.shape.embedding)


def _output_layer(c: Configuration, owned: States) -> Counter[str]:
    """The output layer's gradient as it is made: autocast computes it in 16 bit, then casts."""
    if c.lora is not None:
        return Counter()
    size = c.trained_bytes + (c.compute_bytes if casts_weights(c) else 0)
    return Counter({"gradients": c.shape.embedding * size})


def _layer_backward(c: Configuration) -> int:
    """Gradients in flight within a layer, beside what it kept: the larger of its MLP's and its norm's.

    MLP: that of down_proj's input, and those of both factors of SwiGLU; a kept down_proj input is freed by then.
    Norm: the factors of x · 1/rms and of its square, five in fp32. Both: the residual stream's.
    """
    narrow = c.tokens * c.shape.intermediate * c.compute_bytes
    mlp = (2 if c.lora is None or c.strategy.stage == 3 else 3) * narrow
    norm = 5 * c.tokens * c.shape.hidden * FP32
    quantised = 0
    if c.base_bits < 16:  # bitsandbytes makes the matrix whole in 16 bit for the product
        quantised = 2 * c.shape.hidden * c.shape.intermediate * c.compute_bytes
    return max(mlp, norm) + c.tokens * c.shape.hidden * c.stream_bytes + quantised


def _attention_backward(c: Configuration) -> int:
    """Gradients in flight at the adapters of q, k and v: those of q, k, v, of their input, and of the stream."""
    shape = c.shape
    widths = (shape.query + 2 * shape.key_value + shape.hidden) * c.compute_bytes
    return c.tokens * (widths + shape.hidden * c.stream_bytes)


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
