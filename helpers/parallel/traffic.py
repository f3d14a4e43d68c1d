"""Bytes that ranks send one another: what each collective must send, call by call, and what the system counted."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

INTERFACES = Path("/proc/net/dev")

# Bytes that each rank of n sends in a ring, of the whole tensor's (Patarasuk and Yuan 2009; Thakur et al. 2005). Of
# operations with a root it is the mean over the ranks. What a library really sends may be more.
SENT: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {
        "all-reduce": lambda n: 2 * (n - 1) / n,
        "all-gather": lambda n: (n - 1) / n,
        "reduce-scatter": lambda n: (n - 1) / n,
        "all-to-all": lambda n: (n - 1) / n,
        "broadcast": lambda n: (n - 1) / n,
        "reduce": lambda n: (n - 1) / n,
        "gather": lambda n: (n - 1) / n,
        "scatter": lambda n: (n - 1) / n,
        "send": lambda n: 1.0,
    }
)
# torch's operators, below every way to call them (torch.distributed, DDP's reducer, functional collectives, DTensor):
# the collective, and which argument holds the whole tensor.
_OPERATORS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::gather_": ("gather", 0),
    "c10d::scatter_": ("scatter", 1),
    "c10d::send": ("send", 0),
}
_FUNCTIONAL = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Call:
    """One collective: its name, the ranks of its group, bytes of the whole tensor."""

    operation: str
    ranks: tuple[int, ...]
    nbytes: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends for it, at least."""
        return SENT[self.operation](len(self.ranks)) * self.nbytes


@dataclass
class Traffic:
    """The collectives that this rank took part in, in their order."""

    calls: list[Call] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Bytes that this rank sent, at least."""
        return round(sum(call.sent for call in self.calls))

    def by_operation(self) -> dict[str, tuple[int, int]]:
        """(calls, bytes sent) of each kind of collective, the busiest first."""
        names = dict.fromkeys(call.operation for call in self.calls)
        totals = {name: Traffic([call for call in self.calls if call.operation == name]) for name in names}
        ordered = sorted(totals.items(), key=lambda item: -item[1].sent)
        return {name: (len(traffic.calls), traffic.sent) for name, traffic in ordered}

    def within(self, group: dist.ProcessGroup) -> "Traffic":
        """That part of it which went through ``group``, or another group of the same ranks."""
        ranks = tuple(dist.get_process_group_ranks(group))
        return Traffic([call for call in self.calls if call.ranks == ranks])


class count_traffic(TorchDispatchMode):
    """Record every collective that the block starts on this rank, backward's and the libraries' included.

    with count_traffic() as traffic:
        loss.backward()
    print(traffic.sent, traffic.by_operation())

    Barriers and what a receiver takes are left out; a group of one rank sends nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __enter__(self) -> Traffic:
        super().__enter__()
        return self.traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _OPERATORS:
            operation, place = _OPERATORS[name]
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))  # the reduction's kind comes later
            self._add(operation, dist.ProcessGroup.unbox(boxed), args[place])
        elif name.startswith("_c10d_functional::"):
            operation = _FUNCTIONAL.get(name.partition("::")[2].removesuffix("_coalesced").removesuffix("_"))
            if operation:
                group = args[-1] if "group_name" not in (kwargs or {}) else kwargs["group_name"]
                group = dist.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group
                self._add(operation, group, result if operation == "all-gather" else args[0])
        return result

    def _add(self, operation: str, group: dist.ProcessGroup, whole: Any) -> None:
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(whole))
        self.traffic.calls.append(Call(operation, tuple(dist.get_process_group_ranks(group)), nbytes))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors(element)


def loopback_bytes() -> int | None:
    """Bytes sent over the loopback interface since the machine started, by all processes; None where nothing says so.

    gloo sends through it. NCCL does not: between GPUs of one machine it uses NVLink, PCIe or shared memory.
    """
    if not INTERFACES.is_file():
        return None
    for line in INTERFACES.read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])  # eight counters of what was received come first
    return None
