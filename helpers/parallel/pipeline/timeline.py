"""What a table of actions means: who waits for whom, how long it takes at best, what is kept meanwhile."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from helpers.errors import UserError
from helpers.parallel.pipeline.schedules import Action, Table


class Timed(NamedTuple):
    """An action from ``start`` to ``end``, in seconds of one clock for all ranks."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """``ranks[r]``: what rank r did when, in order; simulated or measured."""

    ranks: Sequence[Sequence[Timed]]

    @property
    def seconds(self) -> float:
        """From the first action's start to the last one's end."""
        spans = [span for row in self.ranks for span in row]
        return max(span.end for span in spans) - min(span.start for span in spans)

    @property
    def idle(self) -> float:
        """Share of all ranks' time in which no action ran: the bubble, of the whole time."""
        busy = sum(span.end - span.start for row in self.ranks for span in row)
        return 1 - busy / (len(self.ranks) * self.seconds)

    @property
    def alive(self) -> list[int]:
        """The most micro-batches that each rank kept at one time: begun by F, not yet ended by B or W.

        One counts once for each of the rank's stages that keeps it.
        """
        return [_most_alive([span.action for span in row]) for row in self.ranks]


def simulate(table: Table, seconds: Callable[[Action], float]) -> Timeline:
    """The table on ideal ranks: each action takes ``seconds(action)`` and begins as soon as it can; sending is free.

    Raises :class:`UserError` where the table is wrong: an action is missing or there twice, a stage is on two ranks,
    or the ranks would wait for one another for ever.
    """
    last = max(ranks_of_stages(table))
    _check(table, last)
    ended: dict[Action, float] = {}
    rows: list[list[Timed]] = [[] for _ in table]
    progress = True
    while progress:
        progress = False
        for row, done in zip(table, rows, strict=True):
            while len(done) < len(row) and all(need in ended for need in needs(row[len(done)], last)):
                action = row[len(done)]
                start = max([0.0, *(span.end for span in done[-1:]), *(ended[need] for need in needs(action, last))])
                done.append(Timed(action, start, start + seconds(action)))
                ended[result(action)] = done[-1].end
                progress = True
    waiting = [
        f"rank {rank} before {row[len(done)]}"
        for rank, (row, done) in enumerate(zip(table, rows, strict=True))
        if len(done) < len(row)
    ]
    if waiting:
        raise UserError(f"the table makes ranks wait for ever: {', '.join(waiting)}; change the order of their actions")
    return Timeline(rows)


def result(action: Action) -> Action:
    """What others wait for after ``action``: of a whole backward pass, as of its first half, the input's gradient."""
    return action._replace(kind="I") if action.kind == "B" else action


def needs(action: Action, last: int) -> list[Action]:
    """The results that ``action`` needs; ``last`` is the number of the last stage."""
    kind, stage, micro_batch = action
    if kind == "F":
        return [Action("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [Action("I", stage, micro_batch)]
    gradient = [Action("I", stage + 1, micro_batch)] if stage < last else []
    return [Action("F", stage, micro_batch), *gradient]


def ranks_of_stages(table: Table) -> dict[int, int]:
    """The rank of each stage. Raises :class:`UserError` where a stage is on two ranks, or there is none at all."""
    ranks: dict[int, int] = {}
    for rank, row in enumerate(table):
        for action in row:
            if ranks.setdefault(action.stage, rank) != rank:
                raise UserError(f"stage {action.stage} is on ranks {ranks[action.stage]} and {rank}; give it to one")
    if not ranks:
        raise UserError("the table has no actions; make one with gpipe, one_f_one_b, interleaved or zero_bubble")
    return ranks


class Transfer(NamedTuple):
    """A result that goes from the rank ``source`` to the rank ``target``, where ``stage`` takes it in."""

    result: Action
    source: int
    target: int
    stage: int


def transfers(table: Table) -> list[Transfer]:
    """All that the ranks send one another, in the order in which an ideal run would send it.

    A rank that starts its sends and receives in this order cannot get into a deadlock, not even where a send waits
    for its receiver (NCCL): take the first transfer that has not happened. All that its sender computes before needs
    only earlier transfers, and neither side is in the middle of another one, since both keep to the order.
    """
    ranks = ranks_of_stages(table)
    last = max(ranks)
    spans = [span for row in simulate(table, lambda action: 1.0).ranks for span in row]
    found = []
    for span in sorted(spans, key=lambda span: (span.end, span.action)):
        kind, stage, _ = made = result(span.action)
        neighbour = {"F": stage + 1, "I": stage - 1}.get(kind, stage)
        if 0 <= neighbour <= last and ranks[neighbour] != ranks[stage]:
            found.append(Transfer(made, ranks[stage], ranks[neighbour], neighbour))
    return found


def _check(table: Table, last: int) -> None:
    actions = Counter(action for row in table for action in row)
    micro_batches = 1 + max(action.micro_batch for action in actions)
    for stage in range(last + 1):
        for number in range(micro_batches):
            kinds = "".join(kind for kind in "FBIW" for _ in range(actions[Action(kind, stage, number)]))
            if kinds not in ("FB", "FIW"):
                raise UserError(
                    f"stage {stage} does {kinds or 'nothing'} for micro-batch {number}; give it F and B, or F, I and W"
                )


def _most_alive(actions: Sequence[Action]) -> int:
    alive = most = 0
    for action in actions:
        alive += {"F": 1, "I": 0}.get(action.kind, -1)
        most = max(most, alive)
    return most
