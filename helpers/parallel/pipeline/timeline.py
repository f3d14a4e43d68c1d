"""Derive from a schedule who waits for whom, how long it takes at best, and how many micro-batches are alive."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from helpers.errors import UserError
from helpers.parallel.pipeline.schedules import Action, Schedule

# A backward computes two matmuls for each one of forward; I and W compute one of them each.
_TYPICAL_TIMES = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class TimedAction(NamedTuple):
    """An action and when it ran: ``start`` and ``end`` in seconds, on one clock for all ranks."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class ScheduleTimeline:
    """Hold what ran when on each rank, simulated or measured.

    Attributes:
        ranks: ``ranks[r]`` lists the timed actions of rank r, in order.
    """

    ranks: Sequence[Sequence[TimedAction]]

    @property
    def seconds(self) -> float:
        """Seconds from the start of the first action to the end of the last one."""
        timed = [entry for actions in self.ranks for entry in actions]
        return max(entry.end for entry in timed) - min(entry.start for entry in timed)

    @property
    def idle(self) -> float:
        """Share of the total time of all ranks in which no action ran: the pipeline bubble."""
        busy = sum(entry.end - entry.start for actions in self.ranks for entry in actions)
        return 1 - busy / (len(self.ranks) * self.seconds)

    @property
    def alive(self) -> list[int]:
        """Largest number of micro-batches alive at once, per rank: from their F to the end of their B or W.

        A micro-batch counts once per stage of the rank that keeps it.
        """
        return [_most_alive([entry.action for entry in actions]) for actions in self.ranks]


def simulate(schedule: Schedule, seconds: Callable[[Action], float]) -> ScheduleTimeline:
    """Run a schedule on ideal ranks: each action starts as soon as it can, and sending takes no time.

    Args:
        schedule: The actions of each rank.
        seconds: Duration of an action.

    Returns:
        When each action runs, from second 0.

    Raises:
        UserError: An action is missing or listed twice, a stage is on two ranks, or the ranks wait for each other
            forever.
    """
    last_stage = max(ranks_of_stages(schedule))
    _check_complete(schedule, last_stage)
    ended: dict[Action, float] = {}  # by result
    timelines: list[list[TimedAction]] = [[] for _ in schedule]
    progress = True
    while progress:
        progress = False
        for actions, done in zip(schedule, timelines, strict=True):
            while len(done) < len(actions) and all(need in ended for need in needs(actions[len(done)], last_stage)):
                action = actions[len(done)]
                inputs_ready = (ended[need] for need in needs(action, last_stage))
                start = max([0.0, *(previous.end for previous in done[-1:]), *inputs_ready])
                done.append(TimedAction(action, start, start + seconds(action)))
                ended[result(action)] = done[-1].end
                progress = True
    waiting = [
        f"rank {rank} before {actions[len(done)]}"
        for rank, (actions, done) in enumerate(zip(schedule, timelines, strict=True))
        if len(done) < len(actions)
    ]
    if waiting:
        raise UserError(f"the schedule deadlocks: {', '.join(waiting)} wait forever; reorder their actions")
    return ScheduleTimeline(timelines)


def result(action: Action) -> Action:
    """Return the result that other stages wait for. For a full backward, as for I, it is the input's gradient."""
    return action._replace(kind="I") if action.kind == "B" else action


