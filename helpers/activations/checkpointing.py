"""Activations that are not kept on the device: computed again in backward, or copied to host memory until then.

Chapter 11 derives what is here.
"""

import weakref
from collections import deque
from collections.abc import Collection
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.errors import UserError
from helpers.memory.storages import storages

_ATEN = torch.ops.aten
# What a linear layer and SDPA's fused kernels call, by the name that autograd sees.
MATRIX_PRODUCTS = (_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default)
ATTENTION = tuple(
    getattr(_ATEN, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def checkpoint_layers(
    model: nn.Module, layers: Collection[int] | None = None, keep: Collection[torch._ops.OpOverload] = ()
) -> None:
    """Let backward compute the given ``layers`` of ``model`` again, all where None; the others keep what they make.

    ``model`` is one of transformers', whose layers checkpoint themselves; ``layers`` are numbers in the order of its
    modules. Outputs of the operators in ``keep`` are not computed again but kept beside the layer's input: those of
    :data:`MATRIX_PRODUCTS` and :data:`ATTENTION` take most of the time. A call replaces what an earlier one set.

    Raises :class:`UserError` for a layer that the model does not have.
    """
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    chosen = range(len(found)) if layers is None else layers
    if wrong := [number for number in chosen if not 0 <= number < len(found)]:
        raise UserError(f"checkpoint_layers: layer {wrong[0]} of a model of {len(found)} layers; count from 0")
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, list(keep))} if keep else {}
    for number, layer in enumerate(found):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **contexts)
        layer.gradient_checkpointing = number in chosen


class OffloadedActivations:
    """Keeps what autograd saves in host memory while a block runs the forward pass; backward fetches it.

        with OffloadedActivations(model):
            loss = model(**batch).loss
        loss.backward()

    A storage travels once, however often and in whatever views it is saved (``torch.autograd.graph.save_on_cpu`` moves
    every saved tensor by itself, weights included). Parameters and buffers of ``model`` stay where they are, and so
    does what is smaller than ``smallest`` bytes.

    On a GPU copies run on a stream of their own, into pinned memory. About ``in_flight`` bytes may wait to be copied
    out while forward goes on; beyond that the GPU waits, or its memory would not fall. In backward as many bytes are
    fetched ahead of their use. On a CPU "host" is a second place in the same memory: only the bytes can be studied.

    ``sent`` and ``fetched`` are bytes copied to the host and back so far.
    """

    def __init__(self, model: nn.Module, smallest: int = 2**16, in_flight: int = 2**28) -> None:
        self._model = model
        self._smallest = smallest
        self._in_flight = in_flight
        self.sent = 0
        self.fetched = 0
        # Nothing here keeps a copy alive but the graph, and the way out.
        self._copies: list[weakref.ref[_Copy]] = []
        self._by_storage: weakref.WeakValueDictionary[tuple[int, int], _Copy] = weakref.WeakValueDictionary()
        self._leaving: deque[_Copy] = deque()
        device = next(model.parameters()).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "OffloadedActivations":
        owned = (*self._model.parameters(), *self._model.buffers())
        self._own = {storage.address for tensor in owned for storage in storages(tensor)}
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        while self._leaving:
            self._let_go()

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._smallest or storage.data_ptr() in self._own or tensor.layout != torch.strided:
            return tensor
        # The same address can be another tensor's later, and the same memory hold something else.
        key = storage._cdata, tensor._version
        copy = self._by_storage.get(key)
        if copy is None or copy.source.expired():
            self._by_storage[key] = copy = self._send(tensor)
        # The host's tensor stands beside its copy for who looks at what autograd keeps.
        return copy, copy.host, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _send(self, tensor: Tensor) -> "_Copy":
        whole = _view(tensor.untyped_storage(), torch.uint8, tensor.device)
        host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=whole.is_cuda)
        copy = _Copy(len(self._copies), StorageWeakRef(tensor.untyped_storage()), host, whole.device)
        self._copies.append(weakref.ref(copy))
        self.sent += whole.nbytes
        if self._stream is None:
            host.copy_(whole)
            return copy
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(whole, non_blocking=True)
            copy.done = self._stream.record_event()
        copy.leaving = whole
        self._leaving.append(copy)
        while len(self._leaving) > 1 and sum(waiting.host.nbytes for waiting in self._leaving) > self._in_flight:
            self._let_go()
        return copy

    def _let_go(self) -> None:
        """Give the oldest source free: whatever the GPU will use its memory for then comes after the copy."""
        copy = self._leaving.popleft()
        torch.cuda.current_stream().wait_event(copy.done)
        copy.leaving = None

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, _, dtype, *view = packed
        self._fetch(copy)
        if self._stream is not None:
            ahead = 0
            # Backward needs last what forward saved first.
            for earlier in (reference() for reference in reversed(self._copies[: copy.number])):
                ahead += earlier.host.nbytes if earlier else 0
                if ahead > self._in_flight:
                    break
                if earlier:
                    self._fetch(earlier)
            torch.cuda.current_stream().wait_event(copy.done)
        return _view(copy.back.untyped_storage(), dtype, copy.device, *view)

    def _fetch(self, copy: "_Copy") -> None:
        if copy.back is not None:
            return
        self.fetched += copy.host.nbytes
        copy.back = torch.empty_like(copy.host, device=copy.device)
        if self._stream is None:
            copy.back.copy_(copy.host)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # its memory may still be in use there
        with torch.cuda.stream(self._stream):
            copy.back.copy_(copy.host, non_blocking=True)
            copy.done = self._stream.record_event()
        copy.back.record_stream(self._stream)  # where a graph is dropped while this is on its way


class _Copy:
    """A storage in host memory. ``done`` is when its last transfer is; ``back`` is it on the device again."""

    __slots__ = ("__weakref__", "back", "device", "done", "host", "leaving", "number", "source")

    def __init__(self, number: int, source: StorageWeakRef, host: Tensor, device: torch.device) -> None:
        self.number = number
        self.source = source
        self.host = host
        self.device = device
        self.leaving: Tensor | None = None
        self.back: Tensor | None = None
        self.done: torch.cuda.Event | None = None


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, device: torch.device, *view: Any) -> Tensor:
    """A tensor on ``storage``: with a shape, strides and an offset, or all of it."""
    shape, stride, offset = view or ((storage.nbytes() // dtype.itemsize,), (1,), 0)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, stride)
