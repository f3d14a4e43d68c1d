"""Predict what a layer makes and frees again: tensors in flight, which autograd does not save."""

from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.saved_tensors import FP32


def last_forward(configuration: Configuration) -> int:
    """Sum what forward holds when the last MLP has computed its output, besides what is saved.

    down_proj's input, and a copy of it in fp32 for an adapter. Of the residual stream's shape: the embedding's output,
    which the model's forward holds to its end, the layer's sum after attention, the normed input and the output; an
    adapter adds its own output, that scaled, and the layer's input.

    Args:
        configuration: A job without checkpointing.

    Returns:
        Bytes.
    """
    c = configuration
    adapted = c.lora is not None and "down_proj" in c.lora.targets
    saved = c.lora is None or (c.strategy.zero_stage == 3 and not c.lean)
    read = (0 if saved else c.compute_bytes) + (c.trainable_bytes if adapted and c.precision == "autocast" else 0)
    return c.tokens * (c.shape.intermediate * read + c.shape.hidden * (7 if adapted else 4) * c.compute_bytes)


def layer_backward(configuration: Configuration) -> int:
    """Sum the gradients in flight within a layer: the larger of its MLP's and its norm's.

    MLP: the gradients of down_proj's input and of both factors of SwiGLU; a saved down_proj input is freed by then.
    Norm: the factors of x · 1/rms and of its square, five tensors in fp32. Both: the residual stream's gradient.

    Args:
        configuration: The job.

    Returns:
        Bytes.
    """
    c = configuration
    narrow = c.tokens * c.shape.intermediate * c.compute_bytes
    saved_input = c.lora is None or c.strategy.zero_stage == 3
    mlp = (2 if saved_input and not c.lean else 3) * narrow
    norm = 5 * c.tokens * c.shape.hidden * FP32
    weights = 2 * c.shape.hidden * c.shape.intermediate
    # bitsandbytes dequantises the matrix to 16 bit for the matmul.
    dequantised = weights * c.compute_bytes if c.quantization_bits < 16 else 0
    if c.fp8:
        # When gate_up_proj multiplies, its gradient in fp8 is where down_proj's was, and the matrix is transposed.
        # Before that, the rounding may have had its input and the magnitudes in fp32.
        in_fp32 = 2 * FP32 * 2 * c.tokens * c.shape.intermediate - narrow
        transposed = 0 if c.fp8_transposed else weights
        mlp += transposed if c.fused_rounding else max(transposed, in_fp32)
    return max(mlp, norm) + c.tokens * c.shape.hidden * c.residual_bytes + dequantised
