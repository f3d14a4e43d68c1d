"""Count the exact bytes of a training process by category and rank, every tensor storage once.

    with SavedTensors(model) as activations:
        loss = model(**batch).loss
    print(count_bytes(model, optimizer, activations).summary())

The ledger reads what exists and allocates nothing. Temporaries inside an operation have no owner; it misses them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from helpers.errors import UserError
from helpers.memory.categories import CATEGORIES
from helpers.memory.saved_tensors import SavedTensors
from helpers.memory.storages import storages, tensors_in
from helpers.memory.table import Table
from helpers.memory.units import unit_for

PARAMETERS, GRADIENTS, STATES, BUFFERS, ACTIVATIONS, COMMUNICATION = CATEGORIES

# Attributes of DeepSpeed's optimizers (0.19) by what they hold; the first category that claims a storage keeps it. All
# other attributes that hold tensors (fp32 masters under several names, momentum) are optimizer states.
DEEPSPEED_ATTRIBUTES = (
    (
        PARAMETERS,
        (
            *("bit16_groups_flat", "bf16_groups_flat", "fp16_groups_flat"),
            *("lp_param_buffer", "fp16_partitioned_groups_flat", "param_groups_fp16_flat_cpu_memory"),
            *("lp_params_pin_buffers", "lp_param_contiguous_pin_buffer"),
        ),
    ),
    (
        GRADIENTS,
        (
            *("averaged_gradients", "all_grad_tensors", "offload_gradient_dict", "accumulated_grads_in_cpu"),
            *("grads_in_partition", "previous_reduced_grads", "grad_partitions_flat_buffer"),
            *("lp_grad_partitions_flat_pin_buffers", "fp32_groups_gradients_flat", "fp32_groups_gradients"),
        ),
    ),
    (
        COMMUNICATION,
        (
            *("ipg_buckets", "extra_large_param_to_reduce", "_muon_allgather_buffers", "parameter_offload"),
            *("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"),
            *("param_buffer_of_bit16_for_cpu_offload_groups", "optimizer_swapper"),
        ),
    ),
)


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank, as plain data: ``dataclasses.asdict`` of it is JSON.

    Attributes:
        rank: The rank.
        devices: Bytes by kind of device (``torch.device.type``: "cpu", "cuda") and category; each device that holds
            anything has every category of :data:`CATEGORIES`.
    """

    rank: int
    devices: Mapping[str, Mapping[str, int]]

    @property
    def categories(self) -> Mapping[str, int]:
        """Bytes per category, summed over devices."""
        return {category: sum(held[category] for held in self.devices.values()) for category in CATEGORIES}

    @property
    def total(self) -> int:
        """Bytes of all storages."""
        return sum(self.categories.values())

    def on(self, device: str) -> Mapping[str, int]:
        """Return the bytes per category on one kind of device; all 0 if it holds nothing."""
        return self.devices.get(device, dict.fromkeys(CATEGORIES, 0))

    def summary(self) -> str:
        """Print one line per category and for the total, with a column per device, in GiB, MiB or KiB."""
        unit = unit_for([self.total])
        columns = [(*held.values(), sum(held.values())) for held in self.devices.values()]
        names = (*CATEGORIES, "total")
        rows = [[name, *map(unit.amount, sizes)] for name, *sizes in zip(names, *columns, strict=True)]
        return str(Table([f"rank {self.rank}, {unit.name}", *self.devices], rows))


def count_bytes(model: nn.Module, optimizer: Any = None, activations: SavedTensors | None = None) -> Ledger:
    """Count the bytes that a model, its optimizer and its activations hold on this rank now.

    The sum over categories is the size of all distinct storages. If two categories share a storage, it is

    * a parameter before anything else: a weight that its optimizer updates in place;
    * a communication buffer if it is a parameter gathered from its shards (ZeRO-3, FSDP2): the shard is the parameter;
    * a communication buffer if it is ZeRO's bucket, although gradients pass through it;
    * a gradient if it is the bucket of BucketedDataParallel, or of DDP with ``gradient_as_bucket_view=True``; without
      gradients, the bucket is a communication buffer.

    A weight quantised by bitsandbytes counts with its scales and tables, as parameters. fp32 master weights are
    optimizer states. DDP's buckets are not visible from Python: they are counted as the size of the parameters that
    they are made for, without the reducer's two integers per parameter.

    Args:
        model: A module, also one wrapped by PEFT, DDP or FSDP2; or a DeepSpeed engine, which knows its optimizer.
        optimizer: Its optimizer, of torch, DeepSpeed, accelerate or helpers.parallel; None without one.
        activations: What autograd saved for backward; None to leave it out.

    Returns:
        Bytes per device and category.

    Raises:
        UserError: ``optimizer`` is not an optimizer.
    """
    census = _Census()
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None) if hasattr(model, "zero_optimization") else None
    chain = list(_unwrapped(optimizer))
    for zero in chain:
        for bucket in getattr(zero, "ipg_buckets", {}).values():
            census.add(bucket.buffer, COMMUNICATION)
        for category, tensors in getattr(zero, "tensors_by_category", {}).items():  # helpers.parallel.zero
            census.add(tensors, category)
    _add_fsdp(census, model)
    _add_parameters(census, model)
    for owner in chain:
        if not isinstance(owner, torch.optim.Optimizer) and not hasattr(owner, "tensors_by_category"):
            _add_deepspeed(census, owner)
    for owner in chain:
        if isinstance(owner, torch.optim.Optimizer):
            for tensor in tensors_in([owner.param_groups, dict(owner.state)]):
                census.add_gradient(tensor)
                census.add(tensor, STATES)
    census.add(list(model.buffers()), BUFFERS)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            _add_ddp_buckets(census, module)
        for category, tensors in getattr(module, "tensors_by_category", {}).items():  # helpers.parallel.data
            census.add(tensors, category)
    for storage in activations.storages() if activations else ():
        census.add_storage(storage, ACTIVATIONS)
    return Ledger(dist.get_rank() if _distributed() else 0, census.devices())


