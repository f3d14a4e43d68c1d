"""bitsandbytes as the fine-tune uses it: its settings, and what it leaves to the user."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig


def quantization_config(bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What ``from_pretrained`` takes as ``quantization_config``.

    8: int8 with a scale a row. 4: NF4 with a scale for each 64 weights, the scales quantised again (QLoRA); matrices
    are multiplied in ``compute_dtype``. Embedding, output layer, biases and norms are left as they are.
    """
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they are stored.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 packs them anew at the first forward in evaluation mode: it fails
    where a row is not a multiple of 64 wide, and what it makes passes no gradient on in later training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def elements(parameter: nn.Parameter) -> int:
    """Number of weights that ``parameter`` stands for: two a byte in 4 bits; under ZeRO-3 those of all ranks."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def leave_frozen_to_ranks(model: nn.Module) -> None:
    """Tell DDP not to broadcast frozen parameters of ``model`` when it wraps it: each rank has read them itself.

    It would broadcast the codes of quantised weights but not their scales, which are no parameters to it.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
