"""helpers.parallel.data against a single process that sees all rows."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import GPUS
from hypothesis import given
from hypothesis import strategies as st
from one_process import LENGTH, ROWS, STEPS, TWO_LAYERS, make_optimizer, train_alone
from shared_launch import SharedLaunches, backward_that_breaks_off, refusals

from helpers.launch import device
from helpers.memory.ledger import count_bytes
from helpers.parallel.buckets import assign_buckets
from helpers.parallel.clock import Event
from helpers.parallel.data import (
    BucketedDataParallel,
    average_gradients,
    broadcast_parameters,
    loss_weight,
    ring_all_reduce,
)
from helpers.parallel.network import batch, build, largest_difference, weights
from helpers.parallel.traffic import count_traffic

pytestmark = pytest.mark.slow
KIB = 1024
RANKS = max(2, GPUS)
shared = SharedLaunches(__name__)


def train(parallelise, micro_batches=1, rows=ROWS, ignored=0):
    """Train on this rank's rows; the weights, and the bytes sent in the last step.

    ``ignored`` labels of the first row count for nothing, so that ranks have different numbers of tokens.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TWO_LAYERS, device(), seed=rank)  # ranks start apart: the first one's weights must win
    wrapped, synchronise = parallelise(model)
    optimizer = make_optimizer(model.parameters())
    for step in range(STEPS):
        whole = batch(TWO_LAYERS, rows, LENGTH, step, device())
        labels = whole["labels"].clone()
        labels[0, :ignored] = -100
        with count_traffic() as traffic:
            for micro in range(micro_batches):
                chosen = torch.arange(micro, rows, micro_batches)
                chosen = chosen[len(chosen) * rank // n : len(chosen) * (rank + 1) // n]
                last = micro == micro_batches - 1
                # Forward as well: DDP decides there whether the backward that follows is to average.
                with nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
                    loss = wrapped(input_ids=whole["input_ids"][chosen], labels=labels[chosen]).loss / micro_batches
                    if ignored or rows % n:
                        tokens = int((labels[chosen][:, 1:] != -100).sum())
                        loss = loss * loss_weight(tokens, device=device())
                    loss.backward()
            synchronise()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), traffic.sent


def on_its_own(model):
    return model, lambda: None


def by_hand(model):
    broadcast_parameters(model)
    return model, lambda: average_gradients(model.parameters())


def small_buckets(model):
    return BucketedDataParallel(model, bucket_bytes=64 * KIB), lambda: None


def large_buckets(model):
    return BucketedDataParallel(model), lambda: None


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model), lambda: None


def trained(parallelise, nprocs=RANKS, **options):
    return shared.case(nprocs, train, parallelise=parallelise, **options)


def by_name(*ways, **options):
    return [pytest.param(trained(way, **options), id=way.__name__) for way in ways]


@pytest.mark.parametrize("case", by_name(by_hand, small_buckets, large_buckets, ddp))
def test_ranks_compute_what_one_process_computes(case):
    for found, sent in case.results:
        assert largest_difference(found, train_alone(TWO_LAYERS, RANKS).weights) <= 1e-6
        # The gradients once, in a ring. DDP's first broadcast is over when the last step is counted.
        assert sent == pytest.approx(2 * (RANKS - 1) / RANKS * 4 * TWO_LAYERS.parameters, rel=0.01)


@pytest.mark.parametrize("case", [trained(on_its_own)])
def test_without_averaging_they_drift_apart(case):
    found, _ = case.results[0]
    assert largest_difference(found, train_alone(TWO_LAYERS, RANKS).weights) > 1e-3


@pytest.mark.parametrize("case", by_name(small_buckets, ddp, micro_batches=2))
def test_accumulation_sends_once(case):
    found, sent = case.results[0]
    assert largest_difference(found, train_alone(TWO_LAYERS, RANKS).weights) <= 1e-6
    assert sent == pytest.approx(2 * (RANKS - 1) / RANKS * 4 * TWO_LAYERS.parameters, rel=0.01)


@pytest.mark.parametrize(
    ("case", "rows", "ignored"),
    [(trained(small_buckets, 3, rows=rows, ignored=ignored), rows, ignored) for rows, ignored in ((7, 0), (8, 12))],
    ids=["7-0", "8-12"],
)
def test_uneven_ranks_are_weighted_by_their_tokens(case, rows, ignored):
    found, _ = case.results[1]
    assert largest_difference(found, train_alone(TWO_LAYERS, 3, rows=rows, ignored=ignored).weights) <= 1e-6


@shared.on(4)
def in_two_groups():
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    model = torch.nn.Linear(1, 1, bias=False, device=device())
    torch.nn.init.constant_(model.weight, float(rank))
    BucketedDataParallel(model, group=groups[rank % 2])(torch.tensor([[float(rank)]], device=device())).sum().backward()
    return model.weight.item(), model.weight.grad.item()


def test_a_group_averages_for_itself():
    # Weights of each group's first rank, the mean of its members' inputs.
    assert in_two_groups.results == [(0, 1), (1, 2), (0, 1), (1, 2)]


@shared.on(2)
def bytes_and_buckets():
    model = BucketedDataParallel(build(TWO_LAYERS, device()), bucket_bytes=50 * KIB)
    model(**batch(TWO_LAYERS, 2, 8, device=device())).loss.backward()
    return count_bytes(model.module).categories["gradients"], len(model.buckets)


def test_buckets_are_the_gradients():
    size, buckets = bytes_and_buckets.results[0]
    assert size == 4 * TWO_LAYERS.parameters and buckets > 8


