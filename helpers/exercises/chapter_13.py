"""Chapter 13: results that every rank gets, in any order and whatever its data, and what its exercises ask for."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import Function, NotYet, call, exercise, on_ranks
from helpers.parallel.traffic import count_traffic

Interval = tuple[float, float]  # begin and end

# --- the chapter's own functions ---


def _call(answer: Function, inputs: Sequence[Any]) -> tuple[Any, bool, int]:
    """In a rank: what the answer returned, whether its input stayed as it was, and the collectives it took.

    Each case gets ranks of its own: else a rank that skips a collective would meet the next case's.
    """
    mine = inputs[dist.get_rank()]
    given = torch.tensor(mine) if isinstance(mine, float) else dict(mine) if isinstance(mine, dict) else mine
    with count_traffic() as traffic:
        found = answer(given)
    kept = given.item() if isinstance(given, torch.Tensor) else given
    same = repr(kept) == repr(mine)  # not ==: a nan that stays is right
    if isinstance(found, Mapping):
        found = {name: _plain(value) for name, value in found.items()}
    return _plain(found), same, len(traffic.collectives)


def _plain(found: Any) -> Any:
    """Return the number in a tensor that has one, and anything else as it is."""
    return found.item() if isinstance(found, torch.Tensor) and found.numel() == 1 else found


@exercise
def mean_everywhere(answer: Function) -> None:
    """Judge the mean loss that every rank gets.

    Args:
        answer: Takes this rank's loss, a tensor without dimensions.
    """
    for losses in ((2.5, 4.0), (1.0, 0.5, 6.0), (3.0, 8.0, 1.0, 7.0)):
        n, expected = len(losses), sum(losses) / len(losses)
        for rank, (found, same, _) in enumerate(on_ranks(_call, n, answer=answer, inputs=losses)):
            where = f"with the losses {list(losses)}, rank {rank}"
            if not isinstance(found, int | float):
                raise NotYet(f"{where} gets {_named(found)} instead of a number")
            if not math.isclose(found, expected, rel_tol=1e-5):
                raise NotYet(f"{where} gets {found:.4g}, which is not the mean")
            if not same:
                raise NotYet("the mean is right, but it overwrites the loss, which this rank may still need")


@exercise
def sum_together(answer: Function) -> None:
    """Judge the sums of metrics, whose names come in another order on each rank.

    Args:
        answer: Takes this rank's metrics, a dictionary of numbers.
    """
    for n, names in ((2, ("correct", "seen")), (3, ("tokens", "loss", "rows", "a")), (4, ("seen",))):
        # Every rank begins with another name.
        orders = [[names[(place + rank) % len(names)] for place in range(len(names))] for rank in range(n)]
        values = {name: 10.0 ** (place + 1) for place, name in enumerate(names)}
        inputs = [{name: values[name] + rank for name in order} for rank, order in enumerate(orders)]
        expected = {name: sum(metrics[name] for metrics in inputs) for name in names}
        for rank, (found, same, collectives) in enumerate(on_ranks(_call, n, answer=answer, inputs=inputs)):
            _check_sums(f"with {n} ranks, rank {rank}", found, expected)
            if not same:
                raise NotYet("the sums are right, but it overwrites the metrics that it gets")
            if collectives != 1:
                raise NotYet(f"the sums are right, but it took {collectives} collectives, and one is enough")


def _check_sums(where: str, found: Any, expected: Mapping[str, float]) -> None:
    if not isinstance(found, dict) or set(found) != set(expected):
        got = f"a dictionary of {sorted(found)}" if isinstance(found, dict) else _named(found)
        raise NotYet(f"{where} gets {got} instead of a dictionary of {sorted(expected)}")
    for name, total in expected.items():
        if not isinstance(found[name], int | float) or not math.isclose(found[name], total, rel_tol=1e-5):
            order = "its metrics have an order of their own"
            raise NotYet(f"{where} gets {found[name]!r} as {name!r}, which is not that metric's sum; {order}")


def _named(found: Any) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"


# --- exercises ---


@exercise
def suspect(rank: int) -> None:
    """Judge which of four ranks to look at, if all but rank 2 wait in a collective.

    Args:
        rank: Its number.
    """
    if rank not in range(4):
        raise NotYet(f"{rank!r} is not one of the four ranks 0 to 3")
    if rank != 2:
        raise NotYet(f"rank {rank} waits in all_reduce, and a rank that waits is a victim")


@exercise
def first_bad_rank(answer: Callable[[torch.Tensor], Any]) -> None:
    """Judge the first rank whose loss is not finite, which every rank should learn.

    Args:
        answer: Takes this rank's loss, a tensor without dimensions.
    """
    nan, inf = math.nan, math.inf
    for losses in ((3.0, nan), (2.0, 1.5), (-inf, 1.0, nan), (0.5, inf, 2.0, -inf), (2.5, -1.0, 0.0, nan)):
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        for rank, (found, same, collectives) in enumerate(on_ranks(_call, len(losses), answer=answer, inputs=losses)):
            where = f"with the losses {list(losses)}, rank {rank}"
            if found is None:
                raise NotYet(f"{where} gets nothing")
            if found != (bad[0] if bad else -1):
                raise NotYet(f"{where} gets {found}")
            if not same:
                raise NotYet("the rank is right, but it overwrites the loss, which this rank still needs")
            if collectives != 1:
                raise NotYet(f"the rank is right, but it took {collectives} collectives, and one is enough")


@exercise
def common_steps(answer: Callable[[int], Any]) -> None:
    """Judge the number of steps that all ranks can make.

    Args:
        answer: Takes this rank's number of batches.
    """
    for batches in ((7, 5), (6, 9, 0), (8, 3, 3, 12)):
        for rank, (found, *_) in enumerate(on_ranks(_call, len(batches), answer=answer, inputs=batches)):
            where = f"of ranks with {list(batches)} batches, rank {rank}"
            try:
                steps = index(found)
            except TypeError:
                raise NotYet(f"{where} gets {found!r}, and range needs a whole number") from None
            if steps > min(batches):
                raise NotYet(f"{where} would make {steps} steps, and another rank cannot keep up")
            if steps < min(batches):
                raise NotYet(f"{where} would make {steps} steps, and all of them can make more")


@exercise
def hidden_share(answer: Callable[[list[Interval], list[Interval]], float]) -> None:
    """Judge the share of the communication during which a step also computes.

    Args:
        answer: Takes the intervals of compute, and those of communication; each list in any order.
    """
    cases: tuple[tuple[list[Interval], list[Interval]], ...] = (
        ([(0, 10)], [(2, 4)]),
        ([(0, 8)], [(3, 5), (7, 11)]),
        ([(0, 2), (4, 6)], [(1, 5)]),
        ([(0, 1)], [(2, 5)]),
        ([], [(1, 3)]),
        ([(6.5, 9), (0, 2), (3, 3.5)], [(9, 12), (1, 7)]),
    )
    for computes, sends in cases:
        found = call(answer, list(computes), list(sends))
        where = f"for computes = {computes} and sends = {sends}, "
        if found is None:
            raise NotYet(f"{where}it returns nothing")
        if not 0 <= found <= 1:
            raise NotYet(f"{where}it returns {found:.4g}, and a share is between 0 and 1")
        overlaps = [max(0, min(e1, e2) - max(b1, b2)) for b1, e1 in computes for b2, e2 in sends]
        expected = sum(overlaps) / sum(end - begin for begin, end in sends)
        if abs(found - expected) > 0.006:
            raise NotYet(f"{where}a share of {found:.3g} is too {'large' if found > expected else 'small'}")
