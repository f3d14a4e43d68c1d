"""Pipeline parallelism, as chapter 03 derives it: stages of layers, schedules of actions, one executor for all of them.

``stages`` partitions the layers, ``schedules`` lists what each rank does, ``timeline`` derives dependencies and ideal
times from such a list, ``executor`` runs it on real ranks, ``deferred_gradients`` splits a backward pass in two.
"""

from helpers.parallel.pipeline.executor import Executor, StepResult
from helpers.parallel.pipeline.schedules import (
    SCHEDULES,
    Action,
    Schedule,
    gpipe,
    idle_fraction,
    interleaved,
    one_f_one_b,
    zero_bubble,
    zero_bubble_idle_fraction,
)
from helpers.parallel.pipeline.stages import Stage, build_stages, causal_lm_loss, partition_layers
from helpers.parallel.pipeline.timeline import ScheduleTimeline, TimedAction, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Executor",
    "Schedule",
    "ScheduleTimeline",
    "Stage",
    "StepResult",
    "TimedAction",
    "build_stages",
    "causal_lm_loss",
    "gpipe",
    "idle_fraction",
    "interleaved",
    "one_f_one_b",
    "partition_layers",
    "simulate",
    "zero_bubble",
    "zero_bubble_idle_fraction",
]
