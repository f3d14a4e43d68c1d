"""The communications of tensor parallelism as operations of autograd, in pairs: each one's backward is its partner.

| forward                        | backward       |                                                    |
|--------------------------------|----------------|----------------------------------------------------|
| ``copy``: nothing              | all-reduce     | into a column parallel matrix (Megatron's f)       |
| ``reduce``: all-reduce         | nothing        | out of a row parallel matrix (Megatron's g)        |
| ``gather``: all-gather         | reduce-scatter | the same two places under sequence parallelism     |
| ``reduce_scatter``             | all-gather     | (Korthikanti et al. 2022: g and its conjugate)     |

Activations are [rows, tokens, width]; sequence parallelism divides the tokens. Results lie in new memory: an input, or
a gradient that another branch of the graph may hold as well, is never written into.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from helpers.errors import UserError

SEQUENCE = 1  # the dimension of tokens


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` as it is; its gradient is summed over the group."""
    return _Copy.apply(x, group)


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``x`` over the group; its gradient is passed on as it is."""
    return _Reduce.apply(x, group)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tokens, of each rank's part of them; the gradient of each part is summed over the group."""
    return _Gather.apply(x, group)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the tokens of the sum of ``x`` over the group; the gradients of all parts are gathered.

    Raises :class:`UserError` where the tokens cannot be divided evenly.
    """
    ranks, tokens = dist.get_world_size(group), x.shape[SEQUENCE]
    if tokens % ranks:
        raise UserError(
            f"rows of {tokens} tokens cannot be divided by {ranks} ranks: pad them to a multiple of {ranks}"
        )
    return _ReduceScatter.apply(x, group)


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, without a gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, tokens / ranks, …] of each rank to [rows, tokens, …], without a gradient."""
    return all_gathered(x, group).movedim(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1)


def all_gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, …]: the tensors of all ranks, of one shape, in the order of ranks; without a gradient."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty((ranks * x.shape[0], *x.shape[1:]))  # gloo takes them only behind one another
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (ranks, -1))


def reduce_scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, tokens, …] to this rank's [rows, tokens / ranks, …] of the sum over the group, without a gradient."""
    parts = x.unflatten(SEQUENCE, (dist.get_world_size(group), -1)).movedim(SEQUENCE, 0).contiguous()
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=group)  # it divides along the first dimension
    return mine


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduced(gradient, ctx.group), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scattered(gradient, ctx.group), None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.group), None
