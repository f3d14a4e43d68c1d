"""Pipeline schedules as data: for each rank the list of what it does, one action after the other.

A table says nothing about time or messages. Those follow: an action begins when the one before it on its rank and what
it needs from other stages are done. Rank r has the stages r, r + p, r + 2p and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from helpers.errors import UserError


class Action(NamedTuple):
    """``kind`` on one stage for one micro-batch.

    F forward; B backward, whole; or its halves: I the gradient of the stage's input, W that of its weights.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


Table = Sequence[Sequence[Action]]  # by rank


def gpipe(ranks: int, micro_batches: int) -> Table:
    """All micro-batches forward, then all backward (Huang et al. 2019)."""
    _check(ranks=ranks, micro_batches=micro_batches)
    numbers = range(micro_batches)
    return [[Action(kind, rank, number) for kind in "FB" for number in numbers] for rank in range(ranks)]


def one_f_one_b(ranks: int, micro_batches: int) -> Table:
    """1F1B: backward as soon as it can be, so that rank r keeps at most p - r micro-batches (Narayanan et al. 2019)."""
    _check(ranks=ranks, micro_batches=micro_batches)
    table = []
    for rank in range(ranks):
        forward = [Action("F", rank, number) for number in range(micro_batches)]
        backward = [Action("B", rank, number) for number in range(micro_batches)]
        table.append(_alternate(forward, backward, warm_up=ranks - 1 - rank))
    return table


def interleaved(ranks: int, micro_batches: int, chunks: int = 2) -> Table:
    """1F1B with ``chunks`` smaller stages on each rank: the bubble is as much smaller (Narayanan et al. 2021).

    Micro-batches go round in groups of ``ranks``: a group passes the rank's first chunk, then its second, and so on.
    Raises :class:`UserError` where they do not divide into such groups.
    """
    _check(ranks=ranks, micro_batches=micro_batches, chunks=chunks)
    if micro_batches % ranks:
        raise UserError(
            f"{micro_batches} micro-batches on {ranks} ranks: interleaving sends them round in groups of {ranks}, "
            f"so choose a multiple of {ranks}"
        )
    passes = [
        (chunk, group + number)
        for group in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for number in range(ranks)
    ]
    table = []
    for rank in range(ranks):
        forward = [Action("F", chunk * ranks + rank, number) for chunk, number in passes]
        backward = [Action("B", (chunks - 1 - chunk) * ranks + rank, number) for chunk, number in passes]
        # Where there is one chunk this would be 1F1B with twice its warm-up.
        warm_up = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks if chunks > 1 else ranks - 1 - rank
        table.append(_alternate(forward, backward, warm_up))
    return table


def zero_bubble(ranks: int, micro_batches: int) -> Table:
    """ZB-H1: 1F1B with backward in two halves, of which only I makes another stage wait (Qi et al. 2023).

    Rank r does W r micro-batches later than I. Those W fill the time in which 1F1B waits at the end, and no rank
    keeps more micro-batches than rank 0 does under 1F1B.
    """
    _check(ranks=ranks, micro_batches=micro_batches)
    table = []
    for rank in range(ranks):
        forward = [Action("F", rank, number) for number in range(micro_batches)]
        halves = [Action("I", rank, number) for number in range(micro_batches)]
        row = []
        for action in _alternate(forward, halves, warm_up=ranks - 1 - rank):
            row.append(action)
            if action.kind == "I" and action.micro_batch >= rank:
                row.append(Action("W", rank, action.micro_batch - rank))
        row += [Action("W", rank, number) for number in range(max(0, micro_batches - rank), micro_batches)]
        table.append(row)
    return table


SCHEDULES: Mapping[str, Callable[[int, int], Table]] = MappingProxyType(
    {"GPipe": gpipe, "1F1B": one_f_one_b, "interleaved 1F1B": interleaved, "zero-bubble": zero_bubble}
)


def idle_fraction(ranks: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle share of all ranks' time under GPipe, 1F1B and, with ``chunks``, interleaved 1F1B; stages cost the same.

    (p - 1) / (v m + p - 1), of the whole time; Narayanan et al. (2021) give (p - 1) / (v m), of the time without idle.
    """
    return (ranks - 1) / (chunks * micro_batches + ranks - 1)


def zero_bubble_idle_fraction(ranks: int, micro_batches: int) -> float:
    """The same of ZB-H1 where F, I and W take equally long and there are at least as many micro-batches as ranks.

    Of 1F1B's bubble (p - 1)(F + I + W) it leaves (p - 1)(F + I - W) (Qi et al. 2023), here a third.
    """
    return (ranks - 1) / (3 * micro_batches + ranks - 1)


def _alternate(forward: list[Action], backward: list[Action], warm_up: int) -> list[Action]:
    """``warm_up`` of ``forward``, then one forward and one backward in turn, then what is left of ``backward``."""
    row = forward[:warm_up]
    for place, action in enumerate(forward[warm_up:]):
        row += [action, backward[place]]
    return row + backward[max(0, len(forward) - warm_up) :]


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}; give a whole number above 0")
