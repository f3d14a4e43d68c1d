"""Chapter 05: the numbering of a mesh, a rank's part, the combined step, and what its exercises ask for."""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import Function, NotYet, agree, call, exercise, without_fault
from helpers.memory.predict import ModelShape
from helpers.parallel.mesh import AXES, Layout, Parallel3D, device_mesh
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.pipeline import Executor, build_stages, one_f_one_b, partition_layers
from helpers.parallel.step_time import Cluster, Link, TrainingJob, sort_layouts
from helpers.parallel.tensor import full_weights
from helpers.parallel.traffic import count_traffic

SIZES = ((2, 2, 2), (2, 3, 4), (4, 1, 2), (3, 5, 1))  # of the axes pipeline, data, tensor
SHORT = replace(TINY, layers=4)
LENGTH = 8

# --- the chapter's own functions ---


@exercise
def rank_of(answer: Function) -> None:
    """Judge the numbering of ranks.

    Args:
        answer: Takes places on the axes pipeline, data and tensor, and the three sizes.
    """
    for sizes in SIZES:
        # In itertools.product the last axis changes fastest.
        for expected, place in enumerate(product(*(range(size) for size in sizes))):
            found = call(answer, *place, sizes)
            if found != expected:
                raise NotYet(f"on a mesh of {sizes} the rank at {place} is not {found}: tensor runs fastest, then data")


@exercise
def groups(answer: Function) -> None:
    """Judge the list of an axis's groups.

    Args:
        answer: Takes an axis and the sizes of pipeline, data and tensor.
    """
    for pipeline, data, tensor in SIZES:
        grid = torch.arange(pipeline * data * tensor).view(pipeline, data, tensor)
        for number, axis in enumerate(AXES):
            expected = {tuple(row) for row in grid.movedim(number, -1).flatten(0, -2).tolist()}
            found = [tuple(group) for group in call(answer, axis, (pipeline, data, tensor))]
            case = f"on a mesh of {pipeline, data, tensor}, axis {axis}"
            if sorted(rank for group in found for rank in group) != list(range(grid.numel())):
                raise NotYet(f"{case}: every rank should be in exactly one group")
            if {len(group) for group in found} != {grid.shape[number]}:
                raise NotYet(f"{case}: every group should have {grid.shape[number]} ranks")
            if {tuple(sorted(group)) for group in found} != expected:
                raise NotYet(f"{case}: ranks of a group differ in their place on this axis only")


def _part(answer: Function, layout: Layout) -> str | None:
    mesh, reference = device_mesh(layout, "cpu"), build(TINY)
    stages, executor = answer(mesh)
    held = sum(p.numel() for stage in stages.values() for p in stage.parameters())
    share = held / TINY.parameters * layout.pipeline * layout.tensor
    if found := agree(None if share < 1.2 else f"holds {share:.1f} times its equal part of the parameters"):
        return found
    ids = batch(TINY, 4, 16)["input_ids"]
    executor.step(ids, ids)
    reference(input_ids=ids, labels=ids).loss.backward()
    (stage,) = stages.values()
    for model in (stage, reference):
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    after, expected = full_weights(stage, mesh.get_group("tensor")), weights(reference)
    off = largest_difference(after, {name: expected[name] for name in after})
    return agree(None if off < 1e-5 else f"after one step a weight is off by {off:.2g} from a single process's")


@exercise
def my_part(answer: Function) -> None:
    """Judge a rank's part of the network: cut along the tensor axis, then along the pipeline.

    Args:
        answer: Takes a mesh, and returns this rank's stages and their executor.
    """
    for layout in (Layout(pipeline=2), Layout(pipeline=2, tensor=2)):
        without_fault(_part, layout.world_size, answer=answer, layout=layout)


