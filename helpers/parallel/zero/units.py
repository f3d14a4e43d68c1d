"""Units of ZeRO-3: modules whose parameters exist in full only while the modules run."""

from typing import Any

import torch.distributed as dist
from torch import nn

from helpers.parallel.zero.bucket import ZeroBucket


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
        modules: All their parameters belong to the unit.
        group: Ranks that share the parameters.

    Attributes:
        buckets: One per dtype of trained and of frozen parameters.
        trained: Those of the buckets that are trained.
        is_unsharded: Whether the parameters are complete on this rank.
    """

    def __init__(self, modules: list[nn.Module], group: dist.ProcessGroup | None) -> None:
        self.modules = modules
        kinds: dict[tuple[Any, ...], dict[nn.Parameter, None]] = {}  # dicts as ordered sets: tied parameters come twice
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            kinds.setdefault((parameter.dtype, parameter.requires_grad), {})[parameter] = None
        self.buckets = [ShardedBucket(list(parameters), group) for parameters in kinds.values()]
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


def group_into_units(model: nn.Module, blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Group the modules of a model that have parameters, in the model's order.

    Args:
        model: Its modules are grouped.
        blocks: Modules that become a unit with all modules inside them.

    Returns:
        The modules of each unit: a block, or a module outside of the blocks. One that shares a parameter with an
        earlier one (tied embedding and output layer) joins its unit.
    """
    inside_blocks = {module for block in blocks for module in block.modules()} - set(blocks)
    units: list[list[nn.Module]] = []
    unit_of: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        parameters = list(module.parameters(recurse=module in blocks))
        if module in inside_blocks or not parameters:
            continue
        unit = next((unit_of[parameter] for parameter in parameters if parameter in unit_of), None)
        if unit is None:
            unit = []
            units.append(unit)
        unit.append(module)
        unit_of.update(dict.fromkeys(parameters, unit))
    return units
