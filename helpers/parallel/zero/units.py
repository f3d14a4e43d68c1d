"""Units of ZeRO-3: modules whose parameters exist in full only while the modules run."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from helpers.parallel.zero.bucket import ZeroBucket

PARAMETER_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class ShardedBucket(ZeroBucket):
    """A bucket that holds this rank's shard, and memory for all shards only from all-gather to :meth:`reshard`.

    Args:
        parameters: Of one dtype and device.
        group: Ranks that share the bucket.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        super().__init__(parameters, group)
        self.shard = self.shard.clone()  # no longer a view of flat, whose memory goes
        self._unsharded = self.views(self.flat)
        self._empty = self.flat.new_empty(0)
        self.reshard()

    def start_all_gather(self) -> Any:
        """Start to fill ``flat``; after the wait, :meth:`use_unsharded` gives it to the parameters."""
        # resize_ gives the memory behind a tensor back and fetches it again; the tensor object stays. Autograd's saved
        # tensors are views of flat, so they cost nothing while it is empty and are valid again once it is filled.
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        return super().start_all_gather()

    def use_unsharded(self) -> None:
        """Let the parameters be views of the gathered ``flat``."""
        for parameter, view in zip(self.parameters, self._unsharded, strict=True):
            parameter.data = view

    def reshard(self) -> None:
        """Free the full parameters; an operation that used one now would fail on its shape [0]."""
        for parameter in self.parameters:
            parameter.data = self._empty
        self.flat.untyped_storage().resize_(0)


class ShardedUnit:
    """Modules whose parameters are gathered and freed together, in one message per kind of parameter.

    Args:
        modules: They need the parameters while they run.
        parameters: The unit's. What modules inside ``modules`` own may belong to other units.
        group: Ranks that share the parameters.

    Attributes:
        buckets: One per dtype of trained and of frozen parameters.
        trained: Those of the buckets that are trained.
        is_unsharded: Whether the parameters are complete on this rank.
    """

    def __init__(
        self, modules: list[nn.Module], parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None
    ) -> None:
        self.modules = modules
        kinds: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            kinds.setdefault((parameter.dtype, parameter.requires_grad), []).append(parameter)
        self.buckets = [ShardedBucket(of_a_kind, group) for of_a_kind in kinds.values()]
        self.trained = [bucket for bucket in self.buckets if bucket.parameters[0].requires_grad]
        self.is_unsharded = False
        self._in_flight: list[Any] = []

    def prefetch(self) -> None:
        """Start to gather the parameters, unless they are here or on their way."""
        if not self.is_unsharded and not self._in_flight:
            self._in_flight = [bucket.start_all_gather() for bucket in self.buckets]

    def unshard(self) -> None:
        """Give the modules their full parameters."""
        if not self.is_unsharded:
            self.prefetch()
            for bucket, work in zip(self.buckets, self._in_flight, strict=True):
                work.wait()
                bucket.use_unsharded()
            self.is_unsharded, self._in_flight = True, []

    def reshard(self) -> None:
        """Free the full parameters; the shards stay."""
        if self._in_flight:  # the memory that an all-gather writes to must not be freed
            self.unshard()
        if self.is_unsharded:
            for bucket in self.buckets:
                bucket.reshard()
            self.is_unsharded = False


class Grouped(NamedTuple):
    """What becomes a unit.

    Attributes:
        modules: A block, or a module outside of the blocks, and those that share a parameter with it.
        parameters: Those of the modules, each once: of a block all, of another module its own and those in its
            ``ParameterList`` or ``ParameterDict``, which has no forward of its own.
    """

    modules: list[nn.Module]
    parameters: dict[nn.Parameter, None]  # as an ordered set: tied parameters come twice


def group_into_units(model: nn.Module, blocks: list[nn.Module]) -> list[Grouped]:
    """Group the modules of a model that have parameters of their own, in the model's order.

    Args:
        model: Its modules are grouped.
        blocks: Modules that become a unit with all modules inside them. So does torch's multi-head attention, which
            uses its output layer's weight without calling that layer.

    Returns:
        What becomes a unit: a block, or a module outside of the blocks. One that shares parameters with earlier ones
        (tied embedding and output layer) joins their unit; if these are several, they become one.
    """
    inside = {module for block in blocks for module in block.modules()}
    blocks = blocks + [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m not in inside]
    inside_blocks = {module for block in blocks for module in block.modules()} - set(blocks)
    units: list[Grouped] = []
    for module in model.modules():
        own = [module, *(child for child in module.children() if isinstance(child, PARAMETER_CONTAINERS))]
        parameters = dict.fromkeys(
            module.parameters() if module in blocks else (p for owner in own for p in owner.parameters(recurse=False))
        )
        if module in inside_blocks or isinstance(module, PARAMETER_CONTAINERS) or not parameters:
            continue
        sharing = [unit for unit in units if unit.parameters.keys() & parameters.keys()]
        unit = sharing[0] if sharing else Grouped([], {})
        if not sharing:
            units.append(unit)
        for other in sharing[1:]:
            unit.modules.extend(other.modules)
            unit.parameters.update(other.parameters)
            units.remove(other)
        unit.modules.append(module)
        unit.parameters.update(parameters)
    return units
