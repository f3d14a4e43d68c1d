"""Activation checkpointing: discard a layer's activations in forward, recompute them in backward.

Chapter 11 derives it. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.errors import UserError

_ATEN = torch.ops.aten
# What a linear layer and SDPA's fused kernels call, under the names that the dispatcher sees.
MATMULS = (_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default)
ATTENTION = tuple(
    getattr(_ATEN, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def checkpoint_layers(
    model: nn.Module, layers: Collection[int] | None = None, keep: Collection[torch._ops.OpOverload] = ()
) -> None:
    """Let backward recompute the given layers of ``model``; the other layers keep their activations.

    A call replaces what an earlier call set.

    Args:
        model: A transformers model, whose layers can checkpoint themselves.
        layers: Indices of the layers to checkpoint, in the order of ``model.modules()``; None means all.
        keep: Operators whose outputs are kept, like the layer's input, instead of recomputed (selective
            checkpointing). :data:`MATMULS` and :data:`ATTENTION` take most of the time.

    Raises:
        UserError: The model has no layer of that index.
    """
    candidates = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    chosen = range(len(candidates)) if layers is None else layers
    if unknown := [index for index in chosen if not 0 <= index < len(candidates)]:
        raise UserError(f"checkpoint_layers: layer {unknown[0]} of a model of {len(candidates)} layers; count from 0")
    recompute = partial(checkpoint, use_reentrant=False)
    if keep:
        recompute = partial(recompute, context_fn=partial(create_selective_checkpoint_contexts, list(keep)))
    for index, layer in enumerate(candidates):
        layer._gradient_checkpointing_func = recompute  # type: ignore[assignment]  # Module's own annotation is narrower
        layer.gradient_checkpointing = index in chosen
