"""What the system counts of the bytes that ranks send, against what a collective must send."""

import sys

import pytest
import torch
import torch.distributed as dist

from helpers import traffic
from helpers.launch import run


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts, others do not")
def test_a_broadcast_sends_its_tensor_to_every_other_rank():
    def fn(mib):
        from helpers.traffic import loopback_bytes

        x = torch.ones(mib << 18)
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()
        dist.broadcast(x, 0)
        dist.barrier()
        return loopback_bytes() - before

    ranks = torch.cuda.device_count() + 3
    sent = run(fn, ranks, mib=32).results[0] / 2**20
    assert 32 * (ranks - 1) <= sent < 32 * (ranks - 1) + 8  # others on this machine may talk as well


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
