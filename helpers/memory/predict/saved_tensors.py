"""What autograd keeps of a forward pass of ``GlmForCausalLM``: each saved tensor by name, in bytes.

Read off transformers' models/glm/modeling_glm.py, integrations/sdpa_attention.py and loss/loss_utils.py, PEFT's
tuners/lora/layer.py, and torch's tools/autograd/derivatives.yaml; tests/test_predict.py counts the same in runs.

A frozen matrix does not need its input, so under LoRA most of what full training keeps is not kept. What autograd
keeps anyway: RMSNorm's input in fp32, SwiGLU's two halves and its SiLU, and q, k, v and the output of the attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from helpers.activations import CHECKPOINT_BYTES_IN_FLIGHT
from helpers.memory.predict.configuration import Configuration

FP32 = 4
INT64 = 8
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class SavedTensor:
    """One kind of tensor: ``count`` of them of ``size`` bytes each. ``weight`` marks 16-bit copies of weights."""

    name: str
    size: int
    count: int = 1
    weight: bool = False

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.size * self.count


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def casts_weights(configuration: Configuration) -> bool:
    """Whether autocast makes a 16-bit copy of every matrix: it does where the weights are in fp32."""
    return configuration.residual_bytes != configuration.compute_bytes


def attention_kernel(configuration: Configuration) -> str:
    """Which of SDPA's kernels runs on CUDA: "flash", "efficient" or "math".

    Flash takes neither a mask of the padding nor fp32. Without a mask transformers leaves the repetition of keys and
    values to SDPA (``use_gqa_in_sdpa``), which of the fp32 kernels only math can do
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.11 to 2.13). In 16 bit Hopper's cuDNN kernel may take
    the place of either fused one and keeps the same tensors.
    """
    if configuration.masked:
        return "efficient"
    if configuration.compute_bytes == 2:
        return "flash"
    return "math" if configuration.shape.heads > configuration.shape.kv_groups else "efficient"


def _keeps_inputs(configuration: Configuration) -> bool:
    # deepspeed/runtime/zero/linear.py saves its input even for a frozen weight (memory_efficient_linear, the default).
    return configuration.lora is None or configuration.strategy.zero_stage == 3


def _normed(configuration: Configuration, consumers: int) -> Iterator[SavedTensor]:
    """An RMSNorm and its output as ``consumers`` matrices keep it."""
    c, tokens, hidden = configuration, configuration.tokens, configuration.shape.hidden
    yield SavedTensor("norm input, fp32", tokens * hidden * FP32)
    yield SavedTensor("norm 1/rms", tokens * FP32)
    if c.lora is None:
        yield SavedTensor("normed, before its weight", tokens * hidden * c.residual_bytes)
    if _keeps_inputs(c):
        # Autocast casts anew for each matrix; it remembers casts of weights only.
        copies = consumers if casts_weights(c) else 1
        yield SavedTensor("matrix input", tokens * hidden * c.compute_bytes, copies)


def _adapter(configuration: Configuration, target: str) -> Iterator[SavedTensor]:
    """What LoRA on one target keeps: the dropout's mask, the adapter's input, and the narrow product."""
    c = configuration
    assert c.lora is not None
    rows, columns = c.shape.linears[target]
    # PEFT casts the input to the adapter's type; autocast then casts it back for the product.
    size = c.compute_bytes if c.precision == "autocast" else c.trainable_bytes
    cast = size != c.compute_bytes or c.precision == "autocast"
    if c.lora.dropout:
        yield SavedTensor("LoRA dropout mask", c.tokens * columns)
    shared = not c.lora.dropout and not cast and _keeps_inputs(c)
    if not shared:
        yield SavedTensor("LoRA input", c.tokens * columns * size)
    yield SavedTensor("LoRA narrow product", c.tokens * c.lora.r * size)
    if size != c.trainable_bytes:
        yield SavedTensor("LoRA weights, 16 bit", (rows + columns) * c.lora.r * size, weight=True)


def _attention(configuration: Configuration) -> Iterator[SavedTensor]:
    c, shape = configuration, configuration.shape
    kernel = attention_kernel(c)
    wide, narrow = c.tokens * shape.query * c.compute_bytes, c.tokens * shape.key_value * c.compute_bytes
    # Half of each head is rotated; cosine and sine are stretched to that width for every layer anew.
    yield SavedTensor("rotary cosine and sine", c.sequence_length * (shape.head_dim // 2) * c.residual_bytes, 2)
    if kernel == "math":
        yield SavedTensor("scaled q, scaled k, v", wide, 3)
        yield SavedTensor("attention weights", c.micro_batch_size * shape.heads * c.sequence_length**2 * FP32)
        if _keeps_inputs(c):
            yield SavedTensor("attention output", wide)
        return
    yield SavedTensor("q", wide)
    # With a mask, keys and values are repeated for every head.
    yield SavedTensor("k, v", narrow if kernel == "flash" else wide, 2)
    yield SavedTensor("attention output", wide)
    if c.compute_bytes == 2 and _keeps_inputs(c):
        # Flash lays its output out as q, heads first, and o_proj gets a copy that it can flatten. With a mask Hopper
        # prefers cuDNN (check_prefer_cudnn_attention, sdp_utils.cpp). That it does the same is inferred: with the copy
        # finetune_6b.json's ZeRO-3 run is matched to 0.1 %, without it to 1 %.
        yield SavedTensor("o_proj input", wide)
    padded_length = c.sequence_length if kernel == "flash" else _round_up(c.sequence_length, 32)
    yield SavedTensor("attention log-sum-exp", c.micro_batch_size * shape.heads * padded_length * FP32)
    if c.masked:
        # A float mask, made by every layer, its rows padded to 16 (preprocess_mask in transformers/attention.cpp).
        yield SavedTensor(
            "attention bias",
            c.micro_batch_size * c.sequence_length * _round_up(c.sequence_length, 16) * c.compute_bytes,
        )


def saved_by_layer(configuration: Configuration) -> list[SavedTensor]:
    """What one decoder layer keeps without checkpointing, and again while it is recomputed with it."""
    c, shape = configuration, configuration.shape
    saved = [*_normed(c, consumers=3), *_attention(c), *_normed(c, consumers=1)]
    narrow = c.tokens * shape.intermediate * c.compute_bytes
    saved += [SavedTensor("gate and up", 2 * narrow), SavedTensor("SiLU of the gate", narrow)]
    if _keeps_inputs(c):
        saved.append(SavedTensor("down_proj input", narrow))
    if c.lora:
        saved += [tensor for target in c.lora.targets for tensor in _adapter(c, target)]
    if c.lora is None and casts_weights(c):
        saved += [
            SavedTensor("weights, 16 bit", rows * columns * c.compute_bytes, weight=True)
            for rows, columns in shape.linears.values()
        ]
    return saved


def saved_until_attention_adapters(configuration: Configuration) -> list[SavedTensor]:
    """What a layer still keeps when backward reaches the adapters of q, k and v, the last of its parameters."""
    c = configuration
    adapters = [t for t in c.lora.targets if t in ATTENTION_INPUTS] if c.lora else []
    return [*_normed(c, consumers=3), *(tensor for target in adapters for tensor in _adapter(c, target))]


def not_saved_by_first_layer(configuration: Configuration) -> list[SavedTensor]:
    """What the first layer does not keep under LoRA: its input needs no gradient, as the embedding is frozen."""
    c = configuration
    if c.lora is None:
        return []
    first = [
        SavedTensor("norm input, fp32", c.tokens * c.shape.hidden * FP32),
        SavedTensor("norm 1/rms", c.tokens * FP32),
    ]
    for target in c.lora.targets:
        if target in ATTENTION_INPUTS:
            columns = c.shape.linears[target][1]
            first += [SavedTensor("LoRA dropout mask", c.tokens * columns)] if c.lora.dropout else []
            if c.precision == "autocast":
                first.append(SavedTensor("LoRA weights, 16 bit", columns * c.lora.r * c.compute_bytes, weight=True))
    return first


def saved_outside_layers(configuration: Configuration) -> list[SavedTensor]:
    """What is kept beside the layers and the logits: the last norm, the output layer's input, the batch itself."""
    c = configuration
    saved = list(_normed(c, consumers=1))
    if c.lora is None and casts_weights(c):
        saved.append(SavedTensor("weights, 16 bit", c.shape.embedding * c.compute_bytes, weight=True))
    # Token ids and shifted labels; the mask that all layers share is boolean.
    saved.append(SavedTensor("ids and labels", c.tokens * INT64, 2))
    if c.masked:
        saved.append(SavedTensor("attention mask", c.micro_batch_size * c.sequence_length**2))
    return saved