def gather_ledgers(ledger: Ledger) -> list[Ledger]:
    """Gather the ledgers of all ranks, in order of ranks, on every rank; without a process group, just this one."""
    if not _distributed():
        return [ledger]
    ledgers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ledgers, ledger)
    return ledgers


class _Census:
    """Adds up storages by category; the first category that claims a storage keeps it."""

    def __init__(self) -> None:
        self._known: set[tuple[torch.device, int]] = set()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def add(self, value: Any, category: str) -> None:
        for tensor in tensors_in(value):
            for storage in storages(tensor):
                self.add_storage(storage, category)

    def add_storage(self, storage: Any, category: str) -> None:
        if storage[:2] not in self._known:
            self._known.add(storage[:2])
            self.add_bytes(storage.device, category, storage.nbytes)

    def add_gradient(self, tensor: Tensor) -> None:
        if tensor.is_leaf:
            self.add(tensor.grad, GRADIENTS)

    def add_bytes(self, device: torch.device, category: str, nbytes: int) -> None:
        self._bytes[device.type, category] += nbytes

    def devices(self) -> dict[str, dict[str, int]]:
        names = sorted({device for device, _ in self._bytes}, reverse=True)
        return {device: {category: self._bytes[device, category] for category in CATEGORIES} for device in names}


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and those it wraps: accelerate's and DeepSpeed's hold the next one as ``.optimizer``."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        if not hasattr(optimizer, "param_groups"):
            raise UserError(f"{type(optimizer).__name__} is not an optimizer of torch or DeepSpeed")
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _add_parameters(census: _Census, model: nn.Module) -> None:
    parameters = list(model.parameters())
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):  # ZeRO-3: its shard, and the full parameter while it is gathered
            census.add([getattr(parameter, name) for name in ("ds_tensor", "ds_secondary_tensor")], PARAMETERS)
            census.add(parameter, COMMUNICATION)
        census.add(parameter, PARAMETERS)
    census.add(list(quantization_states(model)), PARAMETERS)
    for parameter in parameters:
        census.add_gradient(parameter)
        census.add(getattr(parameter, "grad_accum", None), GRADIENTS)  # ZeRO-1 accumulates gradients in fp32


def quantization_states(model: nn.Module) -> Iterator[Tensor]:
    """Yield bitsandbytes' scales and tables, which are attributes of its parameters or modules."""
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            weight = module.weight
            held = [getattr(weight, name, None) for name in ("quant_state", "CB", "SCB")]
            yield from tensors_in([held, getattr(module, "state", None)], packages=("bitsandbytes.",))


def _add_fsdp(census: _Census, model: nn.Module) -> None:
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    for sharded in (sharded for state in states for group in _fsdp_groups(state) for sharded in group.fsdp_params):
        census.add(sharded.sharded_param, PARAMETERS)
        census.add_gradient(sharded.sharded_param)
        census.add(sharded.unsharded_accumulated_grad, GRADIENTS)
        if hasattr(sharded, "_unsharded_param"):  # from the first all-gather on
            census.add_gradient(sharded._unsharded_param)
    # The rest are outputs of all-gathers, full parameters among them, and inputs of reduce-scatters.
    for tensor in tensors_in(states, packages=("torch.distributed.fsdp",)):
        census.add(tensor, COMMUNICATION)


def _fsdp_groups(state: Any) -> Iterable[Any]:
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.11 has only the one
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _add_deepspeed(census: _Census, optimizer: Any) -> None:
    packages = ("deepspeed.",)
    held = {name: value for name, value in vars(optimizer).items() if not isinstance(value, torch.optim.Optimizer)}
    masters = [tensor for value in held.values() for tensor in tensors_in(value, packages)]
    for tensor in masters:
        census.add_gradient(tensor)
    for category, names in DEEPSPEED_ATTRIBUTES:
        for name in names:
            census.add(list(tensors_in(held.get(name), packages)), category)
    census.add(masters, STATES)


def _add_ddp_buckets(census: _Census, model: DistributedDataParallel) -> None:
    parameters = [parameter for parameter in model._module_parameters if parameter.requires_grad]
    bucket_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if model.gradient_as_bucket_view:
        shared = {
            storage[:2]: storage.nbytes
            for parameter in parameters
            if parameter.grad is not None
            for storage in storages(parameter.grad)
        }
        bucket_bytes -= sum(shared.values())
    census.add_bytes(parameters[0].device, COMMUNICATION, bucket_bytes)
