"""Configure how the fine-tune's base is quantised while it is loaded, and do what bitsandbytes leaves to the user."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from helpers.config.finetune import FP8
from helpers.quantization.fp8_loading import Fp8Config

_REPACKS_FOR_AVX512 = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' Linear4bit


def quantization_config(base_format: int | str, compute_dtype: torch.dtype) -> QuantizationConfigMixin:
    """Return the argument ``quantization_config`` of ``from_pretrained``.

    Embedding, output layer, biases and norms keep their type.

    Args:
        base_format: 8 for int8 with a scale per row; 4 for NF4 with a scale per 64 weights and the scales quantised
            again (QLoRA, section 3); "fp8" for e4m3 with a scale per row, which needs no bitsandbytes.
        compute_dtype: Dtype of the matmuls with 4-bit weights.

    Returns:
        The configuration.
    """
    if base_format == FP8:
        return Fp8Config()
    if base_format == 8:
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
    """Exclude what is frozen from DDP's broadcasts; every rank must load it itself.

    DDP would broadcast the codes of quantised weights but not bitsandbytes' scales, which are not parameters. A rank
    would then combine the codes of rank 0 with its own scales. Buffers, such as the scales of fp8, would even be sent
    before each forward.

    Args:
        model: The model that DDP will wrap.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
