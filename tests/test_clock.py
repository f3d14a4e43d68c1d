"""helpers.parallel.clock: the fastest of several runs that all ranks begin together."""

import torch.distributed as dist

from helpers.parallel import clock


def test_all_ranks_begin_each_run_together_and_the_fastest_counts(monkeypatch):
    happened, readings = [], iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0])  # three runs: 3, 2 and 5 seconds
    monkeypatch.setattr(dist, "barrier", lambda: happened.append("barrier"))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(readings))
    assert clock.fastest(lambda: happened.append("action"), "cpu", repeats=3) == 2.0
    assert happened == ["barrier", "action"] * 3


def test_a_cpu_is_never_behind():
    clock.synchronize("cpu")  # torch.cuda would raise without a GPU