class _Counted:
    """An executor that notes the sequences of each step."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.rows = executor, list[int]()

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """Run the step."""
        self.rows.append(len(ids))
        return self.executor.step(ids, labels)


def _combined(answer: Function, layout: Layout) -> str | None:
    mesh, reference = device_mesh(layout, "cpu"), build(SHORT)
    data, pipeline = mesh.get_group("data"), mesh.get_group("pipeline")
    layers = partition_layers(SHORT, layout.pipeline, LENGTH)
    stages = build_stages(build(SHORT), layers, [dist.get_rank(pipeline)])
    executor = _Counted(Executor(one_f_one_b(layout.pipeline, 2), stages, pipeline))
    (stage,) = stages.values()
    optimizer, single = (torch.optim.SGD(model.parameters(), lr=0.5) for model in (stage, reference))
    held, expected = 4 * sum(p.numel() for p in stage.parameters()), 2 * layout.data
    for step in range(2):
        ids = batch(SHORT, layout.data * expected, LENGTH, step)["input_ids"]
        with count_traffic() as traffic:
            answer(executor, stage, optimizer, ids, data)
        reference(input_ids=ids, labels=ids).loss.backward()
        single.step()
        single.zero_grad()
        fault, sent = None, traffic.within(data).sent
        if executor.rows != [expected] * (step + 1):
            fault = f"its pipeline ran {executor.rows[-1:]} sequences, its share of {len(ids)} is {expected}"
        elif (off := largest_difference(weights(stage), _of(stage, weights(reference)))) > 1e-5:
            fault = f"after step {step + 1} a weight is off by {off:.2g} from a single process's"
        elif sent > 2 * (layout.data - 1) / layout.data * held + 100:
            fault = f"the weights are right, but {sent} bytes went along the data axis: average each gradient once"
        if found := agree(fault):
            return found
    return None


def _of(stage: torch.nn.Module, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: whole[name] for name, _ in stage.named_parameters()}


@exercise
def step_in_3d(answer: Function) -> None:
    """Judge one step of a rank: its replica's sequences, the average along the data axis, the update.

    Args:
        answer: Takes an executor, its stage, an optimizer, all sequences, and the data group.
    """
    for layout in (Layout(data=2), Layout(data=3), Layout(data=2, pipeline=2)):
        without_fault(_combined, layout.world_size, answer=answer, layout=layout)


@exercise
def ring_seconds(answer: Callable[[float, int, float, float], float]) -> None:
    """Judge the time of a ring all-reduce.

    Args:
        answer: Takes bytes, ranks, a message's latency in seconds, and bytes per second.
    """
    for nbytes, n, latency, bandwidth in (
        (0.0, 4, 1e-3, 1e9),
        (8e9, 2, 0.0, 1e9),
        (8e9, 8, 1e-3, 1e10),
        (1e9, 1, 1.0, 1.0),
    ):
        found, turns = call(answer, nbytes, n, latency, bandwidth), 2 * (n - 1)
        expected = turns * latency + turns * nbytes / (n * bandwidth)
        if not abs(found - expected) < 1e-9:
            case = f"{nbytes:g} bytes on {n} ranks, {latency:g} s and {bandwidth:g} bytes/s"
            raise NotYet(f"for {case} the time is {'longer' if expected > found else 'shorter'} than {found:g} s")


# --- exercises ---


@exercise
def neighbours(group: Collection[int], crossing: int) -> None:
    """Judge the data group of rank 13, and the number of groups that cross a node of 8 GPUs.

    Args:
        group: Ranks of the group, in any order.
        crossing: Groups of all axes together.
    """
    layout = Layout(data=2, pipeline=2, tensor=4)
    if 13 not in group or len(group) != layout.data:
        raise NotYet(f"the group has rank 13 itself and the other ranks of its axis, {layout.data} in all")
    if tuple(sorted(group)) not in layout.groups("data"):
        raise NotYet("the group is not rank 13's on the data axis: its ranks have the same place on the two others")
    expected = sum(len({rank // 8 for rank in ranks}) > 1 for axis in AXES for ranks in layout.groups(axis))
    if crossing != expected:
        few = "few" if crossing < expected else "many"
        raise NotYet(f"the group is right, but {crossing} crossing groups are too {few}: which axis leaves a node?")


@exercise
def layouts(with_24_gb: Layout, with_80_gb: Layout) -> None:
    """Judge the best layouts of 16 GPUs for ChatGLM3-6B.

    Args:
        with_24_gb: If a GPU has 24 GB.
        with_80_gb: If it has 80 GB.
    """
    job = TrainingJob(ModelShape(), 64, 2048, micro_batch_size=1, checkpointing=True)
    for gigabytes, found in ((24, with_24_gb), (80, with_80_gb)):
        ranking = sort_layouts(job, Cluster(16, 8, 400e12, 1e9 * gigabytes, Link(5e-6, 250e9), Link(2e-5, 12.5e9)))
        if found == ranking[0].layout:
            continue
        places = [number for number, entry in enumerate(ranking, 1) if entry.layout == found]
        place = f"place {places[0]} of {len(ranking)}" if places else "none that fits"
        raise NotYet(f"with {gigabytes} GB, {found} is {place}: give sort_layouts the job and the cluster of the task")


def _norm(answer: Function, layout: Layout) -> str | None:
    mesh, reference = device_mesh(layout, "cpu"), build(SHORT)
    parallel = Parallel3D(build(SHORT), SHORT, mesh, 2, LENGTH)
    ids = batch(SHORT, 4, LENGTH)["input_ids"]
    parallel.step(ids, ids)
    reference(input_ids=ids, labels=ids).loss.backward()
    parameters = list(parallel.parameters())
    norms = [p for p in parameters if not hasattr(p, "shard")]
    for parameter in (*norms, *(p for name, p in reference.named_parameters() if "norm" in name)):
        if parameter.grad is not None:
            parameter.grad.mul_(30)  # so that it shows who counts them twice
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None]))
    with count_traffic() as traffic:
        answered = answer(parameters, mesh.get_group("tensor"), mesh.get_group("pipeline"))
    found = float("nan") if answered is None else float(answered)
    if not abs(found / expected - 1) < 1e-4:
        return agree(f"the norm is off by {found / expected - 1:+.2%}")
    if traffic.sent > 64:
        return agree(f"the norm is right, but it took {traffic.sent} bytes: a number per collective is enough")
    return agree(None)


@exercise
def global_norm(answer: Function) -> None:
    """Judge the norm of all gradients of a mesh, on every rank.

    Args:
        answer: Takes this rank's parameters, its tensor group and its pipeline group.
    """
    for layout in (Layout(tensor=2), Layout(pipeline=3), Layout(pipeline=2, tensor=2)):
        without_fault(_norm, layout.world_size, answer=answer, layout=layout)
