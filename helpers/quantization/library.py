"""Configure bitsandbytes as the fine-tune uses it, and do what it leaves to the user."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig

_REPACKS_FOR_AVX512 = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' Linear4bit


def quantization_config(quantization_bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the argument ``quantization_config`` of ``from_pretrained``.

    Embedding, output layer, biases and norms are not quantised.

    Args:
        quantization_bits: 8 for int8 with a scale per row; 4 for NF4 with a scale per 64 weights and the scales
            quantised again (QLoRA, section 3).
        compute_dtype: Dtype of the matmuls with 4-bit weights.

    Returns:
        The configuration.
    """
    if quantization_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Version 0.50 does so at the first forward in evaluation mode. That fails if a row is not a multiple of 64 wide, and
    later training gets no gradient through the repacked weights.

    Args:
        model: The model whose weights keep their layout.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS_FOR_AVX512):
            setattr(module, _REPACKS_FOR_AVX512, False)


def full_numel(parameter: nn.Parameter) -> int:
    """Count the weights of a parameter, also if it packs two per byte (4 bits) or is sharded (ZeRO-3)."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def exclude_frozen_from_ddp(model: nn.Module) -> None:
    """Exclude frozen parameters from the broadcast with which DDP starts; every rank must load them itself.

    DDP would broadcast the codes of quantised weights but not their scales, which are not parameters. A rank would then
    combine the codes of rank 0 with its own scales.

    Args:
        model: The model that DDP will wrap.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
