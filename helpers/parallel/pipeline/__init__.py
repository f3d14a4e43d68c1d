"""Pipeline parallelism, as chapter 03 derives it: layers cut into stages, a table of actions, one executor for all."""

from helpers.parallel.pipeline.executor import Executor, Step
from helpers.parallel.pipeline.schedules import (
    SCHEDULES,
    Action,
    Table,
    gpipe,
    idle_fraction,
    interleaved,
    one_f_one_b,
    zero_bubble,
    zero_bubble_idle_fraction,
)
from helpers.parallel.pipeline.stages import Stage, causal_loss, cut, stages_of
from helpers.parallel.pipeline.timeline import Timed, Timeline, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Executor",
    "Stage",
    "Step",
    "Table",
    "Timed",
    "Timeline",
    "causal_loss",
    "cut",
    "gpipe",
    "idle_fraction",
    "interleaved",
    "one_f_one_b",
    "simulate",
    "stages_of",
    "zero_bubble",
    "zero_bubble_idle_fraction",
]
