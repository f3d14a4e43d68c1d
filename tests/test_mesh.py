"""3D parallelism against one process, which ranks talk on which axis, and what the model of a step's time says."""

import dataclasses
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import UserError
from helpers.launch import RankError, run
from helpers.memory.predict import ModelShape
from helpers.parallel.mesh import AXES, Layout
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.pipeline import gpipe, idle_fraction, interleaved, one_f_one_b, zero_bubble
from helpers.parallel.step_time import Cluster, Link, TrainingJob, estimate, layouts, sort_layouts

ROWS, LENGTH, STEPS, MICRO_BATCHES = 8, 16, 20, 2
sizes = st.integers(1, 4)
some_layouts = st.builds(Layout, data=sizes, pipeline=sizes, tensor=sizes)


def optimizer_of(parameters):
    from helpers.parallel.network import EQUALITY_EPSILON

    return torch.optim.AdamW(parameters, lr=1e-3, eps=EQUALITY_EPSILON)


@lru_cache
def expected():
    def alone():
        from helpers.launch import device

        model = build(TINY, device())
        optimizer, losses = optimizer_of(model.parameters()), []
        for step in range(STEPS):
            loss = model(**batch(TINY, ROWS, LENGTH, step, device())).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return weights(model), losses

    # More ranks than a machine has GPUs: on the CPU, as the runs that are compared with it.
    return run(alone, max(2, torch.cuda.device_count() + 1)).results[0]


def train(layout, schedule):
    from helpers.launch import device
    from helpers.parallel.mesh import Parallel3D, device_mesh
    from helpers.parallel.traffic import count_traffic

    mesh = device_mesh(layout, device())
    parallel = Parallel3D(build(TINY, device()), TINY, mesh, MICRO_BATCHES, LENGTH, schedule)
    optimizer, losses = optimizer_of(parallel.parameters()), []
    for step in range(STEPS):
        data = batch(TINY, ROWS, LENGTH, step, device())
        with count_traffic() as traffic:
            losses.append(parallel.step(data["input_ids"], data["labels"]))
        optimizer.step()
        optimizer.zero_grad()
    sent = {axis: traffic.within(mesh.get_group(axis)).by_operation() for axis in AXES}
    return parallel.full_weights(), losses, sent, sum(p.nbytes for p in parallel.parameters())


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(2, 2, 2), one_f_one_b),
        (Layout(2, 2, 2), zero_bubble),
        (Layout(1, 2, 4), gpipe),
        (Layout(1, 2, 4), zero_bubble),  # ranks that share keys and values, whose gradients come late
        (Layout(2, 2, 1), interleaved),
        (Layout(2, 1, 2), one_f_one_b),
    ],
    ids=lambda value: str(value) if isinstance(value, Layout) else value.__name__,
)
def test_a_mesh_computes_what_one_process_computes(layout, schedule):
    whole, expected_losses = expected()
    found = {}
    for rank, (part, losses, _, _) in enumerate(
        run(train, layout.world_size, layout=layout, schedule=schedule).results
    ):
        if losses[0] is not None:
            assert losses == pytest.approx(expected_losses, abs=1e-5)
        for name, weight in part.items():
            assert (found.setdefault(name, weight) - weight).abs().max() <= 1e-7, (rank, name)
    assert largest_difference(found, whole) <= 1e-6