def saved_checkpoints(configuration: Configuration) -> list[SavedTensor]:
    """What is kept of the layers with checkpointing: each one's input (Chen 2016), and cosine and sine for all."""
    c = configuration
    size, count = c.tokens * c.shape.hidden * c.residual_bytes, c.shape.layers
    if c.offloaded_checkpoints:
        count = min(count, 2 + CHECKPOINT_BYTES_IN_FLIGHT // size)
    return [
        SavedTensor("layer input", size, count),
        SavedTensor("rotary cosine and sine", c.sequence_length * (c.shape.head_dim // 2) * c.residual_bytes, 2),
    ]


def saved_by_bitsandbytes(configuration: Configuration) -> list[SavedTensor]:
    """Inputs that bitsandbytes' 8-bit matrices keep as attributes of their graph nodes (autograd/_functions.py).

    That goes past torch's hooks: checkpointing cannot drop them, and backward does not free them before the graph goes.
    Those of q, k and v are one tensor. The first layer's needs no gradient and is not kept, but with checkpointing,
    for which transformers makes the embedding's output require one. o_proj's is a copy of the output that attention
    keeps itself, in an order that can be flattened.
    """
    c, shape = configuration, configuration.shape
    if c.quantization_bits != 8:
        return []
    size = c.tokens * c.compute_bytes
    return [
        SavedTensor("q, k, v input", size * shape.hidden, shape.layers - (0 if c.checkpointing else 1)),
        SavedTensor("o_proj input", size * shape.query, shape.layers),
        SavedTensor("gate_up_proj input", size * shape.hidden, shape.layers),
        SavedTensor("down_proj input", size * shape.intermediate, shape.layers),
    ]


def saved_by_model(configuration: Configuration) -> list[SavedTensor]:
    """Everything kept from the end of forward on, without the logits and what the loss makes of them."""
    c = configuration
    if c.checkpointing:
        return [*saved_checkpoints(c), *saved_outside_layers(c), *saved_by_bitsandbytes(c)]
    layers = [SavedTensor(t.name, t.size, t.count * c.shape.layers, t.weight) for t in saved_by_layer(c)]
    less = [SavedTensor(t.name, t.size, -t.count, t.weight) for t in not_saved_by_first_layer(c)]
    return [*layers, *less, *saved_outside_layers(c), *saved_by_bitsandbytes(c)]


def total_bytes(saved: list[SavedTensor], *, weights: bool = False) -> int:
    """Bytes of activations; with ``weights`` those of the 16-bit copies of weights instead."""
    return sum(tensor.total for tensor in saved if tensor.weight == weights)
