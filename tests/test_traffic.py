"""What the system counts of the bytes that ranks send, against what a collective must send."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from conftest import GPUS
from shared_launch import SharedLaunches

from helpers.launch import device
from helpers.parallel import traffic
from helpers.parallel.clock import time_all_reduces
from helpers.parallel.traffic import count_traffic, loopback_bytes, loopback_bytes_during

shared = SharedLaunches(__name__)
# More than a machine has GPUs, so that they send over the loopback interface.
RANKS = GPUS + 3
MIB = 2**20
OTHERS = 8 * MIB  # on this machine may talk as well


@shared.on(RANKS, tries=50, mib=32)
def broadcasts(tries, mib):
    """Bytes that the system counts during a broadcast of ``mib``; again as long as others talk too much meanwhile."""
    x, sent = torch.ones(mib << 18), []
    for _ in range(tries):
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()
        dist.broadcast(x, 0)
        dist.barrier()
        sent.append(loopback_bytes() - before)
        disturbed = torch.tensor(sent[-1] >= mib * MIB * (dist.get_world_size() - 1) + OTHERS)
        dist.broadcast(disturbed, 0)
        if not disturbed:
            break
    return sent


@shared.on(RANKS, mib=8)
def one_broadcast(mib):
    x = torch.ones(mib << 18)
    return loopback_bytes_during(lambda: dist.broadcast(x, 0))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts, others do not")
def test_what_all_ranks_send_during_an_action_is_counted():
    for nbytes in one_broadcast.results:
        assert nbytes >= 8 * MIB * (RANKS - 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts, others do not")
def test_a_broadcast_sends_its_tensor_to_every_other_rank():
    sent = broadcasts.results[0]
    assert 32 * MIB * (RANKS - 1) <= min(sent) < 32 * MIB * (RANKS - 1) + OTHERS


def test_the_counter_is_the_one_of_bytes_sent(monkeypatch, tmp_path):
    file = tmp_path / "dev"
    file.write_text(
        "Inter-| Receive | Transmit\n face |bytes packets\n"
        "  eth0: 1 2 3 4 5 6 7 8 9 10\n    lo: 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26\n"
    )
    monkeypatch.setattr(traffic, "INTERFACES", file)
    assert traffic.loopback_bytes() == 19


def test_no_number_is_made_up_where_nothing_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(traffic, "INTERFACES", tmp_path / "missing")
    assert traffic.loopback_bytes() is None


@shared.on(3, calls=2)
def collectives(calls):
    """Every kind of collective, ``calls`` times; what was counted, by name."""
    rank, n, x = dist.get_rank(), dist.get_world_size(), torch.ones(240, device=device())
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2])][0 if rank < 2 else 1]
    operations = {
        "all-reduce": lambda: dist.all_reduce(x),
        "all-reduce of a pair": lambda: dist.all_reduce(x, group=pair),
        "all-gather": lambda: dist.all_gather([torch.empty_like(x) for _ in range(n)], x),
        "all-gather into one": lambda: dist.all_gather_into_tensor(x.new_empty(240 * n), x),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(x.new_empty(240 // n), x),
        "all-to-all": lambda: dist.all_to_all_single(torch.empty_like(x), x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "functional all-reduce": lambda: functional.all_reduce(x, "sum", dist.group.WORLD) + 1,
        "ring": lambda: to_the_next(x),
        "barrier": dist.barrier,
    }
    counted = {}
    for name, operation in operations.items():
        with count_traffic() as traffic:
            for _ in range(calls):
                operation()
        counted[name] = (traffic.by_operation(), traffic.sent, traffic.within(pair).sent)
    return counted


def to_the_next(x):
    rank, n = dist.get_rank(), dist.get_world_size()
    ops = [dist.P2POp(dist.isend, x, (rank + 1) % n), dist.P2POp(dist.irecv, torch.empty_like(x), (rank - 1) % n)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


@pytest.mark.slow
def test_every_collective_is_counted_with_what_it_must_send():
    first, _, last = collectives.results
    whole = 2 * 960  # bytes of x, in two calls
    for name, operation, share, size in (
        ("all-reduce", "all-reduce", 4 / 3, 1),
        ("all-gather", "all-gather", 2 / 3, 3),
        ("all-gather into one", "all-gather", 2 / 3, 3),
        ("reduce-scatter", "reduce-scatter", 2 / 3, 1),
        ("all-to-all", "all-to-all", 2 / 3, 1),
        ("broadcast", "broadcast", 2 / 3, 1),
        ("functional all-reduce", "all-reduce", 4 / 3, 1),
        ("ring", "send", 1, 1),
    ):
        assert first[name][:2] == ({operation: (2, share * size * whole)}, share * size * whole), name
        assert first[name][2] == 0  # nothing of it within the pair
    assert first["all-reduce of a pair"] == ({"all-reduce": (2, whole)}, whole, whole)
    assert last["all-reduce of a pair"] == ({"all-reduce": (2, 0)}, 0, 0)  # alone in its group
    assert first["barrier"] == ({}, 0, 0)


@shared.on(2)
def ddp_step():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(100, 100, bias=False, device=device()))
    with count_traffic() as forward:
        loss = model(torch.ones(2, 100, device=device())).sum()
    with count_traffic() as backward:
        loss.backward()
    return forward.sent, backward.by_operation()


@pytest.mark.slow
def test_ddps_all_reduces_are_counted_in_backward():
    assert ddp_step.results[0] == (0, {"all-reduce": (1, 40_000)})


@shared.on(2)
def all_reduces_of_a_group_timed():
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    everyone, original = dist.group.WORLD, dist.all_reduce
    x = torch.ones(1000, device=device())
    with time_all_reduces(device(), everyone) as spans:
        for group in (None, everyone, own):
            dist.all_reduce(x, group=group)
    return [end.since(begin) for begin, end in spans], dist.all_reduce is original, x[0].item()


@pytest.mark.slow
def test_the_all_reduces_of_one_group_are_timed_and_work_as_before():
    for seconds, restored, value in all_reduces_of_a_group_timed.results:
        assert len(seconds) == 2 and min(seconds) >= 0 and restored and value == 4
