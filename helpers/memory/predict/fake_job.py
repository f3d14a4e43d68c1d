"""Make the real model and its batches of fake tensors, which have shapes and no numbers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers.models.glm.modeling_glm as modeling_glm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.activations.chunked_loss import call_through, chunked_cross_entropy
from helpers.activations.swiglu import RecomputingMLP
from helpers.memory.predict.allocations import Allocations
from helpers.memory.predict.build import add_adapter, build_without_adapter
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.cuda_operators import cuda_operators

STEPS = 3  # the optimizer's states come with the first; from the second on, blocks are reused
# Length of each step's longest row, if rows differ, as a share of the longest of all: a step's blocks do not fit the
# tensors of the next.
VARYING = (0.75, 1.0, 0.6, 0.9, 1.0, 0.8)


class _WithoutDevices(FakeTensorMode):
    """Touch no device, also on a machine with a GPU: there, torch would first make some tensors for real."""

    avoid_device_init = True  # in FakeTensorMode a property, which asks whether there is a GPU


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Make fake tensors only, with CUDA's operators, and leave modules where they are: fake ones cannot move."""
    with (
        cuda_operators(),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),
        _WithoutDevices(allow_non_fake_inputs=True),
    ):
        yield


def fake_model(
    c: Configuration,
    device: str,
    allocations: Allocations,
    partition: Callable[[Iterator[nn.Parameter]], Any] = list,
) -> nn.Module:
    """Build the job's model, with its adapter and its loss.

    Args:
        c: The job.
        device: Device of the parameters.
        allocations: What follows them.
        partition: What to do with the network's parameters before it gets its adapter. Each is made when it is taken.

    Returns:
        The model, whose output has a ``loss``.
    """
    model: Any = build_without_adapter(c, "meta")
    if c.loss_chunk is not None:
        model.__class__ = _LossInChunks
        model.loss_chunk = c.loss_chunk
    for module in model.modules():
        if c.lean and isinstance(module, modeling_glm.GlmMLP):
            module.__class__ = RecomputingMLP
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _fake(buffer, device)
    partition(_fake_parameters(model, device, allocations))
    with torch.device(device):
        return add_adapter(c, model)


def _fake_parameters(model: nn.Module, device: str, allocations: Allocations) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = module._parameters[name] = nn.Parameter(_fake(parameter, device))
                allocations.follow(fake)
                yield fake


def _fake(tensor: Tensor, device: str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class _LossInChunks(modeling_glm.GlmForCausalLM):
    """The network with the job's loss (helpers/finetune/model.py)."""

    loss_chunk: int

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        targets = labels.flatten()
        positions = torch.empty(targets.numel(), dtype=torch.int64, device=targets.device)

        def loss_of(hidden: Tensor) -> Tensor:
            return chunked_cross_entropy(hidden, self.lm_head.weight, targets, self.loss_chunk, positions)

        return CausalLMOutputWithPast(loss=call_through(self.lm_head, loss_of, hidden.flatten(0, 1)))


def step_lengths(c: Configuration) -> list[int]:
    """List the tokens per row of each step to trace."""
    shares = VARYING if c.padded else (1.0,) * STEPS
    return [max(2, round(share * c.sequence_length)) for share in shares]


def fake_batch(c: Configuration, length: int | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Make a batch of the configuration's shape; with a mask of all pairs of tokens if attention gets one.

    Args:
        c: The job.
        length: Tokens per row; None takes the configuration's.
        device: Device of the batch.

    Returns:
        The model's arguments.
    """
    rows, tokens = c.micro_batch_size, length or c.sequence_length
    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    if not c.masked:
        return {"input_ids": ids, "labels": ids}
    pairs = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    return {"input_ids": ids, "labels": ids, "attention_mask": pairs}


def autocast(c: Configuration) -> contextlib.AbstractContextManager[Any]:
    """Return what the configuration's forward runs in."""
    return torch.autocast("cpu", torch.bfloat16) if c.precision == "autocast" else contextlib.nullcontext()
