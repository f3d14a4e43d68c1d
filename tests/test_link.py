"""helpers.parallel.link: means in the order of the calls, and a network that is as slow as it should be."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from shared_launch import SharedLaunches

from helpers.launch import device
from helpers.parallel.clock import Event
from helpers.parallel.link import Link

pytestmark = pytest.mark.slow
shared = SharedLaunches(__name__)
LATENCY, BANDWIDTH = 0.02, 1e6


@shared.on(2)
def three_messages():
    """Means of three buffers, when each was on its way, and their bytes."""
    link, earlier = Link(device(), LATENCY, BANDWIDTH), Event(device())
    buffers = [torch.full((elements,), 1.0 + dist.get_rank(), device=device()) for elements in (1000, 1, 5000)]
    for message in [link.average(buffer) for buffer in buffers]:
        message.wait()
    return [buffer.tolist() for buffer in buffers], link.times(earlier), [buffer.nbytes for buffer in buffers]


def test_every_rank_gets_the_mean():
    for means, _, _ in three_messages.results:
        assert means == [[1.5] * 1000, [1.5], [1.5] * 5000]


def test_messages_follow_one_another():
    for _, times, _ in three_messages.results:
        assert times[0][0] >= 0
        assert all(begin <= end for begin, end in times)
        assert all(later[0] >= earlier[1] for earlier, later in pairwise(times))


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="the link between GPUs is as fast as it is")
def test_a_message_lasts_as_long_as_latency_and_bandwidth_say():
    for _, times, sizes in three_messages.results:
        for (begin, end), size in zip(times, sizes, strict=True):
            assert end - begin >= LATENCY + size / BANDWIDTH
