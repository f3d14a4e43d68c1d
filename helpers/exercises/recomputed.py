"""Judge a function of autograd that throws its intermediate results away and computes them again in backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from helpers.exercises.answers import NotYet, attempt
from helpers.exercises.inputs import random
from helpers.memory.peak_bytes import PeakBytes

STATE_BYTES = 6000  # of a CPU's random generator: each block may note one


class _Block(nn.Module):
    """Two matmuls with dropout between them; notes for each run whether autograd records it."""

    def __init__(self, seed: int, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Parameter(random(seed, width, inner) / 100)
        self.outer = nn.Parameter(random(seed + 1, inner, width) / 100)
        self.dropout = dropout
        self.recorded: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the shape of x, [..., width]."""
        self.recorded.append(torch.is_grad_enabled())
        return functional.dropout(torch.tanh(x @ self.inner), self.dropout) @ self.outer


@dataclass(frozen=True)
class _Step:
    """Forward and backward of two blocks: results, gradients, runs by then, bytes kept, and whether backward drew."""

    output: torch.Tensor
    gradients: list[torch.Tensor | None]
    runs: tuple[list[bool], list[bool]]
    kept: int
    drew: bool


def _step(apply: Any, shape: Sequence[int], inner: int, dropout: float) -> _Step:
    blocks = [_Block(10 * number, shape[-1], inner, dropout) for number in range(2)]
    x = (random(1, *shape) / 50).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        with PeakBytes("cpu") as memory:
            y = x
            for block in blocks:
                y = apply(block, y, *block.parameters())
            kept = memory.now
        after_forward, generator = list(blocks[0].recorded), torch.get_rng_state()
        y.backward(random(2, *shape) / 50)
        drew = not torch.equal(generator, torch.get_rng_state())
    gradients = [x.grad, *(parameter.grad for block in blocks for parameter in block.parameters())]
    return _Step(y.detach(), gradients, (after_forward, blocks[0].recorded), kept, drew)


def check_recomputed(answer: type[torch.autograd.Function], shape: Sequence[int], inner: int, dropout: float) -> None:
    """Compare two blocks in a row with what autograd does without the answer.

    Args:
        answer: Applied to a function, x, and the function's parameters.
        shape: Of x.
        inner: Width inside a block, of which nothing may be kept.
        dropout: Inside a block.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: Something differs.
    """
    expected = _step(lambda block, x, *_: block(x), shape, inner, dropout)
    found = attempt(answer, _step, answer.apply, shape, inner, dropout)
    where = "with dropout in the function" if dropout else f"for x of shape {list(shape)}"
    if found.output.shape != expected.output.shape or not torch.allclose(found.output, expected.output, atol=1e-5):
        raise NotYet(f"{where}, forward does not return what the function returns")
    if found.runs[0] != [False]:
        raise NotYet(f"forward runs the function {len(found.runs[0])} times, {'recorded' * any(found.runs[0])}")
    allowed = 2 * 4 * found.output.numel() + 2 * STATE_BYTES
    if found.kept > allowed:
        raise NotYet(f"{where}, {found.kept:,} bytes are kept after forward: more than the input of each block")
    if len(found.runs[1]) != 2:
        raise NotYet(f"forward and backward run the function {len(found.runs[1])} times; it should be twice")
    for name, mine, right in zip(("x", *4 * ["a parameter"]), found.gradients, expected.gradients, strict=True):
        if mine is None:
            raise NotYet(f"{where}, {name} gets no gradient")
        if right is None or not torch.allclose(mine, right, atol=1e-5):
            raise NotYet(f"{where}, the gradient of {name} is not the one that plain autograd has")
    if found.drew:
        raise NotYet("backward leaves the random generator in another state, so the next dropout is another one")
