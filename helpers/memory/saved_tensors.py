"""Count what autograd saves for backward: bytes now and at the peak, and the module that saved them."""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.memory.storages import Storage, storages, tensors_in


class _Kept:
    """One storage that autograd keeps. Everything that keeps it refers to this object, which dies with the last."""

    __slots__ = ("__weakref__", "module", "storage")

    def __init__(self, storage: Storage, module: str) -> None:
        self.storage = storage
        self.module = module


class _Packed:
    """Replaces a saved tensor in the graph: what was packed, and the storages that it keeps alive."""

    __slots__ = ("content", "kept")

    def __init__(self, content: Any, kept: list[_Kept]) -> None:
        self.content = content
        self.kept = kept


class SavedTensors:
    """Record what autograd saves for backward while a block runs; each storage counts once.

        with SavedTensors(model) as activations:
            loss = model(**batch).loss
        activations.total, activations.by_module

    The numbers stay live after the block: they fall as backward, or a graph that is dropped, frees tensors. Parameters
    and buffers of ``model`` do not count, whatever view of them was saved; the batch counts if autograd keeps it.

    Other ``saved_tensors_hooks`` inside the block are followed: under gradient checkpointing only the inputs of the
    checkpointed part count, and a tensor that ``save_on_cpu`` moved counts on the CPU. Keyword arguments of a
    ``transformers`` layer that checkpoints itself live on in a closure that autograd does not show; they count as well.
    Your own closures are not seen. bitsandbytes' 8-bit layers keep their input as an attribute of their
    ``autograd.Function``'s context, past torch's hooks: it counts until the graph is freed.

    Use the block around forward only: when a checkpointed part is recomputed in backward, torch keeps some of its
    tensors longer than the graph shows.

    Args:
        model: The module whose parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._alive: weakref.WeakValueDictionary[tuple[torch.device, int], _Kept] = weakref.WeakValueDictionary()
        self._closures: dict[int, list[_Kept]] = {}
        # A finalizer can run at any time, in this thread or in autograd's.
        self._lock = threading.RLock()
        self._total = 0
        self._peak = 0
        self._running: list[tuple[str, nn.Module]] = []
        self._inputs: dict[tuple[torch.device, int], str] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "SavedTensors":
        self._own = {
            storage[:2]: weakref.ref(tensor)
            for tensor in (*self._model.parameters(), *self._model.buffers())
            for storage in storages(tensor)
        }
        for name, module in self._model.named_modules():
            # Registered last, so that it sees the inputs after all other hooks.
            self._handles.append(module.register_forward_pre_hook(self._begin(block_name(name)), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        self._enter_hooks = saved_tensors_hooks.__enter__
        # setattr: a type checker refuses to replace a method, which is what this does on purpose.
        setattr(saved_tensors_hooks, "__enter__", _observed(self._pack))  # noqa: B010
        # A leaf is kept itself: its owner may move it to other memory before backward. Other tensors are kept as a
        # detached alias, because an output would keep its own graph alive.
        self._hooks = saved_tensors_hooks(lambda tensor: tensor if tensor.is_leaf else tensor.detach(), lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)
        setattr(saved_tensors_hooks, "__enter__", self._enter_hooks)  # noqa: B010
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def total(self) -> int:
        """Bytes kept now."""
        return self._total

    @property
    def peak(self) -> int:
        """The most bytes kept at one time since the block began."""
        return self._peak

    @property
    def by_module(self) -> Mapping[str, int]:
        """Bytes kept now, by the block of the model that ran when they were first saved; largest first.

        A block is an entry of a list of modules ("model.layers.3") with everything inside it, otherwise the module
        itself; "" is the model's own forward, and what ran outside it (a loss).
        """
        counted: Counter[str] = Counter()
        for kept in list(self._alive.values()):
            counted[kept.module] += kept.storage.nbytes
        return dict(counted.most_common())

    def storages(self) -> list[Storage]:
        """List the storages kept now.

        Returns:
            Each storage once.
        """
        return [kept.storage for kept in list(self._alive.values())]

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._running.append((name, module))
            checkpointed = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
            if checkpointed and module.training:
                # Older transformers (5.17) checkpoint around this hook, so the caller saves the inputs.
                self._inputs = {storage[:2]: name for tensor in tensors_in(args) for storage in storages(tensor)}
                for key in self._inputs.keys() & self._alive.keys():
                    self._alive[key].module = name
                for tensor in tensors_in(kwargs):
                    self._keep_in_closure(tensor)

        return hook

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if type(module).__module__.startswith("bitsandbytes."):
            self._keep_in_context(output.grad_fn)
        self._running.pop()

    def _keep_in_closure(self, tensor: Tensor) -> None:
        if id(tensor) not in self._closures and (kept := self._track(tensor)):
            self._closures[id(tensor)] = kept
            weakref.finalize(tensor, self._closures.pop, id(tensor), None)

    def _keep_in_context(self, node: Any) -> None:
        # The context is the graph's node: its attributes live as long as it does, and so does this list.
        held = getattr(node, "__dict__", {})
        if held and "kept_for_ledger" not in held:
            node.kept_for_ledger = [kept for tensor in tensors_in(list(held.values())) for kept in self._track(tensor)]

    def _pack(self, content: Any) -> _Packed:
        return _Packed(content, [kept for tensor in tensors_in(content) for kept in self._track(tensor)])

    def _track(self, tensor: Tensor) -> list[_Kept]:
        if isinstance(tensor, nn.Parameter):
            return []
        return [self._kept(storage) for storage in storages(tensor) if not self._owned(storage)]

    def _owned(self, storage: Storage) -> bool:
        reference = self._own.get(storage[:2])
        # A parameter gathered from its shards has moved since the block began: check the modules that run now. And an
        # address freed by a parameter may have been reused by an activation: check the parameter again.
        owners: list[Tensor] = [owner for _, module in self._running for owner in module.parameters(recurse=False)]
        owner = reference() if reference else None
        owners += [] if owner is None else [owner]
        return any(held[:2] == storage[:2] for owner in owners for held in storages(owner))

    def _kept(self, storage: Storage) -> _Kept:
        with self._lock:
            kept = self._alive.get(storage[:2])
            if kept is None:
                running = self._running[-1][0] if self._running else ""
                kept = _Kept(storage, self._inputs.get(storage[:2], running))
                self._alive[storage[:2]] = kept
                self._total += storage.nbytes
                self._peak = max(self._peak, self._total)
                weakref.finalize(kept, self._release, storage.nbytes).atexit = False
            return kept

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._total -= nbytes


def block_name(name: str) -> str:
    """Return the entry of the first list of modules on a path ("h.3" of "h.3.mlp.up"), otherwise the path itself."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _observed(pack: Callable[[Any], _Packed]) -> Callable[[saved_tensors_hooks], None]:
    """Make a replacement for ``saved_tensors_hooks.__enter__`` that passes whatever the hooks pack through ``pack``.

    Torch calls only the innermost hooks, so ours would miss what is saved under those of checkpointing or
    ``save_on_cpu``. With the replacement, every hook reports what it keeps instead.
    """

    def enter(hooks: saved_tensors_hooks) -> None:
        torch._C._autograd._push_saved_tensors_default_hooks(
            lambda tensor: pack(hooks.pack_hook(tensor)), lambda packed: hooks.unpack_hook(packed.content)
        )

    return enter
