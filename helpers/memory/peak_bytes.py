"""Measure the peak bytes of a block of code: torch's counters on a GPU, our own on a CPU."""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes:
    """Track current and peak bytes of tensors allocated inside a ``with`` block, on one device.

        with PeakBytes(device()) as memory:
            loss = model(**batch).loss
            kept = memory.now
            loss.backward()
        memory.peak, kept

    Tensors that existed before the block do not count; on a CPU, freeing them does not lower the numbers. On a GPU the
    numbers are the allocator's, rounded to 512 bytes and with all temporaries, minus what was allocated when the block
    began. On a CPU they are the storages that operators return; memory used inside an operator stays invisible.

    Args:
        device: The device to watch.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._live = _Live() if self._device.type != "cuda" else None
        self._before = 0
        self._ended: tuple[int, int] | None = None

    def __enter__(self) -> "PeakBytes":
        if self._live is not None:
            self._live.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = self.now, self.peak
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    @property
    def now(self) -> int:
        """Bytes that the block allocated and still holds; after the block, at its end."""
        if self._ended:
            return self._ended[0]
        return self._live.now if self._live else torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        """The most bytes held at one time since the block began."""
        if self._ended:
            return self._ended[1]
        return self._live.peak if self._live else torch.cuda.max_memory_allocated(self._device) - self._before


class _Live(TorchDispatchMode):
    """Follow every storage that an operator returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            # A view, or a tensor changed in place, is not new memory.
            if key not in given and key not in self._known:
                self._known.add(key)
                self.now += nbytes
                weakref.finalize(storage, self._end, key, nbytes).atexit = False
        self.peak = max(self.peak, self.now)
        return result

    def _end(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in tree_iter(value) if isinstance(item, torch.Tensor)]
