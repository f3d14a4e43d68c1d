"""Predict what autograd saves in a forward pass of ``GlmForCausalLM``: each tensor by name, in bytes.

Read off transformers' models/glm/modeling_glm.py, integrations/sdpa_attention.py and loss/loss_utils.py, PEFT's
tuners/lora/layer.py, and torch's tools/autograd/derivatives.yaml; tests/test_predict.py counts the same in runs.

A frozen matrix does not need its input, so LoRA saves much less than full training. Autograd still saves RMSNorm's
input in fp32, SwiGLU's two halves and its SiLU, and q, k, v and the output of the attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from helpers.activations import CHECKPOINT_BYTES_IN_FLIGHT
from helpers.memory.predict import constants
from helpers.memory.predict.configuration import Configuration

FP32 = 4
INT64 = 8
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class SavedTensor:
    """Saved tensors of one kind.

    Attributes:
        name: What they are.
        size: Bytes of each.
        count: How many are saved.
        weight: Whether they are 16-bit copies of weights, not activations.
    """

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
    """Return whether autocast makes a 16-bit copy of every matrix: it does if the weights are in fp32."""
    return configuration.residual_bytes != configuration.compute_bytes


def attention_kernel(configuration: Configuration) -> str:
    """Return which of SDPA's kernels runs on CUDA: "flash", "efficient" or "math".

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


def _saves_inputs(configuration: Configuration) -> bool:
    # deepspeed/runtime/zero/linear.py saves its input even for a frozen weight (memory_efficient_linear, the default).
    return configuration.lora is None or (configuration.strategy.zero_stage == 3 and not configuration.lean)


def _norm_input(configuration: Configuration, compiled: bool) -> SavedTensor:
    """Return what an RMSNorm keeps of its input: the compiler repeats the conversion to fp32 in backward."""
    c = configuration
    size = c.residual_bytes if compiled else FP32
    return SavedTensor(f"norm input, {8 * size} bit", c.tokens * c.shape.hidden * size)


def _normed(configuration: Configuration, consumers: int, compiled: bool) -> Iterator[SavedTensor]:
    """Yield what an RMSNorm saves, and its output as ``consumers`` matrices save it."""
    c, tokens, hidden = configuration, configuration.tokens, configuration.shape.hidden
    yield _norm_input(c, compiled)
    yield SavedTensor("norm 1/rms", tokens * FP32)
    if c.lora is None:
        yield SavedTensor("normed, before its weight", tokens * hidden * c.residual_bytes)
    if _saves_inputs(c):
        # Autocast casts the input again for each matrix; it caches casts of weights only.
        copies = consumers if casts_weights(c) else 1
        yield SavedTensor("matrix input", tokens * hidden * c.compute_bytes, copies)


def _draws(configuration: Configuration, target: str) -> bool:
    """Return whether the adapter of ``target`` has a dropout of its own: of q, k, v that share one, the first has."""
    c = configuration
    assert c.lora is not None
    first = next((t for t in ATTENTION_INPUTS if t in c.lora.targets), target)
    return bool(c.lora.dropout) and (not c.shared_dropout or target == first or target not in ATTENTION_INPUTS)


def _adapter(configuration: Configuration, target: str) -> Iterator[SavedTensor]:
    """Yield what LoRA on one target saves: the dropout's mask, the adapter's input, and the output of matrix A."""
    c = configuration
    assert c.lora is not None
    rows, columns = c.shape.linears[target]
    # PEFT casts the input to the adapter's type; autocast then casts it back for the matmul.
    size = c.compute_bytes if c.precision == "autocast" else c.trainable_bytes
    cast = size != c.compute_bytes or c.precision == "autocast"
    if _draws(c, target):
        yield SavedTensor("LoRA dropout mask", c.tokens * columns)
    # What is dropped belongs to the first adapter; autocast casts it once for each.
    another = bool(c.lora.dropout) and not _draws(c, target) and (c.compiled or not cast)
    # Without a dropout q, k and v read one tensor, the norm's output, as it is.
    read_before = target in ATTENTION_INPUTS and target != next(t for t in c.lora.targets if t in ATTENTION_INPUTS)
    shared = another or (not c.lora.dropout and not cast and (_saves_inputs(c) or read_before))
    if not shared and not c.recomputed_inputs:
        yield SavedTensor("LoRA input", c.tokens * columns * size)
    yield SavedTensor("LoRA output of A", c.tokens * c.lora.r * size)
    if size != c.trainable_bytes:
        yield SavedTensor("LoRA weights, 16 bit", (rows + columns) * c.lora.r * size, weight=True)


