"""Copy between device and host on a stream of its own, so that copies overlap with computation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostCopies:
    """Copies between a device and the host, concurrent with the device's computation if it is a GPU.

    Without a GPU a copy is complete when its call returns, and there is nothing to wait for.

    Args:
        device: Whose tensors are copied.

    Attributes:
        bytes_to_host: Bytes copied to the host so far.
        bytes_to_device: Bytes copied to the device so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bytes_to_host = 0
        self.bytes_to_device = 0

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run the block on a side stream, after the work already queued and concurrently with later work."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def wait_stream(self) -> None:
        """Let later work of the current stream wait for the side stream's work so far."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def copy_to_host(self, host: Tensor, device: Tensor) -> None:
        """Copy ``device`` to ``host``, inside of :meth:`side_stream`; returns before a GPU has finished."""
        host.copy_(device, non_blocking=True)
        self.bytes_to_host += host.nbytes

    def copy_to_device(self, device: Tensor, host: Tensor) -> None:
        """Copy ``host`` to ``device``, inside of :meth:`side_stream`; returns before a GPU has finished."""
        device.copy_(host, non_blocking=True)
        self.bytes_to_device += host.nbytes

    def record_event(self) -> torch.cuda.Event | None:
        """Mark the side stream's work so far, for the two methods below; None without a GPU."""
        return self._stream.record_event() if self._stream is not None else None

    def wait_event(self, event: torch.cuda.Event | None) -> None:
        """Let later work of the current stream wait for an event; the host goes on."""
        if event is not None:
            event.wait()

    def synchronize(self, event: torch.cuda.Event | None) -> None:
        """Let the host wait for an event."""
        if event is not None:
            event.synchronize()
