"""Derive what a pipeline schedule should do: times, inputs, and whether it is complete."""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from helpers.errors import UserError
from helpers.exercises.answers import NotYet
from helpers.parallel.pipeline import Action, Schedule, ScheduleTimeline, gpipe, simulate

TIMES = {"F": 1, "B": 2}


def needed(action: Action, last: int) -> list[Action]:
    """Return the actions whose results F or B takes in; ``last`` is the number of the last stage."""
    kind, stage, number = action
    if kind == "F":
        return [Action("F", stage - 1, number)] if stage else []
    return [Action("F", stage, number), *([Action("B", stage + 1, number)] if stage < last else [])]


def last_stage(schedule: Schedule) -> int:
    """Return the number of the last stage."""
    return max(action.stage for actions in schedule for action in actions)


def ideal(schedule: Schedule, seconds: Mapping[str, float]) -> list[list[tuple[Action, float, float]]]:
    """Compute when each action starts and ends on ideal ranks.

    Args:
        schedule: One that can end.
        seconds: Of each kind of action.

    Returns:
        Per rank action, start and end, in the order of its list.
    """
    last = last_stage(schedule)
    before = {later: earlier for actions in schedule for earlier, later in pairwise(actions)}

    @cache
    def end(action: Action) -> float:
        first = [before[action]] if action in before else []
        return max((end(need) for need in (*first, *needed(action, last))), default=0.0) + seconds[action.kind]

    return [[(action, end(action) - seconds[action.kind], end(action)) for action in actions] for actions in schedule]


def inputs(schedule: Schedule) -> dict[Action, float | None]:
    """Compute what each action receives if an action returns twice its input plus the number of its stage.

    Args:
        schedule: F starts with the number of the micro-batch plus 1 at the first stage, B at the last one.

    Returns:
        The numbers by action; None if it receives nothing.
    """
    last = last_stage(schedule)

    @cache
    def received(action: Action) -> float | None:
        others = [need for need in needed(action, last) if need.stage != action.stage]
        if not others:
            return None
        x = received(others[0])
        return (others[0].micro_batch + 1.0 if x is None else x) * 2 + others[0].stage

    return {action: received(action) for actions in schedule for action in actions}


def timeline_of(found: Any, ranks: int, micro_batches: int) -> ScheduleTimeline:
    """Check that a schedule with a stage per rank is complete, and simulate it.

    Args:
        found: What an answer returned.
        ranks: Their number.
        micro_batches: Their number.

    Returns:
        What runs when.

    Raises:
        NotYet: It is not a schedule, not complete, or never ends.
    """
    where = f"with {ranks} ranks and {micro_batches} micro-batches"
    try:
        schedule = [[Action(*action) for action in actions] for actions in found]
    except TypeError:
        raise NotYet(f"{where}, it does not return a list of actions per rank") from None
    expected = [sorted(actions) for actions in gpipe(ranks, micro_batches)]
    if [sorted(actions) for actions in schedule] != expected:
        raise NotYet(f"{where}, a rank does not have one F and one B of its stage for each micro-batch")
    try:
        return simulate(schedule, lambda action: TIMES[action.kind])
    except UserError as error:
        raise NotYet(f"{where}, {error}") from None


def check_idle(timeline: ScheduleTimeline, expected: float, where: str) -> None:
    """Compare the idle fraction.

    Args:
        timeline: Of the answer.
        expected: Its idle fraction.
        where: Begins the sentence.

    Raises:
        NotYet: It is another one.
    """
    if not abs(timeline.idle - expected) < 1e-9:
        more = "more" if timeline.idle > expected else "less"
        raise NotYet(f"{where}, the ranks idle {timeline.idle:.3f} of the time, {more} than they should")
