"""Run the real DeepSpeed on fake tensors, so that a trace sees its buckets, flat tensors and gathered parameters.

DeepSpeed asks an accelerator for its device and its streams, and torch for a process group. Here both are make-believe:
an accelerator whose streams only number the simulated allocator's pools, and torch's "fake" backend, whose collectives
leave every tensor as it is.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # lets collectives take fake tensors
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from deepspeed.runtime.zero import linear, partitioned_param_coordinator
from deepspeed.utils import groups, logger
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.errors import UserError
from helpers.libraries.deepspeed import forget_inputs_of_frozen_layers, share_world_group, skip_cpu_collectives
from helpers.memory.predict.allocations import Allocations
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.fake_job import fake_batch, fake_model, fake_tensors, step_lengths

# A device type that no course machine has, but whose fake tensors have gradients in every build of torch. It stands for
# the GPU, so that "cpu" remains the host: what is offloaded there takes no GPU memory.
DEVICE = "lazy"
MEMORY = 2**40  # bytes that the accelerator seems to have, so that DeepSpeed flattens on it


def trace_zero(c: Configuration, rank: int = 0) -> Allocations:
    """Run some steps of a job under DeepSpeed.

    Args:
        c: A job under ZeRO.
        rank: Which of its ranks.

    Returns:
        What the rank allocated.

    Raises:
        UserError: This process is in a process group.
    """
    if dist.is_initialized():
        raise UserError("a trace of DeepSpeed makes a process group of its own; run it outside of this one")
    allocations = Allocations(c.expandable_segments, DEVICE, c.machine.cublas_workspace)
    with _pretended(allocations, lean=c.lean), _process_group(rank, c.strategy.world_size), fake_tensors(), allocations:
        engine = _engine(c, allocations)
        for length in step_lengths(c):
            for _ in range(c.gradient_accumulation_steps):
                inputs = fake_batch(c, length, DEVICE)
                loss = engine(**inputs).loss
                loss.item()  # as a Trainer does to log it: Python waits for the GPU
                engine.backward(loss)
                engine.step()
                del loss, inputs
    return allocations


def _engine(c: Configuration, allocations: Allocations) -> Any:
    settings = _settings(c)

    def partition(parameters: Iterator[nn.Parameter]) -> None:
        if c.strategy.zero_stage < 3:
            list(parameters)
        else:
            deepspeed.zero.Init(module=_OneByOne(parameters), config_dict_or_path=settings)

    model = fake_model(c, DEVICE, allocations, partition)
    optimizer = _Adam([p for p in model.parameters() if p.requires_grad])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def _settings(c: Configuration) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": c.micro_batch_size,
        "gradient_accumulation_steps": c.gradient_accumulation_steps,
        "bf16": {"enabled": c.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": c.strategy.zero_optimization(),
    }


class _OneByOne(nn.Module):
    """Parameters that exist only when they are taken, as from_pretrained loads them: together they might not fit."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self._made = parameters

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._made


class _Adam(torch.optim.Optimizer):
    """Adam's two states; a fused step makes nothing else."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody passes a closure that returns a loss
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}


@contextlib.contextmanager
def _process_group(rank: int, world_size: int) -> Iterator[None]:
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, environment), mock.patch.dict(vars(groups)), mock.patch.dict(vars(comm)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            logger.setLevel(logging.ERROR)
            skip_cpu_collectives()
            share_world_group()
            deepspeed.init_distributed(dist_backend="fake", verbose=False)
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _pretended(allocations: Allocations, *, lean: bool) -> Iterator[None]:
    """Let DeepSpeed believe in the accelerator, and skip what depends on values; restore everything at the end."""
    no_random_state = SimpleNamespace(
        device=lambda *_: contextlib.nullcontext(), get_rng_state=lambda *_: None, set_rng_state=lambda *_: None
    )
    function = linear.LinearFunctionForZeroStage3
    with (
        warnings.catch_warnings(),
        mock.patch.object(real_accelerator, "ds_accelerator", _Accelerator(allocations)),
        mock.patch.object(linear, "get_accelerator", CPU_Accelerator),  # autocast, which does not know DEVICE
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),
        mock.patch.object(torch, DEVICE, no_random_state, create=True),  # for checkpointing
        mock.patch.object(Tensor, "record_stream", lambda tensor, stream: allocations.record(tensor, stream.number)),
        mock.patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda _: None),
        # What DeepSpeed replaces for good:
        mock.patch.object(nn.functional, "linear", nn.functional.linear),
        mock.patch.object(function, "setup_context", function.setup_context),
    ):
        # DeepSpeed compares addresses, which are all 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        if lean:
            forget_inputs_of_frozen_layers()
        yield


class _Stream:
    """A number; waiting for it is waiting for the GPU."""

    def __init__(self, allocations: Allocations, number: int) -> None:
        self.number = number
        self.synchronize = allocations.synchronize

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def wait_event(self, event: "_Event") -> None:
        pass


class _Event:
    """A point in a stream."""

    def __init__(self, allocations: Allocations) -> None:
        self.synchronize = allocations.synchronize

    def record(self, stream: _Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True


class _Accelerator(CPU_Accelerator):
    """A GPU whose streams only choose the pool of the simulated allocator."""

    def __init__(self, allocations: Allocations) -> None:
        super().__init__()
        self._name, self._communication_backend_name = DEVICE, "fake"
        self._allocations = allocations
        self._streams = [_Stream(allocations, 0)]

    def device_name(self, device_index: int | None = None) -> str:
        return DEVICE

    current_device_name = current_device = device_name

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(DEVICE)

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == DEVICE

    def is_synchronized_device(self) -> bool:
        return False

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def available_memory(self, device_index: int | None = None) -> int:
        return MEMORY

    total_memory = available_memory

    def synchronize(self, device_index: int | None = None) -> None:
        self._allocations.synchronize()

    def empty_cache(self) -> None:
        self._allocations.empty_cache()

    def Event(self, **_: Any) -> _Event:
        return _Event(self._allocations)

    def Stream(self) -> _Stream:
        self._streams.append(_Stream(self._allocations, len(self._streams)))
        return self._streams[-1]

    def default_stream(self, device_index: int | None = None) -> _Stream:
        return self._streams[0]

    def current_stream(self, device_index: int | None = None) -> _Stream:
        return self._streams[self._allocations.stream]

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._allocations.stream = self._allocations.stream, stream.number
        try:
            yield
        finally:
            self._allocations.stream = before