def test_every_axis_sends_what_its_formula_says():
    layout = Layout(2, 2, 2)
    results = run(train, layout.world_size, layout=layout, schedule=one_f_one_b).results
    for rank, (_, _, sent, nbytes) in enumerate(results):
        message = ROWS // layout.data // MICRO_BATCHES * LENGTH * TINY.hidden * 4
        # A stage sends what it made of each micro-batch, or the gradient of what it got.
        assert sent["pipeline"] == {"send": (MICRO_BATCHES, MICRO_BATCHES * message)}, rank
        calls, reduced = sent["data"]["all-reduce"]
        assert calls <= 2 and reduced == pytest.approx(nbytes, rel=0.01)  # 2 (n - 1) / n is 1
        layers = MICRO_BATCHES * 4 * (TINY.layers // 2) * message
        assert layers <= sent["tensor"]["all-reduce"][1] <= 1.2 * layers  # the ends add theirs


@given(some_layouts)
def test_every_axis_divides_all_ranks_into_groups(layout):
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {getattr(layout, axis)}
    assert all(group == tuple(range(group[0], group[0] + layout.tensor)) for group in layout.groups("tensor"))


def test_the_groups_are_those_of_torchs_mesh():
    def fn(layout):
        from helpers.parallel.mesh import device_mesh

        mesh = device_mesh(layout, "cpu")
        return {axis: tuple(dist.get_process_group_ranks(mesh.get_group(axis))) for axis in AXES}

    layout = Layout(2, 3, 1)
    for rank, groups in enumerate(run(fn, 6, layout=layout).results):
        for axis in AXES:
            assert next(group for group in layout.groups(axis) if rank in group) == groups[axis]


def test_bad_layouts():
    with pytest.raises(UserError, match="tensor is 0"):
        Layout(tensor=0)

    def too_many():
        from helpers.parallel.mesh import device_mesh

        device_mesh(Layout(2, 2, 2), "cpu")

    def rows():
        from helpers.parallel.mesh import Parallel3D, device_mesh

        ids = batch(TINY, 3, LENGTH)["input_ids"]
        Parallel3D(build(TINY), TINY, device_mesh(Layout(data=2), "cpu"), 1, LENGTH).step(ids, ids)

    for fn, line in ((too_many, "needs 8 ranks and there are 2"), (rows, "3 rows do not divide by 2 data parallel")):
        with pytest.raises(RankError, match=line):
            run(fn, 2)


# The time of a step

FAST, SLOW = Link(5e-6, 250e9), Link(1e-5, 25e9)
BLOOM = ModelShape(14336, 70, 112, 112, 128, 38229, 250880, tied=True)
jobs = st.builds(
    TrainingJob,
    st.builds(ModelShape, layers=st.sampled_from([8, 24]), heads=st.just(32), kv_groups=st.sampled_from([2, 32])),
    batch_size=st.sampled_from([16, 64]),
    sequence_length=st.sampled_from([128, 2048]),
    micro_batch_size=st.sampled_from([1, 2]),
    checkpointing=st.booleans(),
    zero_1=st.booleans(),
)


def cluster(ranks, **changes):
    return dataclasses.replace(Cluster(ranks, 8, 400e12, 80e9, FAST, SLOW), **changes)


@given(st.integers(1, 64))
def test_layouts_are_all_products(ranks):
    found = list(layouts(ranks))
    assert all(layout.world_size == ranks for layout in found) and len(set(found)) == len(found)
    assert len(found) == sum(ranks % (a * b) == 0 for a in range(1, ranks + 1) for b in range(1, ranks + 1))


@given(jobs, st.sampled_from([1, 2, 8, 16]))
def test_ranked_layouts_fit_first_and_then_are_fastest_first(job, ranks):
    found = sort_layouts(job, cluster(ranks, memory=30e9))
    fits = [e.memory <= 30e9 for e in found]
    assert found and fits == sorted(fits, reverse=True)
    for some in (True, False):
        times = [e.seconds for e, f in zip(found, fits, strict=True) if f == some]
        assert times == sorted(times)
    for e in found:
        assert min(e.parts.values()) >= 0 and e.compute > 0
        assert (e.bubble > 0) == (e.layout.pipeline > 1) and (e.tensor > 0) == (e.layout.tensor > 1)
        assert (e.data > 0) == (e.layout.data > 1)
        slower = estimate(job, cluster(ranks, intra_node=SLOW), e.layout)
        assert slower.seconds >= e.seconds


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 16, 64]))
def test_without_communication_the_bubble_is_the_formulas(pipeline, rows):
    free = Link(0, 1e30)
    job = TrainingJob(ModelShape(layers=8, vocab=1), rows, 128)
    e = estimate(job, cluster(pipeline, intra_node=free), Layout(1, pipeline, 1))
    assert e.bubble / e.seconds == pytest.approx(idle_fraction(pipeline, rows), abs=1e-3)


def test_a_link_is_fast_only_within_a_node():
    machines = cluster(16)
    assert machines.link(Layout(2, 1, 8), "tensor") == FAST and machines.link(Layout(2, 1, 8), "data") == SLOW
    assert machines.link(Layout(1, 1, 16), "tensor") == SLOW
    assert machines.link(Layout(2, 4, 2), "data") == FAST


def test_a_ring_takes_its_messages():
    link = Link(1.0, 10.0)
    assert link.all_reduce(400, 4) == 6 * (1 + 10) and link.all_reduce(400, 1) == 0 and link.send(20) == 3


def test_blooms_layout():
    assert BLOOM.parameters / 1e9 == pytest.approx(176.2, abs=0.1)
    job = TrainingJob(BLOOM, 2048, 2048, 2, checkpointing=True, zero_1=True)
    found = estimate(job, Cluster(384, 8, 220e12, 80e9, FAST, SLOW), Layout(8, 12, 4))
    # The FLOP of Narayanan et al. (2021), equation 3, which count the layers' attention and the head as well.
    flop = 96 * 2048 * 2048 * 70 * 14336**2 * (1 + 2048 / (6 * 14336) + 250880 / (16 * 70 * 14336))
    assert found.compute * 384 * 220e12 == pytest.approx(flop, rel=0.05)
    assert found.memory < 80e9


@pytest.mark.parametrize(
    ("layout", "rows", "line"),
    [
        (Layout(2, 2, 1), 8, "needs 4 ranks, the cluster has 8"),
        (Layout(1, 8, 1), 8, "more stages than the 4 layers"),
        (Layout(1, 1, 8), 8, "12 heads or 2 groups of keys do not divide by 8"),
        (Layout(8, 1, 1), 4, "4 rows do not divide by 8 data ranks"),
    ],
)
def test_layouts_that_do_not_divide_the_job(layout, rows, line):
    with pytest.raises(UserError, match=line):
        estimate(TrainingJob(ModelShape(layers=4, heads=12), rows, 128), cluster(8), layout)
