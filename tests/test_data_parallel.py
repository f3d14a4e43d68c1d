"""helpers.parallel.data against a single process that sees all rows."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import UserError
from helpers.launch import RankError, run
from helpers.parallel.buckets import assign_buckets
from helpers.parallel.clock import Event
from helpers.parallel.network import TINY, batch, build, largest_difference

STEPS, ROWS, LENGTH = 20, 8, 16
KIB = 1024


def train(parallelise, steps=STEPS, micro_batches=1, rows=ROWS, alone=False, ignore=0):
    """Train on this rank's rows, or on all of them alone; the weights, and the bytes sent in the last step.

    ``ignore`` labels of the first row count for nothing, so that ranks have different numbers of tokens.
    """
    import helpers.parallel.data as data
    from helpers.launch import device
    from helpers.parallel.network import EQUALITY_EPSILON, weights
    from helpers.parallel.traffic import count_traffic

    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TINY, device(), seed=0 if alone else rank)  # ranks start apart: the first one's weights must win
    wrapped, synchronise = parallelise(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EQUALITY_EPSILON)
    for step in range(steps):
        whole = batch(TINY, rows, LENGTH, step, device())
        labels = whole["labels"].clone()
        labels[0, :ignore] = -100
        with count_traffic() as traffic:
            for micro in range(micro_batches):
                chosen = torch.arange(micro, rows, micro_batches)
                chosen = chosen if alone else chosen[len(chosen) * rank // n : len(chosen) * (rank + 1) // n]
                last = micro == micro_batches - 1
                # Forward as well: DDP decides there whether the backward that follows is to average.
                with nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
                    loss = wrapped(input_ids=whole["input_ids"][chosen], labels=labels[chosen]).loss / micro_batches
                    if not alone and (ignore or rows % n):
                        tokens = int((labels[chosen][:, 1:] != -100).sum())
                        loss = loss * data.loss_weight(tokens, device=device())
                    loss.backward()
            synchronise()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), traffic.sent


def on_its_own(model, data):
    return model, lambda: None


def by_hand(model, data):
    data.broadcast_parameters(model)
    return model, lambda: data.average_gradients(model.parameters())


def small_buckets(model, data):
    return data.BucketedDataParallel(model, bucket_bytes=64 * KIB), lambda: None


def large_buckets(model, data):
    return data.BucketedDataParallel(model), lambda: None


def ddp(model, data):
    return torch.nn.parallel.DistributedDataParallel(model), lambda: None


RANKS = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 2


@pytest.fixture(scope="module")
def expected():
    return run(train, RANKS, parallelise=on_its_own, alone=True).results[0][0]


@pytest.mark.parametrize("parallelise", [by_hand, small_buckets, large_buckets, ddp])
def test_ranks_compute_what_one_process_computes(expected, parallelise):
    for found, sent in run(train, RANKS, parallelise=parallelise).results:
        assert largest_difference(found, expected) <= 1e-6
        # The gradients once, in a ring. DDP's first broadcast is over when the last step is counted.
        assert sent == pytest.approx(2 * (RANKS - 1) / RANKS * 4 * TINY.parameters, rel=0.01)


def test_without_averaging_they_drift_apart(expected):
    found, _ = run(train, RANKS, parallelise=on_its_own).results[0]
    assert largest_difference(found, expected) > 1e-3


@pytest.mark.parametrize("parallelise", [small_buckets, ddp])
def test_accumulation_sends_once(parallelise):
    expected, _ = run(train, RANKS, parallelise=on_its_own, alone=True, micro_batches=2).results[0]
    found, sent = run(train, RANKS, parallelise=parallelise, micro_batches=2).results[0]
    assert largest_difference(found, expected) <= 1e-6
    assert sent == pytest.approx(2 * (RANKS - 1) / RANKS * 4 * TINY.parameters, rel=0.01)


@pytest.mark.parametrize(("rows", "ignore"), [(7, 0), (8, 12)])
def test_uneven_ranks_are_weighted_by_their_tokens(rows, ignore):
    expected, _ = run(train, 3, parallelise=on_its_own, alone=True, rows=rows, ignore=ignore).results[0]
    found, _ = run(train, 3, parallelise=small_buckets, rows=rows, ignore=ignore).results[1]
    assert largest_difference(found, expected) <= 1e-6


def test_a_group_averages_for_itself():
    def fn():
        from helpers.parallel.data import BucketedDataParallel

        rank = dist.get_rank()
        groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, float(rank))
        BucketedDataParallel(model, group=groups[rank % 2])(torch.tensor([[float(rank)]])).sum().backward()
        return model.weight.item(), model.weight.grad.item()

    # Weights of each group's first rank, the mean of its members' inputs.
    assert run(fn, 4).results == [(0, 1), (1, 2), (0, 1), (1, 2)]


def test_buckets_are_the_gradients():
    def fn():
        from helpers.memory.ledger import count_bytes
        from helpers.parallel.data import BucketedDataParallel

        model = BucketedDataParallel(build(TINY), bucket_bytes=100 * KIB)
        model(**batch(TINY, 2, 8)).loss.backward()
        return count_bytes(model.module).categories["gradients"], len(model.buckets)

    size, buckets = run(fn, 2).results[0]
    assert size == 4 * TINY.parameters and buckets > 8


def test_an_unused_parameter_is_named():
    def fn():
        from helpers.parallel.data import BucketedDataParallel

        model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
        BucketedDataParallel(model)
        model["used"](torch.ones(1, 2)).sum().backward()

    with pytest.raises(RankError, match=r"no gradient for idle\.weight \(2 such parameters\)"):
        run(fn, 2)


def test_frozen_and_tied_parameters():
    def fn():
        from helpers.parallel.data import BucketedDataParallel

        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3))
        model[2].weight = model[0].weight
        model[1].requires_grad_(False)
        parallel = BucketedDataParallel(model)
        x = torch.full((1, 3), 1.0 + dist.get_rank())
        parallel(x).sum().backward()
        averaged = model[0].weight.grad.clone()
        model.zero_grad()
        sum(
            torch.func.functional_call(model, dict(model.named_parameters()), torch.full((1, 3), 1.0 + rank)).sum()
            for rank in range(2)
        ).div(2).backward()
        return torch.allclose(averaged, model[0].weight.grad), model[1].weight.grad

    assert run(fn, 2).results == [(True, None)] * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ring_sums_and_sends_what_the_formula_says(ranks):
    def fn():
        from helpers.launch import device
        from helpers.parallel.data import ring_all_reduce
        from helpers.parallel.traffic import count_traffic

        x = torch.arange(24.0, device=device()).view(2, 12) * (1 + dist.get_rank())
        before = x.clone()
        with count_traffic() as traffic:
            total = ring_all_reduce(x)
        assert torch.equal(x, before)
        return total.cpu(), traffic.sent

    for total, sent in run(fn, ranks).results:
        assert torch.equal(total, torch.arange(24.0).view(2, 12) * sum(range(1, ranks + 1)))
        assert sent == 2 * (ranks - 1) / ranks * 24 * 4


def test_bad_arguments():
    def ring():
        from helpers.parallel.data import ring_all_reduce

        ring_all_reduce(torch.ones(3))

    def weight():
        from helpers.parallel.data import loss_weight

        loss_weight(0)

    def bucket():
        from helpers.parallel.data import BucketedDataParallel

        BucketedDataParallel(torch.nn.Linear(1, 1), bucket_bytes=0)

    for fn, line in (
        (ring, "3 elements do not divide by 2 ranks; pad the tensor"),
        (weight, "no rank has a token to learn from"),
        (bucket, "bucket_bytes is 0; give a size above 0"),
    ):
        with pytest.raises(RankError, match=line) as error:
            run(fn, 2)
        assert error.value.type == UserError.__name__


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
