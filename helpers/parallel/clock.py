"""Time what a rank's device does, on a GPU without stopping its stream."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class Event:
    """Mark now: on the CPU the time, on a GPU the point at which its current stream has done all work queued so far.

    A kernel only enters a queue when Python calls it, so ``time.perf_counter`` would time the call, not the work.

    Args:
        device: The device whose work is timed.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._event = None
        if torch.device(device).type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._seconds = time.perf_counter()

    def since(self, earlier: "Event") -> float:
        """Return the time from ``earlier`` to this event; on a GPU, wait until both have happened.

        Args:
            earlier: An event on the same device.

        Returns:
            Seconds; negative if ``earlier`` came later.
        """
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3  # CUDA counts milliseconds


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has done what this thread queued on its current stream; a CPU is never behind.

    Messages on other streams may still be on their way.

    Args:
        device: The device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def fastest(action: Callable[[], object], device: torch.device | str, repeats: int = 5) -> float:
    """Time an action that all ranks begin together, and take the fastest of several runs.

    Other work on the machine can only make a run slower, so the fastest says most about the action.

    Args:
        action: Called without arguments, the same number of times on every rank.
        device: The device whose work is timed.
        repeats: The number of runs.

    Returns:
        Seconds of this rank.
    """
    laps = []
    for _ in range(repeats):
        dist.barrier()
        begin = Event(device)
        action()
        laps.append(Event(device).since(begin))
    return min(laps)


# How every chapter compares speed: for one rank, which has one GPU. With N ranks a step trains N times as many tokens.
RATE = "tokens/s per GPU"


def tokens_per_second(micro_batch_size: int, sequence_length: int, seconds: float) -> float:
    """Compute the speed in :data:`RATE`; without GPUs it is the speed of one rank.

    Args:
        micro_batch_size: Rows per rank and step.
        sequence_length: Tokens per row.
        seconds: Per step.

    Returns:
        Tokens per second of one rank.
    """
    return micro_batch_size * sequence_length / seconds


def host_bandwidth(device: torch.device, nbytes: int = 2**27) -> float:
    """Measure how fast a tensor gets from a device into page-locked host memory (chapter 09).

    Args:
        device: The device. On a CPU, the copy stays in host memory.
        nbytes: Size of the tensor: large, so that the latency of a copy does not count.

    Returns:
        Bytes per second of the fastest of three copies.
    """
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=source.is_cuda)
    laps = []
    for _ in range(4):  # the first warms up
        begin = Event(device)
        host.copy_(source, non_blocking=True)
        laps.append(Event(device).since(begin))
    return nbytes / min(laps[1:])


@contextmanager
def time_all_reduces(device: torch.device | str, group: dist.ProcessGroup) -> Iterator[list[tuple[Event, Event]]]:
    """Record when each ``dist.all_reduce`` in a ``with`` block began and ended on this rank.

    A rank that arrives early waits inside the all-reduce, so its time contains the waiting.

    Args:
        device: The device whose work is timed.
        group: Only all-reduces among exactly these ranks are recorded.

    Returns:
        One pair of events per all-reduce, in the order of their calls; complete after the block.
    """
    original, ranks = dist.all_reduce, dist.get_process_group_ranks(group)
    spans: list[tuple[Event, Event]] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = Event(device)
        work = original(*args, **kwargs)
        if dist.get_process_group_ranks(kwargs.get("group") or dist.group.WORLD) == ranks:
            spans.append((begin, Event(device)))
        return work

    dist.all_reduce = timed
    try:
        yield spans
    finally:
        dist.all_reduce = original
