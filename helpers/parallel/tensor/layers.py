"""Modules that compute with one rank's part of a matrix. What enters and leaves them is said by ``collectives``."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from helpers.parallel.tensor.collectives import gather, gathered, reduce

Communication = Callable[[Tensor, dist.ProcessGroup], Tensor]


class ColumnParallelLinear(nn.Module):
    """This rank's rows of a weight [output, input]: whole inputs [..., input] to its part of the outputs.

    It does not communicate by itself. Several matrices may share an input (queries, keys and values), and one ``copy``
    or ``gather`` before them serves all.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        again = getattr(x, "again", None)
        if again is None:
            return F.linear(x, self.weight, self.bias)
        part, memory = again
        return _GatherAgainLinear.apply(x, part, self.weight, self.bias, memory)


class RowParallelLinear(nn.Module):
    """This rank's columns of a weight [output, input]: its part of the inputs to the outputs, summed over the group.

    ``leave`` is ``reduce``, or ``reduce_scatter`` under sequence parallelism. The bias is added once, after the sum.
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
        output = self.leave(F.linear(x, self.weight), self.group)
        return output if self.bias is None else output + self.bias


class VocabularyParallelEmbedding(nn.Module):
    """This rank's rows of an embedding: token ids [rows, tokens] to [rows, tokens, width].

    A rank finds only the tokens of its part of the vocabulary and has zeros for all others; ``leave`` sums them up.
    With ``leave=None`` that is left to whoever takes the output.
    """

    def __init__(
        self, weight: nn.Parameter, padding: int | None, group: dist.ProcessGroup, leave: Communication | None = reduce
    ) -> None:
        super().__init__()
        self.weight = weight
        self.first = dist.get_rank(group) * len(weight)
        self.padding = padding - self.first if padding is not None and self._has(padding) else None
        self.group = group
        self.leave = leave

    def _has(self, token: Any) -> Any:
        return (self.first <= token) & (token < self.first + len(self.weight))

    def forward(self, ids: Tensor) -> Tensor:
        here = self._has(ids)
        found = F.embedding((ids - self.first).where(here, 0), self.weight, self.padding)
        found = found.masked_fill(~here[..., None], 0.0)
        return found if self.leave is None else self.leave(found, self.group)


def gather_again(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``gather``, after which column parallel matrices keep only ``x`` for backward and gather it once more there.

    It divides the last activations that sequence parallelism leaves whole, for one more all-gather (Korthikanti et
    al. 2022, section 4.2.2). Under autocast it does not apply: there a cast copy is what is kept.
    """
    whole = gather(x, group)
    whole.again = x.detach(), _Again(group)  # goes where the tensor goes, and lives no longer
    return whole


class _Again:
    """The input that several matrices share, gathered in backward once for all of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.users = 0
        self._waiting = 0
        self._whole: Tensor | None = None

    def whole(self, part: Tensor) -> Tensor:
        if self._whole is None:
            self._whole, self._waiting = gathered(part, self._group), self.users
        whole = self._whole
        self._waiting -= 1
        if not self._waiting:
            self._whole = None
        return whole


class _GatherAgainLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, weight: Tensor, bias: Tensor | None, again: _Again) -> Tensor:
        ctx.save_for_backward(part, weight)
        ctx.again = again
        again.users += 1
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None, None]:
        part, weight = ctx.saved_tensors
        x = ctx.again.whole(part).flatten(0, -2)
        outputs = gradient.flatten(0, -2)
        of_bias = outputs.sum(0) if ctx.needs_input_grad[3] else None
        return gradient @ weight, None, outputs.T @ x, of_bias, None