@shared.on(2)
def frozen_and_tied():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3))
    model.to(device())
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    parallel = BucketedDataParallel(model)
    inputs = [torch.full((1, 3), 1.0 + rank, device=device()) for rank in range(2)]
    parallel(inputs[dist.get_rank()]).sum().backward()
    averaged = model[0].weight.grad.clone()
    model.zero_grad()
    sum(torch.func.functional_call(model, dict(model.named_parameters()), x).sum() for x in inputs).div(2).backward()
    return torch.allclose(averaged, model[0].weight.grad), model[1].weight.grad


def test_frozen_and_tied_parameters():
    assert frozen_and_tied.results == [(True, None)] * 2


@shared.on(2)
def bytes_between_steps():
    model = BucketedDataParallel(build(TWO_LAYERS, device()), bucket_bytes=50 * KIB)
    found = []
    for _ in range(2):
        found.append(count_bytes(model).categories)
        model(**batch(TWO_LAYERS, 2, 8, device=device())).loss.backward()
        found.append(count_bytes(model).categories)
        model.zero_grad()
    return found


def test_the_ledger_counts_the_buckets_once():
    whole = 4 * TWO_LAYERS.parameters
    for found in bytes_between_steps.results:
        for held, gradients in zip(found, (0, whole, 0, whole), strict=True):
            assert held["gradients"] == gradients
            assert held["communication buffers"] == whole - gradients


def gradients_after_an_error(at_once):
    """What a backward that broke off raised; how far the next one is from the mean over ranks, and from its own."""
    model = BucketedDataParallel(build(TWO_LAYERS, device()), bucket_bytes=64 * KIB)
    inputs, other = ({k: v.clone() for k, v in batch(TWO_LAYERS, 2, 8, rank, device()).items()} for rank in (0, 1))
    mine = [inputs, other][dist.get_rank()]
    prepared = model(**mine).loss if at_once else None
    refused = refusals(lambda: backward_that_breaks_off(model.module, mine))
    model.zero_grad()
    (model(**mine).loss if prepared is None else prepared).backward()
    found = {name: p.grad.clone() for name, p in model.module.named_parameters()}
    alone = build(TWO_LAYERS, device())
    differences = []
    for weighed in ((inputs, other), (mine,)):
        alone.zero_grad()
        for part in weighed:
            (alone(**part).loss / len(weighed)).backward()
        differences.append(largest_difference(found, {name: p.grad for name, p in alone.named_parameters()}))
    return refused, *differences


@pytest.mark.parametrize(
    "case", [pytest.param(shared.case(2, gradients_after_an_error, at_once=b), id=f"{b}") for b in (False, True)]
)
def test_the_backward_after_one_that_broke_off_averages(case):
    for refused, to_the_mean, to_its_own in case.results:
        assert refused == [("RuntimeError", "out of memory, say")]
        assert to_the_mean <= 1e-6 and to_its_own > 1e-3


def sum_in_a_ring():
    x = torch.arange(24.0, device=device()).view(2, 12) * (1 + dist.get_rank())
    assert torch.equal(ring_all_reduce(x.T), ring_all_reduce(x).T)  # not contiguous
    before = x.clone()
    with count_traffic() as traffic:
        total = ring_all_reduce(x)
    assert torch.equal(x, before)
    return total.cpu(), traffic.sent


@pytest.mark.parametrize(
    ("case", "ranks"), [pytest.param(shared.case(ranks, sum_in_a_ring), ranks, id=str(ranks)) for ranks in (1, 2, 3, 4)]
)
def test_the_ring_sums_and_sends_what_the_formula_says(case, ranks):
    for total, sent in case.results:
        assert torch.equal(total, torch.arange(24.0).view(2, 12) * sum(range(1, ranks + 1)))
        assert sent == 2 * (ranks - 1) / ranks * 24 * 4


def unused_parameter():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)}).to(device())
    BucketedDataParallel(model)
    model["used"](torch.ones(1, 2, device=device())).sum().backward()


@shared.on(2)
def bad_uses():
    return refusals(
        unused_parameter,
        lambda: ring_all_reduce(torch.ones(3)),
        lambda: loss_weight(0, device=device()),
        lambda: BucketedDataParallel(torch.nn.Linear(1, 1, device=device()), bucket_bytes=0),
    )


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (0, "no gradient for idle.weight (2 such parameters)"),
        (1, "3 elements do not divide by 2 ranks; pad the tensor"),
        (2, "no rank has a token to learn from"),
        (3, "bucket_bytes is 0; give a size above 0"),
    ],
)
def test_bad_use_is_named(number, line):
    for refused in bad_uses.results:
        error, message = refused[number]
        assert error == "UserError" and line in message


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), limit=st.integers(1, 400), data=st.data())
def test_buckets_hold_every_parameter_once_last_ones_first(sizes, limit, data):
    halves = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    parameters = [
        torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16 if half else torch.float32))
        for size, half in zip(sizes, halves, strict=True)
    ]
    buckets = assign_buckets(torch.nn.ParameterList(parameters), limit)
    assert [p.shape for bucket in buckets for p in bucket] == [p.shape for p in reversed(parameters)]
    for bucket in buckets:
        assert len({p.dtype for p in bucket}) == 1
        assert len(bucket) == 1 or sum(p.nbytes for p in bucket) <= limit


def test_events_are_in_order():
    first, second = Event("cpu"), Event("cpu")
    assert second.since(first) >= 0 >= first.since(second)
