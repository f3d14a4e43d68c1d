"""Build the course's network with random, quantised weights, one matrix at a time on the device.

So the 6B model in 4 bits never needs the 12 GB of its 16-bit weights.
"""

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM
from transformers.integrations import replace_with_bnb_linear

from helpers.memory.predict import ModelShape
from helpers.memory.predict.build import build_base_model
from helpers.quantization.library import keep_layout, quantization_config

INITIALIZER_RANGE = 0.02  # standard deviation of transformers' initial weights


def build_quantized(
    shape: ModelShape,
    quantization_bits: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> GlmForCausalLM:
    """Build a frozen network with random weights.

    Args:
        shape: The model.
        quantization_bits: Of the matrices inside the layers: 16 (not quantised), 8 or 4.
        device: Where to build it.
        dtype: Of all other parameters, and of the matmuls.
        seed: A seed gives the same weights before quantisation, whatever ``quantization_bits`` is.

    Returns:
        The network on ``device``.
    """
    model = build_base_model(shape, torch.float32, "meta")
    if quantization_bits != 16:
        replace_with_bnb_linear(model, ["lm_head"], quantization_config(quantization_bits, dtype))
        setattr(model, f"is_loaded_in_{quantization_bits}bit", True)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = _random(name, parameter.shape, generator, device).to(dtype)
            setattr(module, name, _quantized(module, name, value, quantization_bits))
    # The rotary frequencies are buffers, computed when the module is made: on the meta device they have no values.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    keep_layout(model)
    model.requires_grad_(False)
    return model


def _random(name: str, shape: torch.Size, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Initialize as transformers does: normal matrices, norms of one, biases of zero."""
    if len(shape) == 2:
        return torch.empty(shape, device=device).normal_(0, INITIALIZER_RANGE, generator=generator)
    return torch.full(shape, 0.0 if name == "bias" else 1.0, device=device)


def _quantized(module: nn.Module, name: str, value: Tensor, quantization_bits: int) -> nn.Parameter:
    """Quantise ``value`` if it is the weight of one of bitsandbytes' layers."""
    import bitsandbytes as bnb

    if quantization_bits == 16 or name != "weight" or not isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
        return nn.Parameter(value, requires_grad=False)
    if quantization_bits == 4:
        # Moving a Params4bit to its device quantises it.
        # bitsandbytes annotates `to` as the method of a Module, though a Params4bit is a Parameter.
        return bnb.nn.Params4bit(value, **vars(module.weight)).to(device=value.device)  # type: ignore[misc]
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(value.half())
    return bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
