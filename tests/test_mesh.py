"""3D parallelism against one process, which ranks talk on which axis, and what the model of a step's time says."""

import dataclasses

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from one_process import FOUR_LAYERS, LENGTH, ROWS, STEPS, make_optimizer, train_alone
from shared_launch import SharedLaunches, refusals

from helpers.errors import UserError
from helpers.launch import device
from helpers.memory.predict import ModelShape
from helpers.parallel.mesh import AXES, Layout, Parallel3D, device_mesh
from helpers.parallel.network import batch, build, largest_difference
from helpers.parallel.pipeline import gpipe, idle_fraction, interleaved, one_f_one_b, zero_bubble
from helpers.parallel.step_time import Cluster, Link, TrainingJob, estimate, layouts, rank_correlation, sort_layouts
from helpers.parallel.traffic import count_traffic

MICRO_BATCHES = 2
sizes = st.integers(1, 4)
some_layouts = st.builds(Layout, data=sizes, pipeline=sizes, tensor=sizes)
shared = SharedLaunches(__name__)


def train(layout, schedule):
    mesh = device_mesh(layout, device())
    parallel = Parallel3D(build(FOUR_LAYERS, device()), FOUR_LAYERS, mesh, MICRO_BATCHES, LENGTH, schedule)
    optimizer, losses = make_optimizer(parallel.parameters()), []
    for step in range(STEPS):
        data = batch(FOUR_LAYERS, ROWS, LENGTH, step, device())
        with count_traffic() as traffic:
            losses.append(parallel.step(data["input_ids"], data["labels"]))
        optimizer.step()
        optimizer.zero_grad()
    sent = {axis: traffic.within(mesh.get_group(axis)).by_operation() for axis in AXES}
    return parallel.full_weights(), losses, sent, sum(p.nbytes for p in parallel.parameters())


TRAINED = {
    (layout, schedule): shared.case(layout.world_size, train, layout=layout, schedule=schedule)
    for layout, schedule in (
        (Layout(2, 2, 2), one_f_one_b),
        (Layout(2, 2, 2), zero_bubble),
        (Layout(1, 2, 4), gpipe),
        (Layout(1, 2, 4), zero_bubble),  # ranks that share keys and values, whose gradients come late
        (Layout(2, 2, 1), interleaved),
        (Layout(2, 1, 2), one_f_one_b),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "schedule"), TRAINED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_mesh_computes_what_one_process_computes(layout, schedule):
    # More ranks than a machine has GPUs run on the CPU, and so does the process that they are compared with.
    expected = train_alone(FOUR_LAYERS, layout.world_size)
    found = {}
    for rank, (part, losses, _, _) in enumerate(TRAINED[layout, schedule].results):
        if losses[0] is not None:
            assert losses == pytest.approx(expected.losses, abs=1e-5)
        for name, weight in part.items():
            assert (found.setdefault(name, weight) - weight).abs().max() <= 1e-7, (rank, name)
    assert largest_difference(found, expected.weights) <= 1e-6


@pytest.mark.slow
def test_every_axis_sends_what_its_formula_says():
    layout = Layout(2, 2, 2)
    for rank, (_, _, sent, nbytes) in enumerate(TRAINED[layout, one_f_one_b].results):
        message = ROWS // layout.data // MICRO_BATCHES * LENGTH * FOUR_LAYERS.hidden * 4
        # A stage sends what it made of each micro-batch, or the gradient of what it got.
        assert sent["pipeline"] == {"send": (MICRO_BATCHES, MICRO_BATCHES * message)}, rank
        calls, reduced = sent["data"]["all-reduce"]
        assert calls <= 2 and reduced == pytest.approx(nbytes, rel=0.01)  # 2 (n - 1) / n is 1
        layers = MICRO_BATCHES * 4 * (FOUR_LAYERS.layers // 2) * message
        assert layers <= sent["tensor"]["all-reduce"][1] <= 1.2 * layers  # the ends add theirs


@given(some_layouts)
def test_every_axis_divides_all_ranks_into_groups(layout):
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {getattr(layout, axis)}
    assert all(group == tuple(range(group[0], group[0] + layout.tensor)) for group in layout.groups("tensor"))


def ranks_by_axis(layout):
    mesh = device_mesh(layout, device())
    return {axis: tuple(dist.get_process_group_ranks(mesh.get_group(axis))) for axis in AXES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "case"),
    [(layout, shared.case(layout.world_size, ranks_by_axis, layout=layout)) for layout in [Layout(2, 3, 1)]],
)
def test_the_groups_are_those_of_torchs_mesh(layout, case):
    for rank, groups in enumerate(case.results):
        for axis in AXES:
            assert next(group for group in layout.groups(axis) if rank in group) == groups[axis]


def odd_rows():
    ids, mesh = batch(FOUR_LAYERS, 3, LENGTH, device=device())["input_ids"], device_mesh(Layout(data=2), device())
    Parallel3D(build(FOUR_LAYERS, device()), FOUR_LAYERS, mesh, 1, LENGTH).step(ids, ids)


@shared.on(2)
def bad_layouts():
    return refusals(lambda: device_mesh(Layout(2, 2, 2), device()), odd_rows)


@pytest.mark.slow
def test_bad_layouts():
    with pytest.raises(UserError, match="tensor is 0"):
        Layout(tensor=0)
    for (_, too_many), (_, rows) in bad_layouts.results:
        assert "needs 8 ranks and there are 2" in too_many
        assert "3 rows do not divide by 2 data parallel" in rows


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


def test_orders_correlate_from_one_to_minus_one():
    assert rank_correlation([1, 2, 3], [10.0, 20.0, 99.0]) == 1 and rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    # Two neighbours change places: d is 1 twice, so 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([0.1, 0.2, 0.3, 0.4], [5, 9, 7, 11]) == pytest.approx(0.8)


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
