"""Modules that compute with one rank's shard of a matrix. The communications around them are in ``collectives``."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from helpers.parallel.tensor.collectives import Communication, all_gather_tokens, gather, reduce

_SHARED_INPUT = "_shared_input"  # attribute of a tensor that gather_with_recompute made


class ColumnParallelLinear(nn.Module):
    """Compute this rank's part of the outputs from all inputs: [..., input] to [..., output / world_size].

    It does not communicate. Several matrices may share an input (queries, keys and values), so a single ``copy`` or
    ``gather`` before them serves them all.

    Args:
        weight: This rank's rows [output / world_size, input]. The paper writes X A with A = weight.T, so there they
            are columns of A.
        bias: [output / world_size].
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., input] by the shard."""
        shared = getattr(x, _SHARED_INPUT, None)
        if shared is None:
            return F.linear(x, self.weight, self.bias)
        local_x, shared_input = shared
        return _RecomputedGatherLinear.apply(x, local_x, self.weight, self.bias, shared_input)


class RowParallelLinear(nn.Module):
    """Compute all outputs from this rank's part of the inputs: [..., input / world_size] to [..., output].

    Each rank computes a part of the sum for every output; ``leave`` adds the parts up.

    Args:
        weight: This rank's columns [output, input / world_size].
        bias: [output], equal on all ranks; it is added once, after the sum.
        group: The ranks that share the matrix.
        leave: ``reduce``, or ``reduce_scatter`` with sequence parallelism.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup, leave: Communication = reduce
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.group = group
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., input / world_size] by the shard, and sum over the group."""
        output = self.leave(F.linear(x, self.weight), self.group)
        return output if self.bias is None else output + self.bias


class VocabParallelEmbedding(nn.Module):
    """Look up tokens in an embedding whose rows are sharded: [sequences, tokens] to [sequences, tokens, width].

    A rank finds only the tokens of its part of the vocabulary and returns zeros for all others. The sum over the ranks
    is the embedding.

    Args:
        weight: This rank's rows [vocabulary / world_size, width].
        padding_idx: Token that gets no gradient, a number of the full vocabulary.
        group: The ranks that share the vocabulary.
        leave: The sum over the ranks; None leaves it to the next module.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        padding_idx: int | None,
        group: dist.ProcessGroup,
        leave: Communication | None = reduce,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.first_token = dist.get_rank(group) * len(weight)
        self.local_padding_idx = None
        if padding_idx is not None and self._is_local(padding_idx):
            self.local_padding_idx = padding_idx - self.first_token
        self.group = group
        self.leave = leave

    def _is_local(self, token: Any) -> Any:
        """Test whether a token, or each token of a tensor, is in this rank's part of the vocabulary."""
        return (self.first_token <= token) & (token < self.first_token + len(self.weight))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids`` [sequences, tokens]."""
        is_local = self._is_local(ids)
        # Tokens of other ranks look up row 0, which the mask then replaces by zeros.
        local_ids = (ids - self.first_token).where(is_local, 0)
        embedded = F.embedding(local_ids, self.weight, self.local_padding_idx)
        embedded = embedded.masked_fill(~is_local[..., None], 0.0)
        return embedded if self.leave is None else self.leave(embedded, self.group)


def gather_with_recompute(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the tokens as ``gather`` does, but let column-parallel matrices gather them a second time in backward.

    They then keep only ``x`` for backward. This shards the last activations that sequence parallelism leaves on every
    rank, at the price of one more all-gather (Korthikanti et al. 2022, section 4.2.2). It has no effect under autocast:
    there the matrices keep a copy in the lower precision.

    Args:
        x: This rank's tokens [sequences, tokens / world_size, width].
        group: The ranks that share the sequence.

    Returns:
        All tokens [sequences, tokens, width].
    """
    full = gather(x, group)
    # The attribute travels with the tensor to the matrices that use it, and dies with it.
    setattr(full, _SHARED_INPUT, (x.detach(), _SharedInput(group)))
    return full


class _SharedInput:
    """Gather an input that several matrices share only once in backward, and free it after the last of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.users = 0
        self._users_left = 0
        self._full: Tensor | None = None

    def all_gather(self, local: Tensor) -> Tensor:
        if self._full is None:
            self._full, self._users_left = all_gather_tokens(local, self._group), self.users
        full = self._full
        self._users_left -= 1
        if not self._users_left:
            self._full = None
        return full


class _RecomputedGatherLinear(Function):
    """Multiply gathered tokens by a shard, keeping only this rank's tokens for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, local_x: Tensor, weight: Tensor, bias: Tensor | None, shared_input: _SharedInput
    ) -> Tensor:
        ctx.save_for_backward(local_x, weight)
        ctx.shared_input = shared_input
        shared_input.users += 1
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None, None]:
        local_x, weight = ctx.saved_tensors
        x = ctx.shared_input.all_gather(local_x).flatten(0, -2)  # [all tokens, input]
        flat_gradient = gradient.flatten(0, -2)  # [all tokens, output / world_size]
        bias_gradient = flat_gradient.sum(0) if ctx.needs_input_grad[3] else None
        return gradient @ weight, None, flat_gradient.T @ x, bias_gradient, None
