"""Counts of what a real GLM keeps and holds, for tests of predictions: on the CPU, with and without real numbers.

:func:`saved_bytes` runs a model and counts what autograd saved. :func:`live_peaks` runs it under FakeTensorMode, which
computes shapes only, with the operators that CUDA would use, and follows every storage: that works at any size.
"""

import contextlib
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


def glm(c: Configuration, device: str = "cpu") -> torch.nn.Module:
    """The model of a configuration, with its adapter."""
    with torch.device(device):
        return add_adapter(c, build_without_adapter(c, device))


def fused_dropout(x, p=0.5, training=True, inplace=False):
    """What torch runs on CUDA: a boolean mask. On the CPU it would keep a mask of x's own type."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def batch(c: Configuration) -> dict[str, torch.Tensor]:
    ids = torch.ones(c.micro_batch_size, c.sequence_length, dtype=torch.long)
    mask = (
        {
            "attention_mask": torch.ones(
                c.micro_batch_size, 1, c.sequence_length, c.sequence_length, dtype=torch.bool
            ).tril()
        }
        if c.masked
        else {}
    )
    return {"input_ids": ids, "labels": ids, **mask}


def autocast(c: Configuration):
    return torch.autocast("cpu", torch.bfloat16) if c.precision == "autocast" else contextlib.nullcontext()


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
        loss = model(**batch(c)).loss
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


def cuda_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernels that SDPA chooses on CUDA, by name: a mask goes to efficient, padded to 16 columns."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else q.dtype
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        length = q.shape[2]
        bias = torch.zeros(attn_mask.shape, dtype=dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        bias = torch.nn.functional.pad(bias, (0, -length % 16))[..., :length].expand(*q.shape[:2], length, length)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, bias, True, 0.0, False, scale=scale)[0]


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
                loss = model(**batch(c)).loss
            live.phase = "backward"
            loss.backward()
    return dict(live.peak)
