"""Apply the ``speed`` options of a configuration to the model: compiled layers, attention for packs, a chunked loss."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.activations.compiled import recompute_inputs
from helpers.activations.swiglu import RecomputingMLP
from helpers.config.finetune import SpeedOptions
from helpers.finetune import packed_attention
from helpers.finetune.joined_adapters import join_adapters
from helpers.finetune.method import Model, base_network, has_prefix
from helpers.finetune.shared_dropout import share_dropout
from helpers.libraries.deepspeed import gather_whole_layers
from helpers.memory.units import GIB
from helpers.quantization.fp8 import Fp8Linear
from helpers.quantization.fp8_joined import join_products
from helpers.quantization.fp8_swiglu import Fp8MLP, fuse_mlp

SDPA = "sdpa"  # transformers' name for what every model starts with; used for padded batches and generation
# SDPA without a padding mask. Examples are padded on the right, where causal attention never looks. transformers builds
# masks by the implementation's name: under "sdpa" it would inspect the padding, and the host would wait for the GPU.
# Only used where FlashAttention runs: of SDPA's other kernels, only the slowest lets heads share keys.
RIGHT_PADDED = "right_padded"
# What a GPU holds outside of torch's allocator: 1.9 GiB measured on two H100s, plus a margin.
OUTSIDE_TORCH = int(2.25 * GIB)
SMALL_NCCL_BUFFERS = {"NCCL_BUFFSIZE": "1048576", "NCCL_MAX_NCHANNELS": "4"}
AttentionInterface.register(RIGHT_PADDED, sdpa_attention_forward)


def set_allocator(speed: SpeedOptions, device: torch.device) -> None:
    """Configure torch's allocator on ``device``; call it before anything is loaded."""
    if device.type != "cuda":
        return
    if speed.expandable_segments:
        # PYTORCH_ALLOC_CONF would do the same, but only if the user sets it before starting the job.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if speed.gpu_memory_gib:
        share = (speed.gpu_memory_gib * GIB - OUTSIDE_TORCH) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)


def set_nccl_buffers(speed: SpeedOptions) -> None:
    """Set NCCL's variables, unless the user has; call it before NCCL starts."""
    if speed.small_nccl_buffers:
        for name, value in SMALL_NCCL_BUFFERS.items():
            os.environ.setdefault(name, value)


def apply_speed_options(model: Model, speed: SpeedOptions, *, zero_3: bool = False) -> None:
    """Change ``model`` in place. It still computes the same function, up to rounding and dropout's random numbers.

    Args:
        model: The model, on its device.
        speed: The configuration's ``speed``.
        zero_3: Whether DeepSpeed shards the weights.
    """
    base = base_network(model)
    base.loss_chunk = speed.loss_chunk
    # With a cache, transformers ignores the position ids, and the examples of a pack would see each other.
    base.config.use_cache = False
    if packed_attention.has_kernel(model.device, base.dtype):
        if speed.packing:
            base.set_attn_implementation(packed_attention.IMPLEMENTATION)
        elif not speed.padding_mask and not has_prefix(model):  # SDPA would take its first key for the first token's
            base.set_attn_implementation(RIGHT_PADDED)
    for attention in (layer.self_attn for layer in base.model.layers):
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        if speed.shared_dropout:
            share_dropout(readers)
            join_adapters(readers)
        if speed.fp8:
            join_products([getattr(reader, "base_layer", reader) for reader in readers])
    if speed.fp8:
        for layer in base.model.layers:
            fuse_mlp(layer.mlp)
    if speed.fp8_transposed:
        for module in base.model.layers.modules():
            if isinstance(module, Fp8Linear):
                module.keep_transposed()
    if speed.compile_layers:
        # Layers rather than the whole model: they share their code, so one compilation of seconds serves them all.
        backend = recompute_inputs if speed.recompute_inputs else "inductor"
        # Matrices and adapters that share something pass it on as attributes. Under gradient checkpointing the compiler
        # would refuse that, because its backward does not set them again; nobody reads them there.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        if zero_3:
            gather_whole_layers(base, base.model.layers)
        for layer in base.model.layers:
            # Not `layer.compile`: that would compile the hooks as well in which ZeRO-3 gathers the weights.
            layer.forward = torch.compile(layer.forward, backend=backend)
    else:  # the compiler decides by itself what backward recomputes
        for layer in base.model.layers:
            if not isinstance(layer.mlp, Fp8MLP):
                layer.mlp.__class__ = RecomputingMLP


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Undo the speed options for evaluation and generation, whose batches are padded and unpacked."""
    base = base_network(model)
    implementation = base.config._attn_implementation
    base.set_attn_implementation(SDPA)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        base.set_attn_implementation(implementation)
