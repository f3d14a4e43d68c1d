"""What ``speed`` in the configuration asks of the model: compiled layers, attention for packs, a loss in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.config.finetune import SpeedOptions
from helpers.finetune import packed_attention
from helpers.finetune.model import TrainedChatGLM3ForCausalLM

# Generation and padded rows: what every model starts with.
SDPA = "sdpa"
# The same for rows that are padded on the right: causal attention does not look there, so no mask is needed. For a name
# it knows, transformers would look at the padding to see whether it needs one, and the host wait for the GPU. This is
# for where FlashAttention runs: of SDPA's other kernels none but the slowest shares keys between heads.
RIGHT_PADDED = "right_padded"
AttentionInterface.register(RIGHT_PADDED, sdpa_attention_forward)


def set_allocator(speed: SpeedOptions, device: torch.device) -> None:
    """Let torch's allocator on ``device`` work as ``speed`` says; call it before anything is loaded."""
    if speed.expandable_segments and device.type == "cuda":
        # PYTORCH_ALLOC_CONF says the same, but whoever starts the job would have to know it.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def apply_speed_options(model: PeftModel, speed: SpeedOptions) -> None:
    """Change ``model`` to what ``speed`` says. It computes the same function as before."""
    base = model.get_base_model()
    assert isinstance(base, TrainedChatGLM3ForCausalLM), f"{type(base).__name__} has no loss in chunks"
    base.loss_chunk = speed.loss_chunk
    # With a cache transformers does not look at the position ids, and rows of a pack would see each other.
    base.config.use_cache = False
    if packed_attention.has_kernel(model.device, base.dtype):
        if speed.packing:
            base.set_attn_implementation(packed_attention.IMPLEMENTATION)
        elif not speed.padding_mask:
            base.set_attn_implementation(RIGHT_PADDED)
    if speed.compile_layers:
        # One layer, not the whole model: all of them are the same code, which is compiled once, in seconds.
        for layer in base.model.layers:
            layer.compile()


@contextmanager
def evaluation_mode(model: PeftModel) -> Iterator[None]:
    """Evaluation and generation: padded rows of every length, for which nothing was compiled and no pack is there."""
    base = model.get_base_model()
    implementation = base.config._attn_implementation
    base.set_attn_implementation(SDPA)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        base.set_attn_implementation(implementation)
