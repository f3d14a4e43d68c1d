"""Average buffers one after another, note when each was on its way, and imitate a slow network on the CPU."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.parallel.clock import Event


@dataclass(frozen=True)
class Message:
    """A buffer that was given to a link.

    Attributes:
        wait: Returns when the buffer holds the mean. On a GPU it returns at once, and the current stream waits.
    """

    wait: Callable[[], object]


class Link:
    """Average buffers over all ranks in the order in which they come, while this rank computes on.

    On a GPU the messages queue in a stream of their own. On the CPU they queue in a thread, which may make each last
    longer: ranks on one machine have no network between them, and with ``latency`` and ``bandwidth`` they behave as if
    they had a slow one. The thread sleeps meanwhile, so it takes no time from the computation.

    Args:
        device: Of the buffers.
        latency: Seconds that a message lasts at least, plus its bytes by ``bandwidth``. Without effect on a GPU.
        bandwidth: Bytes per second. Without effect on a GPU.
    """

    def __init__(self, device: torch.device, latency: float = 0.0, bandwidth: float = math.inf) -> None:
        self._device, self._latency, self._bandwidth = device, latency, bandwidth
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._times: list[tuple[Event, Event]] = []

    def average(self, buffer: Tensor) -> Message:
        """Start to replace ``buffer`` by its mean over the ranks; leave it alone until the message has been waited for.

        Args:
            buffer: [any shape], the same on all ranks.

        Returns:
            What to wait for.
        """
        if self._stream is None:
            return Message(self._thread.submit(self._send, buffer).result)
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)  # until then the buffer is not full
        with torch.cuda.stream(self._stream):
            self._send(buffer)
            arrived = self._stream.record_event()
        return Message(lambda: torch.cuda.current_stream(self._device).wait_event(arrived))

    def times(self, earlier: Event) -> list[tuple[float, float]]:
        """Return when each message began and ended, once all have been waited for.

        Args:
            earlier: When the clock starts.

        Returns:
            Seconds since ``earlier``, (begin, end), in the order of the messages.
        """
        return [(begin.since(earlier), end.since(earlier)) for begin, end in self._times]

    def _send(self, buffer: Tensor) -> None:
        begin = Event(self._device)
        buffer /= dist.get_world_size()  # a mean; dividing first keeps 16-bit sums from overflowing
        dist.all_reduce(buffer)
        if self._stream is None:
            lasted = Event(self._device).since(begin)
            time.sleep(max(0.0, self._latency + buffer.nbytes / self._bandwidth - lasted))
        self._times.append((begin, Event(self._device)))
