"""The communications of tensor parallelism, as operations of autograd. Each is the backward of another one.

| operation          | forward        | backward       | where                                                  |
|--------------------|----------------|----------------|--------------------------------------------------------|
| ``copy``           | nothing        | all-reduce     | before a column-parallel matrix                        |
| ``reduce``         | all-reduce     | nothing        | after a row-parallel matrix                            |
| ``gather``         | all-gather     | reduce-scatter | like ``copy``, if tokens are sharded between blocks    |
| ``reduce_scatter`` | reduce-scatter | all-gather     | like ``reduce``, if tokens are sharded between blocks  |

The first two are *f* and *g* of Shoeybi et al. (2019, section 3). The other two are *g* and its conjugate in
Korthikanti et al. (2022, section 4.2), whose sequence parallelism shards the tokens.

Activations are [sequences, tokens, width]. No operation writes into its input: another branch of the graph may hold the
same tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from helpers.errors import UserError

Communication = Callable[[Tensor, dist.ProcessGroup], Tensor]

TOKEN_DIM = 1  # of activations [sequences, tokens, width]


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return ``x`` unchanged; backward sums its gradient over the group (Megatron's f).

    Each rank knows the gradient of the input only through its own shard of the matrix that follows.
    """
    return _Conjugate.apply(x, group, _unchanged, all_reduce)


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``x`` over the group; backward passes the gradient on unchanged (Megatron's g).

    All ranks share the sum, so each already has the full gradient of it.
    """
    return _Conjugate.apply(x, group, all_reduce, _unchanged)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the tokens of all ranks; backward sums the gradients and keeps those of this rank's tokens.

    Args:
        x: This rank's tokens [sequences, tokens / world_size, ...].
        group: The ranks that share the sequence.

    Returns:
        All tokens [sequences, tokens, ...].
    """
    return _Conjugate.apply(x, group, all_gather_tokens, reduce_scatter_tokens)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``x`` over the group and keep this rank's tokens; backward gathers the gradients of all tokens.

    Args:
        x: This rank's part of the sum [sequences, tokens, ...].
        group: The ranks that share the sequence.

    Returns:
        The sum for this rank's tokens [sequences, tokens / world_size, ...].

    Raises:
        UserError: The tokens do not divide evenly.
    """
    world_size, tokens = dist.get_world_size(group), x.shape[TOKEN_DIM]
    if tokens % world_size:
        raise UserError(
            f"sequence_parallel: {tokens} tokens per sequence do not divide by {world_size} ranks; "
            f"pad them to a multiple of {world_size}"
        )
    return _Conjugate.apply(x, group, reduce_scatter_tokens, all_gather_tokens)


class _Conjugate(Function):
    """Run one communication in forward and its partner in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, forward: Communication, backward: Communication
    ) -> Tensor:
        ctx.group, ctx.backward_communication = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backward_communication(gradient, ctx.group), None, None, None


def _unchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)  # autograd wants a new tensor object; the memory is the same


# The functions below are plain communications, which autograd does not see.


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``x`` over the group into new memory."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_stacked(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather tensors of equal shape from all ranks: [...] becomes [world_size, ...], in the order of ranks."""
    world_size = dist.get_world_size(group)
    # gloo gathers only along an existing first dimension, not into a new one.
    gathered = x.new_empty((world_size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered.unflatten(0, (world_size, -1))


def all_gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [sequences, tokens / world_size, ...] from all ranks to [sequences, tokens, ...]."""
    return all_gather_stacked(x, group).movedim(0, TOKEN_DIM).flatten(TOKEN_DIM, TOKEN_DIM + 1)


def reduce_scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum [sequences, tokens, ...] over the group, and return this rank's [sequences, tokens / world_size, ...]."""
    # [sequences, world_size, tokens / world_size, ...] -> [world_size, sequences, tokens / world_size, ...]
    by_rank = x.unflatten(TOKEN_DIM, (dist.get_world_size(group), -1)).movedim(TOKEN_DIM, 0).contiguous()
    local = torch.empty_like(by_rank[0])
    dist.reduce_scatter_tensor(local, by_rank.flatten(0, 1), group=group)  # it scatters along the first dimension
    return local
