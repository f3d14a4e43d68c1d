"""Follow every storage of a step on fake tensors from its birth to its end, and give it to a simulated allocator."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from helpers.memory.allocator import SimulatedAllocator

ATEN = torch.ops.aten
MATMULS = (ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default)


class Allocations(TorchDispatchMode):
    """Allocate what operators return on one device, while this mode is active.

    A tensor that another stream has used (``record_stream``) is free only when that stream has got there. Python runs
    far ahead of the GPU, so its block counts as used until Python waits for the GPU, in :meth:`synchronize`.

    Args:
        expandable: Whether the allocator has expandable segments.
        device: Type of the device that stands for the GPU; tensors elsewhere are not followed.
        workspace: Bytes that cuBLAS allocates for ever at the first matmul of a thread and stream.

    Attributes:
        stream: Number of the stream that allocates now.
        allocated: Most bytes of all tensors together.
        reserved: Most bytes that the allocator held.
    """

    def __init__(self, expandable: bool, device: str, workspace: int) -> None:
        super().__init__()
        self.stream = self.allocated = self.reserved = 0
        self._allocator = SimulatedAllocator(expandable)
        self._device, self._workspace = device, workspace
        self._with_workspace: set[tuple[bool, int]] = set()
        self._streams: dict[int, int] = {}  # of each living storage
        self._used_elsewhere: set[int] = set()
        self._waiting: list[int] = []
        self._now = 0

    def follow(self, tensor: Tensor) -> None:
        """Allocate a tensor's storage unless it is allocated or elsewhere; its end frees it.

        Args:
            tensor: A fake tensor.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type != self._device or not size or key in self._streams:
            return
        self._streams[key] = self.stream
        weakref.finalize(storage, self._end, key, size, self._allocate(size)).atexit = False

    def record(self, tensor: Tensor, stream: int) -> None:
        """Note that a stream uses a tensor.

        Args:
            tensor: A fake tensor.
            stream: Number of the stream.
        """
        key = tensor.untyped_storage()._cdata
        if self._streams.get(key, stream) != stream:
            self._used_elsewhere.add(key)

    def synchronize(self) -> None:
        """Wait for the GPU, which gives back blocks that other streams have used."""
        for block in self._waiting:
            self._allocator.free(block)
        self._waiting.clear()

    def empty_cache(self) -> None:
        """Return free memory to the driver."""
        self.synchronize()
        self._allocator.empty()

    def _allocate(self, nbytes: int) -> int:
        self._now += nbytes
        block = self._allocator.allocate(nbytes, self.stream)
        self.allocated = max(self.allocated, self._now)
        self.reserved = max(self.reserved, self._allocator.reserved)
        return block

    def _end(self, key: int, size: int, block: int) -> None:
        del self._streams[key]
        self._now -= size
        if key in self._used_elsewhere:
            self._used_elsewhere.discard(key)
            self._waiting.append(block)
        else:
            self._allocator.free(block)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # two of three calls; FakeTensorMode would return the same, slowly
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        if func is ATEN._local_scalar_dense.default:  # .item(): fake tensors have no values
            self.synchronize()
            return 0.0 if args[0].dtype.is_floating_point else 0
        if func is ATEN.equal.default:
            return True
        if kwargs.get("device") is not None:  # the same device with its index would be another one to fake tensors
            kwargs["device"] = torch.device(kwargs["device"].type)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.follow(value)
        if func in MATMULS and result.device.type == self._device:
            # Backward runs in a thread of autograd's.
            thread = (torch._C._current_graph_task_id() >= 0, self.stream)
            if thread not in self._with_workspace:
                self._with_workspace.add(thread)
                self._allocate(self._workspace)
        return result
