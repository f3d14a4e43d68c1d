"""What one process computes that has the whole model and every row: the reference of all parallel techniques."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers.memory.predict import ModelShape
from helpers.parallel.network import EQUALITY_EPSILON, TINY, batch, build, weights

STEPS, ROWS, LENGTH = 20, 8, 16
# Tests of techniques that do not divide the layers need only two of them: a step's time is that of its layers.
TWO_LAYERS = dataclasses.replace(TINY, layers=2)
FOUR_LAYERS = dataclasses.replace(TINY, layers=4)
make_optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=EQUALITY_EPSILON)


class Trained(NamedTuple):
    """Weights after the last step, the loss of each step, and gradients' norms before they were clipped."""

    weights: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


def device_of(ranks: int) -> torch.device:
    """The kind of device on which ``ranks`` ranks run: the same seed gives other weights on another kind."""
    return torch.device("cuda" if ranks <= torch.cuda.device_count() else "cpu")


def unchanged(model: nn.Module) -> None:
    """Leave the model as it was built."""


@cache
def train_alone(
    shape: ModelShape,
    ranks: int,
    prepare: Callable[[nn.Module], None] = unchanged,
    *,
    steps: int = STEPS,
    rows: int = ROWS,
    ignored: int = 0,
    max_norm: float | None = None,
) -> Trained:
    """Train in this process what ``ranks`` ranks train together.

    Args:
        shape: Sizes of the network.
        ranks: How many ranks it is compared with; see :func:`device_of`.
        prepare: Changes the model before training.
        steps: Optimizer steps.
        rows: Rows of a step, all of them in one backward pass.
        ignored: So many labels of the first row do not count.
        max_norm: If given, gradients are clipped to it.
    """
    device = device_of(ranks)
    model = build(shape, device)
    prepare(model)
    optimizer = make_optimizer(model.parameters())
    losses, norms = [], []
    for step in range(steps):
        inputs = batch(shape, rows, LENGTH, step, device)
        labels = inputs["labels"].clone()
        labels[0, :ignored] = -100
        loss = model(input_ids=inputs["input_ids"], labels=labels).loss
        loss.backward()
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(weights(model), losses, norms)
