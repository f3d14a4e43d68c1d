"""Linear layers to shard, and what can be wrong with them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import Function
from helpers.exercises.inputs import random

SIZES = (((3, 4), (4, 5), (5, 2)), ((2, 6), (6, 6), (6, 1)), ((1, 1), (1, 7), (7, 3)))  # of linear layers, by world
Sizes = Sequence[tuple[int, int]]


def chain(sizes: Sizes) -> torch.nn.Sequential:
    """Build linear layers with the same weights on every rank."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
    for number, parameter in enumerate(layers.parameters()):
        parameter.data = random(number, *parameter.shape) / 50
    return layers


def rows(rank: int, sizes: Sizes) -> torch.Tensor:
    """Make a rank's rows, [4, inputs of the first layer]."""
    return random(1000 + rank, 4, sizes[0][0]) / 50


def complete(kept: Sequence[Any]) -> list[int]:
    """Find the layers whose flat tensor has memory."""
    return [number for number, sharded in enumerate(kept) if sharded.flat.untyped_storage().nbytes()]


def cut(make: Function, reshard: Function, layers: torch.nn.Sequential) -> list[Any]:
    """Shard and free every layer, with the notebook's functions."""
    kept = [make(layer) for layer in layers]
    for sharded in kept:
        reshard(sharded)
    return kept


def gather(sharded: Any) -> None:
    """Complete a freed layer, with what the judge needs no learner's function for."""
    sharded.flat.untyped_storage().resize_(sharded.flat.nbytes)
    dist.all_gather_into_tensor(sharded.flat, sharded.shard.detach())
    for parameter, view in zip(sharded.parameters, sharded.views, strict=True):
        parameter.data = view


def expect_weights(layer: torch.nn.Module, sharded: Any, number: int) -> None:
    """Raise, when the layer's backward begins, if its weights are not there: autograd would read freed memory."""

    def begin(_: torch.Tensor) -> None:
        if not sharded.flat.untyped_storage().nbytes():
            raise RuntimeError(f"the backward of layer {number} begins without its weights")

    def after_forward(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(begin)

    layer.register_forward_hook(after_forward)


def gradients_of(layers: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by their parameters' names."""
    return {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}


def fault_of_gradients(sharded: Any, part: torch.Tensor, when: str, sent: int) -> str | None:
    """In a rank: find what is wrong with a layer's reduced gradient.

    Args:
        sharded: The layer, with shard and parameters.
        part: This rank's part of the mean gradient.
        when: What has just ended.
        sent: Bytes that it sent.

    Returns:
        The fault, or None.
    """
    if sharded.shard.grad is None or sharded.shard.grad.shape != part.shape:
        return f"after {when} shard.grad should be as long as the shard"
    off = float((sharded.shard.grad - part).abs().max())
    if not off < 1e-5:
        return f"after {when} shard.grad is off by {off:.2g} from this rank's part of the mean gradient"
    if any(parameter.grad is not None for parameter in sharded.parameters):
        return f"after {when} a whole gradient is still there"
    most = 4 * (dist.get_world_size() - 1) * len(part)
    return None if sent <= most else f"{when} sent {sent} bytes, where {most} are enough"