def needs(action: Action, last_stage: int) -> list[Action]:
    """List the results that ``action`` needs before it can start; ``last_stage`` is the number of the last stage."""
    kind, stage, micro_batch = action
    if kind == "F":
        return [Action("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [Action("I", stage, micro_batch)]
    # A backward needs its own forward, and the gradient that the next stage sends back.
    gradient = [Action("I", stage + 1, micro_batch)] if stage < last_stage else []
    return [Action("F", stage, micro_batch), *gradient]


def ranks_of_stages(schedule: Schedule) -> dict[int, int]:
    """Map each stage to its rank.

    Raises:
        UserError: A stage is on two ranks, or the schedule is empty.
    """
    ranks: dict[int, int] = {}
    for rank, actions in enumerate(schedule):
        for action in actions:
            if ranks.setdefault(action.stage, rank) != rank:
                raise UserError(
                    f"stage {action.stage} is on ranks {ranks[action.stage]} and {rank}; assign it to one of them"
                )
    if not ranks:
        raise UserError("the schedule has no actions; build one with gpipe, one_f_one_b, interleaved or zero_bubble")
    return ranks


class Transfer(NamedTuple):
    """A result that rank ``source`` sends to rank ``target``, which needs it for ``stage``."""

    result: Action
    source: int
    target: int
    stage: int


def transfers(schedule: Schedule) -> list[Transfer]:
    """List every message between ranks, in the order in which an ideal run sends it if backward takes twice as long."""
    ranks = ranks_of_stages(schedule)
    last_stage = max(ranks)
    timed = [
        entry for actions in simulate(schedule, lambda action: _TYPICAL_TIMES[action.kind]).ranks for entry in actions
    ]
    messages = []
    for entry in sorted(timed, key=lambda entry: (entry.end, entry.action)):
        kind, stage, _ = sent = result(entry.action)
        neighbour = {"F": stage + 1, "I": stage - 1}.get(kind, stage)  # W is for the stage itself
        if 0 <= neighbour <= last_stage and ranks[neighbour] != ranks[stage]:
            messages.append(Transfer(sent, ranks[stage], ranks[neighbour], neighbour))
    return messages


def transfer_batches(schedule: Schedule, rank: int) -> list[tuple[Transfer, ...]]:
    """List the messages of one rank in batches: a send and the receive that the rank needs next are one batch.

    A rank must start its batches in this order: receives when it needs them or before a later send, a send as soon as
    its result exists. Then the ranks cannot deadlock, not even if every message blocks until both sides are at it.
    Proof: look at the first message, in the order of :func:`transfers`, that has not happened. Everything that its
    sender computes before it needs only earlier messages, which have happened. Neither side is stuck in another
    message, because both keep to the order. So it happens. A batch of two must not hold
    one message back until the other's side is there. NCCL does that until both directions are connected, so the
    executor connects them first.

    Args:
        schedule: The actions of each rank.
        rank: The rank.

    Returns:
        Batches of one or two messages, in the order common to all ranks.
    """
    last_stage = max(ranks_of_stages(schedule))
    needed_after = {result(action): needs(following, last_stage) for action, following in pairwise(schedule[rank])}
    batches: list[tuple[Transfer, ...]] = []
    for transfer in transfers(schedule):
        previous = batches[-1][-1].result if batches else None
        if transfer.target == rank and previous and transfer.result in needed_after.get(previous, ()):
            batches[-1] += (transfer,)  # both directions at once
        elif rank in (transfer.source, transfer.target):
            batches.append((transfer,))
    return batches


def _check_complete(schedule: Schedule, last_stage: int) -> None:
    """Check that every stage runs F and B, or F, I and W, exactly once for each micro-batch."""
    counts = Counter(action for actions in schedule for action in actions)
    micro_batches = 1 + max(action.micro_batch for action in counts)
    for stage in range(last_stage + 1):
        for number in range(micro_batches):
            kinds = "".join(kind for kind in "FBIW" for _ in range(counts[Action(kind, stage, number)]))
            if kinds not in ("FB", "FIW"):
                raise UserError(
                    f"stage {stage} does {kinds or 'nothing'} for micro-batch {number}; give it F and B, or F, I and W"
                )


def _most_alive(actions: Sequence[Action]) -> int:
    alive = most = 0
    for action in actions:
        # F starts to keep activations; B or W frees them; after I the inputs that W needs are still there.
        alive += {"F": 1, "I": 0}.get(action.kind, -1)
        most = max(most, alive)
    return most
