"""3D meshes and pipelines on N ranks, predicted and measured: a part of ``scaling.py --part course``."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from scaling_zero import ROWS, SHORT, STEPS, checked, launch, sizes

from helpers.launch import device
from helpers.memory.predict import ModelShape
from helpers.parallel.clock import fastest
from helpers.parallel.mesh import Layout, Parallel3D, device_mesh
from helpers.parallel.network import EQUALITY_EPSILON, TINY, batch, build, train_alone
from helpers.parallel.pipeline import (
    SCHEDULES,
    Executor,
    ScheduleTimeline,
    build_stages,
    idle_fraction,
    partition_layers,
    zero_bubble_idle_fraction,
)
from helpers.parallel.pipeline.stages import flops_per_token
from helpers.parallel.step_time import Cluster, Estimate, Link, TrainingJob, rank_correlation, sort_layouts

MICRO_BATCHES = 2  # per pipeline rank
REPEATS = 3
# CPU ranks that share a core keep the relative speed of forward and backward if each action lasts this long.
PACE = {"F": 0.02, "B": 0.04, "I": 0.02, "W": 0.02}  # seconds


def ingredients(shape: ModelShape, length: int, elements: int) -> tuple[float, float, float]:
    """Time forward and backward of one row on one rank, and all-reduces of 256 and of ``elements`` numbers."""
    model, inputs = build(shape, device()), batch(shape, 1, length, device=device())
    small, large = (torch.ones(count, device=device()) for count in (256, elements))
    actions = (
        lambda: model(**inputs).loss.backward(),
        lambda: dist.all_reduce(small),
        lambda: dist.all_reduce(large),
    )
    step, latency, transfer = (fastest(action, device(), REPEATS) for action in actions)
    return step, latency, transfer


def predict(ranks: int, shape: ModelShape, length: int) -> list[Estimate]:
    """Predict every mesh of ``ranks`` ranks from what one rank and one all-reduce take (chapter 05)."""
    elements = 2**20 if shape is TINY else 2**26  # larger for GPUs, whose links are faster
    step, small, large = launch(ingredients, ranks, shape=shape, length=length, elements=elements).results[0]
    costs = flops_per_token(shape, length)
    rate = 3 * (shape.layers * costs["layer"] + costs["head"]) * length / step
    rounds = 2 * (ranks - 1)
    link = Link(small / rounds, 4 * elements / ranks / max((large - small) / rounds, 1e-9))
    node = Cluster(ranks, ranks, rate, memory=float("inf"), intra_node=link, inter_node=link)
    return sort_layouts(TrainingJob(shape, ranks, length, micro_batch_size=1, element_bytes=4), node)


def difference_in_mesh(layout: Layout) -> float:
    """Train the tiny network; return the largest difference of this rank's weights to one process's."""
    parallel = Parallel3D(build(TINY, device()), TINY, device_mesh(layout, device()), ROWS // layout.data, SHORT)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3, eps=EQUALITY_EPSILON)
    for step in range(STEPS):
        ids = batch(TINY, ROWS, SHORT, step, device())["input_ids"]
        parallel.step(ids, ids)
        optimizer.step()
        optimizer.zero_grad()
    expected = train_alone(TINY, ROWS, SHORT, STEPS)
    return max(float((weight - expected[name]).abs().max()) for name, weight in parallel.full_weights().items())


def seconds_in_mesh(layout: Layout, shape: ModelShape, length: int) -> float:
    """Time forward and backward of a row per rank."""
    rows = layout.world_size
    parallel = Parallel3D(build(shape, device()), shape, device_mesh(layout, device()), rows // layout.data, length)
    ids = batch(shape, rows, length, device=device())["input_ids"]
    parallel.step(ids, ids)  # opens the connections
    return fastest(lambda: parallel.step(ids, ids), device(), REPEATS - 1)


def meshes_on_rank(layouts: Sequence[Layout], shape: ModelShape, length: int) -> list[tuple[float, float]]:
    """Return for each layout the difference to one process and the seconds of a step."""
    found = []
    for layout in layouts:
        found.append((difference_in_mesh(layout), seconds_in_mesh(layout, shape, length)))
        gc.collect()  # a model with hooks refers to itself
    return found


def measure_meshes(ranks: int) -> dict[str, Any]:
    """Predict and measure every mesh of ``ranks`` ranks; return the entry in the results file."""
    shape, length = sizes(ranks)
    estimates = predict(ranks, shape, length)
    found = launch(meshes_on_rank, ranks, layouts=[e.layout for e in estimates], shape=shape, length=length).results
    slowest = [max(rank[place][1] for rank in found) for place in range(len(estimates))]
    entry = {
        "ranks": ranks,
        "parameters": shape.parameters,
        "meshes": {
            str(e.layout): {"predicted_seconds": e.seconds, "measured_seconds": seconds, "parts": e.parts}
            for e, seconds in zip(estimates, slowest, strict=True)
        },
        "rank_correlation": rank_correlation([e.seconds for e in estimates], slowest),
        "best_predicted_over_best": slowest[0] / min(slowest) - 1,
        "largest_difference": max(difference for rank in found for difference, _ in rank),
    }
    return checked(f"a mesh of {ranks} ranks", entry)


def pipeline_on_rank(names: Sequence[str], shape: ModelShape, length: int) -> list[list[Any]]:
    """Return what ran when on this rank in the second step, for each schedule."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids = batch(shape, MICRO_BATCHES * ranks, length, device=device())["input_ids"]
    record = []
    for name in names:
        schedule = SCHEDULES[name](ranks, MICRO_BATCHES * ranks)
        stages = 1 + max(action.stage for row in schedule for action in row)
        layers = partition_layers(shape, stages, length)
        own = {action.stage for action in schedule[rank]}
        pace = {kind: seconds * ranks / stages for kind, seconds in PACE.items()} if shape is TINY else None
        executor = Executor(schedule, build_stages(build(shape, device()), layers, own), pace=pace)
        for _ in range(2):  # the first opens the connections
            dist.barrier()
            spans = executor.step(ids, ids).spans
        record.append(spans)
        del executor
        gc.collect()
    return record


def measure_pipelines(ranks: int) -> dict[str, Any]:
    """Measure the idle fraction of every schedule that has enough layers; return the entry in the results file."""
    shape, length = sizes(ranks)
    micro_batches = MICRO_BATCHES * ranks
    formulas = {
        "GPipe": idle_fraction(ranks, micro_batches),
        "1F1B": idle_fraction(ranks, micro_batches),
        "zero-bubble": zero_bubble_idle_fraction(ranks, micro_batches),
    }
    if 2 * ranks <= shape.layers:
        formulas["interleaved 1F1B"] = idle_fraction(ranks, micro_batches, chunks=2)
    found = launch(pipeline_on_rank, ranks, names=list(formulas), shape=shape, length=length).results
    timelines = {
        name: ScheduleTimeline(list(each)) for name, each in zip(formulas, zip(*found, strict=True), strict=True)
    }
    return {
        "ranks": ranks,
        "parameters": shape.parameters,
        "micro_batches": micro_batches,
        "schedules": {
            name: {
                "idle_formula": formulas[name],
                "idle_measured": timeline.idle,
                "step_seconds": timeline.seconds,
            }
            for name, timeline in timelines.items()
        },
    }
