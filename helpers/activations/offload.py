"""Activation offload: keep saved tensors in host memory until backward needs them.

Chapter 11 derives it.
"""

import weakref
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.memory.storages import storages


class OffloadedActivations:
    """Keep what autograd saves during a forward pass in host memory; backward fetches it.

        with OffloadedActivations(model):
            loss = model(**batch).loss
        loss.backward()

    A storage is copied once, no matter how often and in how many views it is saved
    (``torch.autograd.graph.save_on_cpu`` copies every saved tensor on its own, weights included). Parameters and
    buffers of ``model`` stay on the device.

    On a GPU the copies run on their own stream, into page-locked memory. On a CPU "host" is a second place in the same
    memory: you can study the bytes there, not the time.

    Args:
        model: The model that runs in the block. Its parameters and buffers are not copied.
        min_bytes: Storages smaller than this stay on the device.
        max_in_flight_bytes: How many bytes may wait for their copy to the host while forward goes on. Beyond that the
            GPU waits; otherwise its memory would not shrink. Backward prefetches as many bytes ahead of their use.

    Attributes:
        offloaded_bytes: Bytes copied to the host so far.
        fetched_bytes: Bytes copied back to the device so far.
    """

    def __init__(self, model: nn.Module, min_bytes: int = 2**16, max_in_flight_bytes: int = 2**28) -> None:
        self._model = model
        self._min_bytes = min_bytes
        self._max_in_flight_bytes = max_in_flight_bytes
        self.offloaded_bytes = 0
        self.fetched_bytes = 0
        # References are weak so that only the graph, or a copy still in flight, keeps host memory alive.
        self._copies: list[weakref.ref[_HostCopy]] = []
        self._by_storage: weakref.WeakValueDictionary[tuple[int, int], _HostCopy] = weakref.WeakValueDictionary()
        self._in_flight: deque[tuple[_HostCopy, Tensor]] = deque()  # copies to the host, with their sources
        device = next(model.parameters()).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "OffloadedActivations":
        owned = (*self._model.parameters(), *self._model.buffers())
        self._model_addresses = {storage.address for tensor in owned for storage in storages(tensor)}
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        while self._in_flight:
            self._release_oldest()

    def _pack(self, tensor: Tensor) -> "Tensor | _Packed":
        """Replace a tensor that autograd saves by a description of its copy on the host."""
        storage = tensor.untyped_storage()
        belongs_to_model = storage.data_ptr() in self._model_addresses
        if storage.nbytes() < self._min_bytes or belongs_to_model or tensor.layout != torch.strided:
            return tensor
        # Not the address: freed memory may be reused by another tensor. And an in-place operation changes the version.
        key = storage._cdata, tensor._version
        copy = self._by_storage.get(key)
        if copy is None or copy.source.expired():
            self._by_storage[key] = copy = self._copy_to_host(tensor)
        return _Packed(copy, copy.host, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _copy_to_host(self, tensor: Tensor) -> "_HostCopy":
        storage = tensor.untyped_storage()
        source = _view(storage, torch.uint8, tensor.device, (storage.nbytes(),), (1,), 0)
        # A copy overlaps with computation only if its host memory is page-locked.
        host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=source.is_cuda)
        copy = _HostCopy(len(self._copies), StorageWeakRef(storage), host, source.device)
        self._copies.append(weakref.ref(copy))
        self.offloaded_bytes += source.nbytes
        if self._stream is None:
            host.copy_(source)
            return copy
        self._stream.wait_stream(torch.cuda.current_stream())  # the kernel that computes the source comes first
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
            copy.transferred = self._stream.record_event()
        self._in_flight.append((copy, source))
        # Python runs far ahead of the GPU: without a limit it would allocate new memory long before the old is copied.
        while len(self._in_flight) > 1 and self._in_flight_bytes() > self._max_in_flight_bytes:
            self._release_oldest()
        return copy

    def _in_flight_bytes(self) -> int:
        return sum(source.nbytes for _, source in self._in_flight)

    def _release_oldest(self) -> None:
        """Free the oldest source. The current stream, which reuses its memory, waits for the copy first."""
        copy, _ = self._in_flight.popleft()
        copy.wait()

    def _unpack(self, packed: "Tensor | _Packed") -> Tensor:
        """Return the tensor that backward asks for, and prefetch those that it will ask for next."""
        if isinstance(packed, Tensor):
            return packed
        copy = packed.copy
        fetched = self._fetch(copy)
        if self._stream is not None:
            prefetched_bytes = 0
            # Backward needs last what forward saved first.
            for earlier in (reference() for reference in reversed(self._copies[: copy.index])):
                if earlier is None:
                    continue
                prefetched_bytes += earlier.host.nbytes
                if prefetched_bytes > self._max_in_flight_bytes:
                    break
                self._fetch(earlier)
            copy.wait()
        return _view(fetched.untyped_storage(), packed.dtype, copy.device, packed.shape, packed.stride, packed.offset)

    def _fetch(self, copy: "_HostCopy") -> Tensor:
        """Begin to copy back to the device, if that has not begun yet."""
        if copy.fetched is not None:
            return copy.fetched
        self.fetched_bytes += copy.host.nbytes
        copy.fetched = fetched = torch.empty_like(copy.host, device=copy.device)
        if self._stream is None:
            return fetched.copy_(copy.host)
        # The allocator hands out memory in the current stream's order: kernels queued there may still use it.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            fetched.copy_(copy.host, non_blocking=True)
            copy.transferred = self._stream.record_event()
        fetched.record_stream(self._stream)  # the graph may be dropped before the copy ends
        return fetched


@dataclass(eq=False)
class _HostCopy:
    """A storage in host memory, and its copy on the device once it was fetched."""

    index: int
    source: StorageWeakRef
    host: Tensor
    device: torch.device
    fetched: Tensor | None = None
    transferred: torch.cuda.Event | None = None  # the end of the latest transfer

    def wait(self) -> None:
        """Let the current stream wait for the latest transfer."""
        if self.transferred is not None:
            torch.cuda.current_stream().wait_event(self.transferred)


class _Packed(NamedTuple):
    """What the graph holds in place of a saved tensor: its copy, and how the tensor viewed its storage."""

    copy: _HostCopy
    host: Tensor  # the same as copy.host: code that looks for saved tensors looks into tuples only
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _view(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
) -> Tensor:
    """Make a tensor on ``storage``."""
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, stride)
