"""The course's network with random weights and quantised matrices, made on the device one matrix at a time.

The 6B model in 4 bits never needs the 12 GB of its 16-bit weights.
"""

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM
from transformers.integrations import replace_with_bnb_linear

from helpers.memory.predict import Configuration, ModelShape
from helpers.memory.predict.build import base_model
from helpers.quantization.library import keep_layout, quantization_config

# What transformers initialises a Glm's matrices with.
DEVIATION = 0.02


def build_quantized(
    shape: ModelShape, bits: int, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> GlmForCausalLM:
    """A frozen network on ``device``; ``bits`` is 16 (no quantisation), 8 or 4, of the matrices inside the layers.

    All else is in ``dtype``, in which matrices are multiplied, too. A seed gives the same weights, before they are
    quantised, for any number of bits.
    """
    model = base_model(Configuration(shape, lora=None, precision="fp32"), "meta")
    if bits != 16:
        replace_with_bnb_linear(model, ["lm_head"], quantization_config(bits, dtype))
        setattr(model, f"is_loaded_in_{bits}bit", True)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = _random(name, parameter.shape, generator, device).to(dtype)
            setattr(module, name, _quantized(module, name, value, bits))
    # Its frequencies are buffers, which are computed, and came out empty as well.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    keep_layout(model)
    return model.requires_grad_(False)


def _random(name: str, shape: torch.Size, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Matrices are normal, norms one and biases zero, as where a training begins."""
    if len(shape) == 2:
        return torch.empty(shape, device=device).normal_(0, DEVIATION, generator=generator)
    return torch.full(shape, 0.0 if name == "bias" else 1.0, device=device)


def _quantized(module: nn.Module, name: str, value: Tensor, bits: int) -> nn.Parameter:
    import bitsandbytes as bnb

    if bits == 16 or name != "weight" or not isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
        return nn.Parameter(value, requires_grad=False)
    if bits == 4:
        return bnb.nn.Params4bit(value, **vars(module.weight)).to(value.device)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(value.half())
    return bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
