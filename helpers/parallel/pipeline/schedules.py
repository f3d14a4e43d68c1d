"""Pipeline schedules as data: a list of actions per rank, in the order in which the rank runs them.

A schedule contains neither times nor messages. Both follow from it: an action starts once the previous action on its
rank has ended and the results that it needs from other stages are there. With p ranks, rank r runs the stages
r, r + p, r + 2p and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from helpers.errors import UserError


class Action(NamedTuple):
    """One piece of work of a rank: a pass of one micro-batch through one stage.

    Attributes:
        kind: "F" forward; "B" full backward; or its two halves, "I" for the gradient of the stage's input and "W" for
            the gradients of its weights.
        stage: Number of the stage, from 0.
        micro_batch: Number of the micro-batch, from 0.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


Schedule = Sequence[Sequence[Action]]  # schedule[rank] lists the actions of that rank


def gpipe(world_size: int, micro_batches: int) -> Schedule:
    """Build GPipe's schedule: all micro-batches forward, then all backward (Huang et al. 2019).

    Arguments, result and errors are those of :func:`one_f_one_b`.
    """
    _check_positive(world_size=world_size, micro_batches=micro_batches)
    return [_all("F", rank, micro_batches) + _all("B", rank, micro_batches) for rank in range(world_size)]


def one_f_one_b(world_size: int, micro_batches: int) -> Schedule:
    """Build the 1F1B schedule: each backward as early as possible (Narayanan et al. 2019).

    Rank r of p then keeps the activations of at most p - r micro-batches, however many there are.

    Args:
        world_size: Number of pipeline ranks, with one stage each.
        micro_batches: Number of micro-batches per step.

    Returns:
        The actions of each rank.

    Raises:
        UserError: A number is below 1.
    """
    _check_positive(world_size=world_size, micro_batches=micro_batches)
    schedule = []
    for rank in range(world_size):
        forward, backward = _all("F", rank, micro_batches), _all("B", rank, micro_batches)
        # The first backward reaches this rank after the world_size - 1 - rank stages behind it.
        schedule.append(_alternate(forward, backward, warm_up=world_size - 1 - rank))
    return schedule


def interleaved(world_size: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """Build interleaved 1F1B: ``chunks`` smaller stages per rank divide the bubble by ``chunks``.

    Micro-batches travel in groups of ``world_size``: a group passes the first chunk of every rank, then the second, and
    so on (Narayanan et al. 2021, section 2.2).

    Args:
        world_size: Number of pipeline ranks.
        micro_batches: Number of micro-batches per step, a multiple of ``world_size``.
        chunks: Number of stages per rank.

    Returns:
        The actions of each rank.

    Raises:
        UserError: A number is below 1, or the micro-batches do not divide into groups.
    """
    _check_positive(world_size=world_size, micro_batches=micro_batches, chunks=chunks)
    if micro_batches % world_size:
        raise UserError(
            f"interleaved: {micro_batches} micro-batches do not divide into groups of {world_size}, one per rank; "
            f"choose a multiple of {world_size}"
        )
    passes = [
        (chunk, group + number)
        for group in range(0, micro_batches, world_size)
        for chunk in range(chunks)
        for number in range(world_size)
    ]
    schedule = []
    for rank in range(world_size):
        forward = [Action("F", chunk * world_size + rank, number) for chunk, number in passes]
        # Backward passes the chunks in the opposite order.
        backward = [Action("B", (chunks - 1 - chunk) * world_size + rank, number) for chunk, number in passes]
        # The paper's warm-up. With a single chunk it would be twice that of 1F1B, which needs less.
        warm_up = 2 * (world_size - 1 - rank) + (chunks - 1) * world_size if chunks > 1 else world_size - 1 - rank
        schedule.append(_alternate(forward, backward, warm_up))
    return schedule


def zero_bubble(world_size: int, micro_batches: int) -> Schedule:
    """Build ZB-H1: 1F1B with each backward split into I and W (Qi et al. 2023, section 2).

    Other stages wait for I only, so rank r delays each W by r micro-batches. The delayed W fill the time at the end in
    which 1F1B is idle. No rank keeps more micro-batches than rank 0 does under 1F1B.

    Arguments, result and errors are those of :func:`one_f_one_b`.
    """
    _check_positive(world_size=world_size, micro_batches=micro_batches)
    schedule = []
    for rank in range(world_size):
        forward, input_gradients = _all("F", rank, micro_batches), _all("I", rank, micro_batches)
        actions = []
        for action in _alternate(forward, input_gradients, warm_up=world_size - 1 - rank):
            actions.append(action)
            if action.kind == "I" and action.micro_batch >= rank:
                actions.append(Action("W", rank, action.micro_batch - rank))
        actions += [Action("W", rank, number) for number in range(max(0, micro_batches - rank), micro_batches)]
        schedule.append(actions)
    return schedule


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {"GPipe": gpipe, "1F1B": one_f_one_b, "interleaved 1F1B": interleaved, "zero-bubble": zero_bubble}
)


def idle_fraction(world_size: int, micro_batches: int, chunks: int = 1) -> float:
    """Compute the bubble of GPipe, 1F1B and (with ``chunks`` > 1) interleaved 1F1B, for stages of equal cost.

    With p ranks, m micro-batches and v chunks it is (p - 1) / (v m + p - 1) of the total time. Narayanan et al. (2021)
    write (p - 1) / (v m): the same bubble, relative to the time without it.
    """
    return (world_size - 1) / (chunks * micro_batches + world_size - 1)


def zero_bubble_idle_fraction(world_size: int, micro_batches: int) -> float:
    """Compute the bubble of ZB-H1, if F, I and W take equally long and there are at least p micro-batches.

    ZB-H1 reduces the bubble of 1F1B from (p - 1)(F + I + W) to (p - 1)(F + I - W) (Qi et al. 2023, section 2): a third.
    """
    return (world_size - 1) / (3 * micro_batches + world_size - 1)


def _all(kind: str, stage: int, micro_batches: int) -> list[Action]:
    """List one kind of action of a stage for all micro-batches, in order."""
    return [Action(kind, stage, number) for number in range(micro_batches)]


def _alternate(forward: list[Action], backward: list[Action], warm_up: int) -> list[Action]:
    """Run ``warm_up`` forwards, then one forward and one backward in turn, then the remaining backwards."""
    actions = forward[:warm_up]
    for number, action in enumerate(forward[warm_up:]):
        actions += [action, backward[number]]
    return actions + backward[max(0, len(forward) - warm_up) :]


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}; give a whole number above 0")
