"""Simulate the allocator from a step's own allocations, where no formula gives what it holds beyond the tensors.

The real model runs under FakeTensorMode, which computes shapes only, with the operators that CUDA would use. Every
storage's birth and end goes to :class:`~helpers.memory.allocator.SimulatedAllocator`. No GPU and no weights are needed,
but torch and some seconds.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers.models.glm.modeling_glm as modeling_glm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from helpers.activations.chunked_loss import chunked_cross_entropy
from helpers.activations.swiglu import RecomputingMLP
from helpers.errors import UserError
from helpers.memory.allocator import SimulatedAllocator, reserved_bytes
from helpers.memory.predict.build import add_adapter, build_without_adapter
from helpers.memory.predict.configuration import Configuration

STEPS = 3  # the optimizer's states come with the first; from the second on, blocks are reused
ADAM_STATES = 2


def traced_allowance(configuration: Configuration) -> int:
    """Simulate what torch's allocator holds beyond the tensors at the peak.

    Args:
        configuration: A job in one process or under DDP, neither compiled nor quantised.

    Returns:
        Bytes.

    Raises:
        UserError: The configuration is another one.
    """
    c = configuration
    if reason := _beyond_operators(c):
        raise UserError(f"{reason}, which the model's operators do not show: the formula is better; leave --trace out")
    allocator = _Allocations(c.expandable_segments)
    allocator.allocate_for_ever(c.machine.cublas_workspace)
    with _cuda_operators():
        model = add_adapter(c, build_without_adapter(c, "meta"))
        if c.lean:
            for module in model.modules():
                if isinstance(module, modeling_glm.GlmMLP):
                    module.__class__ = RecomputingMLP
        with FakeTensorMode():
            _materialise(model, allocator)
            with allocator:
                _train(c, model)
    return allocator.reserved - allocator.peak


def _beyond_operators(c: Configuration) -> str:
    """Name what allocates GPU memory besides the operators that a trace sees; empty if nothing does."""
    reasons = {
        "DeepSpeed allocates flat tensors, buckets and whole gradients": c.strategy.zero_stage > 0,
        "the compiler decides what compiled layers make": c.compiled,
        "quantised matrices are multiplied by kernels of their own": c.quantized,
        "layers' inputs come back from host memory on another stream": c.offloaded_checkpoints,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


class _Allocations(TorchDispatchMode):
    """Give every storage that an operator returns to a simulated allocator, and take it back at its end."""

    def __init__(self, expandable: bool) -> None:
        super().__init__()
        self._allocator = SimulatedAllocator(expandable)
        self._live: set[int] = set()
        self._now = 0
        self.peak = 0

    @property
    def reserved(self) -> int:
        return reserved_bytes(self._allocator.segments())

    def allocate_for_ever(self, nbytes: int) -> int:
        self._now += nbytes
        self.peak = max(self.peak, self._now)
        return self._allocator.allocate(nbytes)

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._live:
            return
        self._live.add(key)
        weakref.finalize(storage, self._end, key, size, self.allocate_for_ever(size)).atexit = False

    def _end(self, key: int, size: int, block: int) -> None:
        self._live.discard(key)
        self._now -= size
        self._allocator.free(block)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.follow(value)
        return result


def _materialise(model: nn.Module, allocator: _Allocations) -> None:
    """Replace what is on the meta device by fake tensors, whose storages have an end."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for parameter in model.parameters():
        allocator.follow(parameter)


def _train(c: Configuration, model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    kept: list[Tensor] = []  # Adam's states, and DDP's buckets as one
    for _ in range(STEPS):
        inputs = fake_batch(c)
        with autocast(c):
            loss = _loss(c, model, inputs)
        loss.backward()
        if not kept:
            if c.strategy.kind == "ddp":
                kept.append(torch.empty(sum(p.numel() for p in trained), dtype=trained[0].dtype))
            kept += [torch.empty_like(p) for p in trained for _ in range(ADAM_STATES)]
        for parameter in trained:
            parameter.grad = None
        del loss, inputs


def _loss(c: Configuration, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    if c.loss_chunk is None:
        return model(**inputs).loss
    labels = inputs.pop("labels").flatten()
    whole: Any = model.get_base_model() if c.lora else model  # type: ignore[operator]
    hidden = whole.model(**inputs).last_hidden_state.flatten(0, 1)
    positions = torch.empty(labels.numel(), dtype=torch.int64)
    return chunked_cross_entropy(hidden, whole.lm_head.weight, labels, c.loss_chunk, positions)


def fake_batch(c: Configuration) -> dict[str, Tensor]:
    """Make a batch of the configuration's shape; with a mask of all pairs of tokens if attention gets one."""
    ids = torch.ones(c.micro_batch_size, c.sequence_length, dtype=torch.long)
    if not c.masked:
        return {"input_ids": ids, "labels": ids}
    pairs = torch.ones(c.micro_batch_size, 1, c.sequence_length, c.sequence_length, dtype=torch.bool).tril()
    return {"input_ids": ids, "labels": ids, "attention_mask": pairs}


def autocast(c: Configuration) -> contextlib.AbstractContextManager[Any]:
    """Return what the configuration's forward runs in."""
    return torch.autocast("cpu", torch.bfloat16) if c.precision == "autocast" else contextlib.nullcontext()


@contextlib.contextmanager
def _cuda_operators() -> Iterator[None]:
    """Let the model call the operators that it would call on CUDA."""
    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "dropout", fused_dropout),
        mock.patch.object(functional, "scaled_dot_product_attention", cuda_attention),
        # Under FakeTensorMode transformers would make a mask where there need be none.
        mock.patch.object(modeling_glm, "create_causal_mask", lambda attention_mask=None, **_: attention_mask),
    ):
        yield


def fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop elements as on CUDA, with a boolean mask. A CPU would keep a mask of ``x``'s own type."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the kernel that SDPA chooses on CUDA: efficient with a mask, padded to 16 columns, otherwise flash."""
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
