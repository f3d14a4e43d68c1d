"""Ranks whose Adam runs on the CPU divide the cores of their host; GPU memory and NCCL's buffers can be limited."""

import dataclasses
import os
import socket

import pytest
import torch
from small_finetune import ONE_RANK

from helpers.config.compatibility import check_speed
from helpers.config.finetune import SpeedOptions, parse_finetune_config
from helpers.errors import UserError
from helpers.finetune import host_cores, speed
from helpers.finetune.host_cores import share_of, use_own_cores
from helpers.libraries.deepspeed import NORM_ELEMENTS, compute_norms_in_parts
from helpers.memory.units import GIB

OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
SECOND = dataclasses.replace(ONE_RANK, rank=1, local_rank=1, world_size=2, local_world_size=2)


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3]]),
        ([4, 6], 2, [[4], [6]]),
        ([5], 2, [[5], [5]]),
    ],
)
def test_each_rank_gets_as_many_cores(cores, ranks, shares):
    assert [share_of(cores, place, ranks) for place in range(ranks)] == shares


@pytest.fixture
def bound(monkeypatch):
    """The cores and threads that this process asks for; it has cores 0 to 3, and keeps them."""
    found = {}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: found.update(cores=cores), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: found.update(threads=count))
    return found


def others(monkeypatch, *values):
    monkeypatch.setattr(host_cores, "gather_objects", lambda own: [own, *values])


def test_the_second_of_two_ranks_gets_the_second_half(bound, monkeypatch):
    others(monkeypatch, (socket.gethostname(), [0, 1, 2, 3]), ("another host", [7]))
    assert use_own_cores(OFFLOADED, SECOND) == ["Adam runs on the CPU: 2 cores and threads for each rank"]
    assert bound == {"cores": [2, 3], "threads": 2} and os.environ["OMP_NUM_THREADS"] == "2"


def test_cores_that_a_launcher_has_divided_stay(bound, monkeypatch):
    others(monkeypatch, (socket.gethostname(), [4, 5, 6, 7]))
    assert use_own_cores(OFFLOADED, SECOND) and bound == {"threads": 4}


@pytest.mark.parametrize("deepspeed", [None, {}, {"zero_optimization": {"stage": 3}}])
def test_without_adam_on_the_cpu_nothing_changes(deepspeed, bound):
    assert use_own_cores(deepspeed, SECOND) == [] and bound == {}


def test_the_limit_of_gpu_memory_leaves_room_for_what_is_outside_of_torch(monkeypatch):
    shares = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("Gpu", (), {"total_memory": 80 * GIB}), raising=False
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    for limit in (24, 200):
        speed.set_allocator(SpeedOptions(expandable_segments=False, gpu_memory_gib=limit), torch.device("cuda", 0))
    assert shares == [pytest.approx((24 - 2.25) / 80), 1.0]
    with pytest.raises(UserError, match="gpu_memory_gib 2 leaves nothing for tensors; give 3 or more"):
        check_speed(parse_finetune_config({"speed": {"gpu_memory_gib": 2}}, "my.yaml"), None)


def test_nccl_gets_small_buffers_unless_the_user_has_set_them(monkeypatch):
    for name in speed.SMALL_NCCL_BUFFERS:
        monkeypatch.setenv(name, "kept")
    monkeypatch.delenv("NCCL_BUFFSIZE")
    speed.set_nccl_buffers(SpeedOptions())
    assert "NCCL_BUFFSIZE" not in os.environ
    speed.set_nccl_buffers(SpeedOptions(small_nccl_buffers=True))
    assert os.environ["NCCL_BUFFSIZE"] == "1048576" and os.environ["NCCL_MAX_NCHANNELS"] == "kept"
    monkeypatch.delenv("NCCL_BUFFSIZE")


def test_a_norm_in_parts_is_the_norm():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    compute_norms_in_parts()
    gradient = torch.randn(NORM_ELEMENTS + 5)
    assert Stage3._constant_buffered_norm2.__defaults__ == (NORM_ELEMENTS,)
    torch.testing.assert_close(Stage3._constant_buffered_norm2(None, gradient), gradient.double().norm())