def _attention(configuration: Configuration) -> Iterator[SavedTensor]:
    c, shape = configuration, configuration.shape
    kernel = attention_kernel(c)
    wide, narrow = c.tokens * shape.query * c.compute_bytes, c.tokens * shape.key_value * c.compute_bytes
    # Half of each head is rotated; cosine and sine are stretched to that width again in every layer.
    yield SavedTensor("rotary cosine and sine", c.sequence_length * (shape.head_dim // 2) * c.residual_bytes, 2)
    if kernel == "math":
        yield SavedTensor("scaled q, scaled k, v", wide, 3)
        yield SavedTensor("attention weights", c.micro_batch_size * shape.heads * c.sequence_length**2 * FP32)
        if _saves_inputs(c):
            yield SavedTensor("attention output", wide)
        return
    yield SavedTensor("q", wide)
    # With a mask, keys and values are repeated for every head.
    yield SavedTensor("k, v", narrow if kernel == "flash" else wide, 2)
    yield SavedTensor("attention output", wide)
    if c.compute_bytes == 2 and _saves_inputs(c):
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
    """Predict what one decoder layer saves without checkpointing; with it, while the layer is recomputed.

    Args:
        configuration: The job.

    Returns:
        Every saved tensor of the layer.
    """
    c, shape = configuration, configuration.shape
    saved = [*_normed(c, 3, c.compiled), *_attention(c), *_normed(c, 1, c.compiled)]
    if c.packed:
        saved.append(SavedTensor("not explained", c.tokens * constants.PACKED_BYTES_PER_TOKEN))
    narrow = c.tokens * shape.intermediate * c.compute_bytes
    saved.append(SavedTensor("gate and up", 2 * narrow))
    if not c.lean:
        saved.append(SavedTensor("SiLU of the gate", narrow))
    if _saves_inputs(c):
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
    """Predict what a layer still saves when backward reaches the adapters of q, k and v, its last parameters."""
    c = configuration
    adapters = [t for t in c.lora.targets if t in ATTENTION_INPUTS] if c.lora else []
    return [*_normed(c, 3, c.compiled), *(tensor for target in adapters for tensor in _adapter(c, target))]


def not_saved_by_first_layer(configuration: Configuration) -> list[SavedTensor]:
    """Predict what LoRA's first layer does not save: the embedding is frozen, so its input needs no gradient."""
    c = configuration
    if c.lora is None:
        return []
    first = [
        _norm_input(c, c.compiled),
        SavedTensor("norm 1/rms", c.tokens * FP32),
    ]
    if _saves_inputs(c) and (c.lora.dropout or c.trainable_bytes != c.compute_bytes):  # adapters keep copies
        copies = 3 if casts_weights(c) else 1
        first.append(SavedTensor("matrix input", c.tokens * c.shape.hidden * c.compute_bytes, copies))
    for target in c.lora.targets:
        if target in ATTENTION_INPUTS:
            columns = c.shape.linears[target][1]
            first += [SavedTensor("LoRA dropout mask", c.tokens * columns)] if _draws(c, target) else []
            if c.precision == "autocast":
                first.append(SavedTensor("LoRA weights, 16 bit", columns * c.lora.r * c.compute_bytes, weight=True))
    return first


def saved_outside_layers(configuration: Configuration) -> list[SavedTensor]:
    """Predict what is saved outside the layers: by the last norm, the output layer, and the batch; without logits.

    Args:
        configuration: The job.

    Returns:
        Every saved tensor outside the layers.
    """
    c = configuration
    saved = list(_normed(c, 1, compiled=False))
    if c.lora is None and casts_weights(c):
        saved.append(SavedTensor("weights, 16 bit", c.shape.embedding * c.compute_bytes, weight=True))
    # Token ids and shifted labels; the mask that all layers share is boolean.
    saved.append(SavedTensor("ids and labels", c.tokens * INT64, 2))
    if c.masked:
        saved.append(SavedTensor("attention mask", c.micro_batch_size * c.sequence_length**2))
    return saved


def saved_checkpoints(configuration: Configuration) -> list[SavedTensor]:
    """Predict what checkpointing saves: each layer's input (Chen et al. 2016), and cosine and sine for all layers."""
    c = configuration
    size, count = c.tokens * c.shape.hidden * c.residual_bytes, c.shape.layers
    if c.offloaded_checkpoints:
        count = min(count, 2 + CHECKPOINT_BYTES_IN_FLIGHT // size)
    return [
        SavedTensor("layer input", size, count),
        SavedTensor("rotary cosine and sine", c.sequence_length * (c.shape.head_dim // 2) * c.residual_bytes, 2),
    ]


def saved_by_bitsandbytes(configuration: Configuration) -> list[SavedTensor]:
    """Predict the inputs that bitsandbytes' 8-bit matrices keep as attributes of graph nodes (autograd/_functions.py).

    They bypass torch's hooks: checkpointing cannot drop them, and backward does not free them before the graph. q, k
    and v share one tensor. The first layer's is kept only with checkpointing, for which transformers makes the
    embedding's output require a gradient. o_proj's is a copy of the output that attention saves itself, in another
    memory layout.

    Args:
        configuration: The job.

    Returns:
        The kept inputs; none unless the base is quantised to 8 bits.
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
    """Predict everything saved at the end of forward, without the logits and what the loss makes of them."""
    c = configuration
    if c.checkpointing:
        return [*saved_checkpoints(c), *saved_outside_layers(c), *saved_by_bitsandbytes(c)]
    layers = [SavedTensor(t.name, t.size, t.count * c.shape.layers, t.weight) for t in saved_by_layer(c)]
    less = [SavedTensor(t.name, t.size, -t.count, t.weight) for t in not_saved_by_first_layer(c)]
    return [*layers, *less, *saved_outside_layers(c), *saved_by_bitsandbytes(c)]


def total_bytes(saved: list[SavedTensor], *, weights: bool = False) -> int:
    """Add up saved tensors.

    Args:
        saved: The tensors.
        weights: Count the 16-bit copies of weights instead of the activations.

    Returns:
        Bytes.
    """
    return sum(tensor.total for tensor in saved if tensor.weight == weights)
