"""Know the data: how long the sequences of a typical step are, and those of the worst."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepLengths:
    """Tokens per sequence of a micro-batch, whose rows are padded to its longest.

    Attributes:
        typical: Half of all micro-batches are at most this long.
        worst: The longest row of the data. It decides whether a job fits, because some step contains it.
    """

    typical: int
    worst: int


def step_lengths(lengths: Sequence[int], micro_batch_size: int) -> StepLengths:
    """Compute how long the micro-batches of random rows are.

    A micro-batch is at most L tokens long if each of its rows is. If a share p of the rows is, that happens with the
    probability p^rows, so p = 0.5^(1/rows) gives the median.

    Args:
        lengths: Tokens of each row of the data; at least one.
        micro_batch_size: Rows that run at once on a GPU.

    Returns:
        The typical and the worst length.
    """
    ordered = sorted(lengths)
    typical = math.ceil(len(ordered) * 0.5 ** (1 / micro_batch_size)) - 1
    return StepLengths(ordered[typical], ordered[-1])
