"""Count the collectives of a rank and estimate the bytes that it sends for them.

:func:`count_traffic` observes calls, not wires: its bytes are calls x ring formula. What a library really sends depends
on the algorithm that it picks (rings, trees, NVLink multicast). :func:`loopback_bytes` reads the system's own counter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

INTERFACES = Path("/proc/net/dev")

# The ring formula: bytes that each of n ranks sends, as a share of the full tensor's (Patarasuk and Yuan 2009; Thakur
# et al. 2005). For operations with a root it is the mean over the ranks.
RING_SHARES: Mapping[str, Callable[[int], float]] = MappingProxyType(
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
# torch's operators, which every caller ends in (torch.distributed, DDP's reducer, DTensor): the collective, and the
# position of the argument that holds the full tensor.
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
class Collective:
    """One call of a collective.

    Attributes:
        operation: A key of ``RING_SHARES``.
        ranks: The ranks of its process group.
        nbytes: Bytes of the full tensor: for an all-gather the output, for a reduce-scatter the input.
    """

    operation: str
    ranks: tuple[int, ...]
    nbytes: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends for this call by the ring formula."""
        return RING_SHARES[self.operation](len(self.ranks)) * self.nbytes


@dataclass
class Traffic:
    """The collectives that this rank took part in, in the order of their calls.

    Attributes:
        collectives: One entry per call.
    """

    collectives: list[Collective] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Bytes that this rank sends for all of them by the ring formula."""
        return round(sum(collective.sent for collective in self.collectives))

    def by_operation(self) -> dict[str, tuple[int, int]]:
        """Return (calls, bytes sent) for each kind of collective, the busiest first."""
        kinds: dict[str, Traffic] = {}
        for collective in self.collectives:
            kinds.setdefault(collective.operation, Traffic()).collectives.append(collective)
        ordered = sorted(kinds.items(), key=lambda item: -item[1].sent)
        return {name: (len(traffic.collectives), traffic.sent) for name, traffic in ordered}

    def within(self, group: dist.ProcessGroup) -> "Traffic":
        """Return the part that went through ``group``, or through another group of the same ranks."""
        ranks = tuple(dist.get_process_group_ranks(group))
        return Traffic([collective for collective in self.collectives if collective.ranks == ranks])


class count_traffic(TorchDispatchMode):
    """Record every collective that a ``with`` block starts on this rank, backward's and the libraries' included.

        with count_traffic() as traffic:
            loss.backward()
        print(traffic.sent, traffic.by_operation())

    The bytes are an estimate: calls x ring formula, not bytes measured on a wire. Barriers and what a receiver gets do
    not count; a group of one rank sends nothing.
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
            operation, position = _OPERATORS[name]
            # The first boxed object is the process group; a second one would be the reduction (sum, max).
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            self._add(operation, dist.ProcessGroup.unbox(boxed), args[position])
        elif name.startswith("_c10d_functional::"):
            functional = _FUNCTIONAL.get(name.partition("::")[2].removesuffix("_coalesced").removesuffix("_"))
            if functional:
                group = (kwargs or {}).get("group_name", args[-1])  # the group itself or its name
                if isinstance(group, str):
                    group = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group))
                self._add(functional, group, result if functional == "all-gather" else args[0])
        return result

    def _add(self, operation: str, group: dist.ProcessGroup, full_tensor: Any) -> None:
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(full_tensor))
        ranks = tuple(dist.get_process_group_ranks(group))
        self.traffic.collectives.append(Collective(operation, ranks, nbytes))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors(element)


def loopback_bytes() -> int | None:
    """Read how many bytes all processes have sent over the loopback interface since the machine started.

    gloo sends through it. NCCL does not: between GPUs of one machine it uses NVLink, PCIe or shared memory.

    Returns:
        Bytes; None on a system without ``/proc/net/dev``.
    """
    if not INTERFACES.is_file():
        return None
    for line in INTERFACES.read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])  # eight counters of received traffic come first
    return None


def loopback_bytes_during(action: Callable[[], object]) -> int | None:
    """Run ``action`` on all ranks and read how many bytes went over the loopback interface meanwhile.

    All ranks must call it. Other programs that use the interface are counted as well.

    Args:
        action: The function that each rank calls.

    Returns:
        Bytes that all ranks sent together; None if nothing counts them, or if the ranks use NCCL.
    """

    def read_between_barriers() -> int | None:
        dist.barrier()  # all ranks have arrived, and none goes on before every rank has read
        nbytes = loopback_bytes()
        dist.barrier()
        return nbytes

    before = read_between_barriers()
    action()
    after = read_between_barriers()
    if before is None or after is None or dist.get_backend() != "gloo":
        return None
    return after - before
