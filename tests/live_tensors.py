"""Counts of what a real GLM keeps and holds, for tests of predictions: on the CPU, with and without real numbers.

:func:`saved_bytes` runs a model and counts what autograd saved. :func:`live_peaks` runs it under FakeTensorMode, which
computes shapes only, with the operators that CUDA would use, and follows every storage: that works at any size.
"""

import weakref
from collections import defaultdict

import pytest
import torch
import transformers.models.glm.modeling_glm as modeling_glm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from helpers.memory.predict import Configuration
from helpers.memory.predict.build import add_adapter, build_without_adapter
from helpers.memory.predict.cuda_operators import cuda_attention, fused_dropout
from helpers.memory.predict.fake_job import autocast, fake_batch


def glm(c: Configuration, device: str = "cpu") -> torch.nn.Module:
    """The model of a configuration, with its adapter."""
    with torch.device(device):
        return add_adapter(c, build_without_adapter(c, device))


def saved_bytes(c: Configuration, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the storages that autograd saves in one forward pass, each once, without the parameters'."""
    monkeypatch.setattr(torch.nn.functional, "dropout", fused_dropout)
    model = glm(c)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with autocast(c), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**fake_batch(c)).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


class Live(TorchDispatchMode):
    """Follows every storage that an operator returns from its birth to its end; ``peak[phase]`` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "before"
        self.now = 0
        self.peak = defaultdict(int)
        self._seen = set()

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.follow(value)
        self.peak[self.phase] = max(self.peak[self.phase], self.now)
        return out


def live_peaks(c: Configuration, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Peaks in bytes of "forward" and "backward", parameters included, as the operators of CUDA would make them."""
    monkeypatch.setattr(torch.nn.functional, "dropout", fused_dropout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", cuda_attention)
    # Under FakeTensorMode transformers would make a mask where there need be none.
    monkeypatch.setattr(modeling_glm, "create_causal_mask", lambda attention_mask=None, **_: attention_mask)
    model = glm(c, device="meta")
    live = Live()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=p.requires_grad)
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for parameter in model.parameters():
            live.follow(parameter)
        with live:
            live.phase = "forward"
            with autocast(c):
                loss = model(**fake_batch(c)).loss
            live.phase = "backward"
            loss.backward()
    return dict(live.peak)
