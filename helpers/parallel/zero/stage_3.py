"""ZeRO-3: each rank keeps its shard of the parameters as well (chapter 08)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from helpers.parallel.data import broadcast_parameters
from helpers.parallel.zero.bucket import ZeroBucket
from helpers.parallel.zero.stage_1 import MakeOptimizer
from helpers.parallel.zero.stage_2 import Zero2
from helpers.parallel.zero.units import ShardedUnit, group_into_units


class Zero3(Zero2):
    """Shard parameters as well: a unit's full parameters exist only while it runs.

    Units are ``blocks`` and every other module with parameters of its own, which may have such submodules in turn;
    modules that share a parameter are one unit. A module may use only its own parameters by name.
    Parameters are gathered before a unit's forward and freed after it, and again in backward. While a unit computes,
    the next one is gathered, in the order of the last forward. Outside of forward and backward a parameter has no
    elements; see :meth:`full_parameters`. Works with activation checkpointing of full blocks.

    Args:
        model: All ranks get the first rank's weights.
        make_optimizer: As in :class:`Zero1`.
        blocks: The model's repeated modules, a transformer's layers.
        group: Ranks that take part; all by default.

    Attributes:
        units: In the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        blocks: Iterable[nn.Module],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        broadcast_parameters(model, group)
        self.units = [ShardedUnit(*grouped, group) for grouped in group_into_units(model, list(blocks))]
        self._last_order: list[ShardedUnit] = []  # units in the order of the last forward
        self._order: list[ShardedUnit] = []  # the same for this forward, so far
        self._entered: list[int] = []  # indices in _order of units that run: with a parameter of its own, a module's
        # unit runs until the units of its submodules have run
        self._set_up(model, [bucket for unit in reversed(self.units) for bucket in unit.trained], make_optimizer)
        model.register_forward_pre_hook(self._begin_forward)
        model.register_forward_hook(self._end_forward)
        for unit in self.units:
            for module in unit.modules:
                module.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True)
                module.register_forward_hook(partial(self._after_forward, unit))

    @property
    def tensors_by_category(self) -> Mapping[str, list[Tensor]]:
        """As in :class:`Zero1`; gathered parameters are communication buffers."""
        tensors, buckets = super().tensors_by_category, [bucket for unit in self.units for bucket in unit.buckets]
        return {
            **tensors,
            "parameters": [bucket.shard for bucket in buckets],
            "communication buffers": [*tensors["communication buffers"], *(bucket.flat for bucket in buckets)],
        }

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Gather all parameters for the block, to be read on every rank; what is written to them is lost.

        Returns:
            A context manager that all ranks must enter.
        """
        for unit in self.units:
            unit.unshard()
        try:
            yield
        finally:
            self._reshard_all()

    def _begin_forward(self, *_: Any) -> None:
        self._hooks.recover()
        self._reshard_all()  # what a forward that failed has left
        self._last_order, self._order, self._entered = self._order, [], []

    def _end_forward(self, *_: Any) -> None:
        self._reshard_all()

    def _before_forward(self, unit: ShardedUnit, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._hooks.recover()
        unit.unshard()
        if self._hooks.running:  # backward recomputes a checkpointed block
            return
        index = len(self._order)
        self._order.append(unit)
        nested = self._is_running(unit)
        self._entered.append(index)
        if nested:  # a submodule that shares the parameter of its module
            return
        if self._last_order[index : index + 1] == [unit]:  # the same order as last time, so far
            for next_unit in self._last_order[index + 1 : index + 2]:
                next_unit.prefetch()
        # The unit's backward is over when the gradients of all its inputs are there.
        inputs = _requiring_grad((args, kwargs))
        if inputs:
            register_multi_grad_hook(inputs, lambda _: self._after_backward(unit), mode="all")

    def _after_forward(self, unit: ShardedUnit, module: nn.Module, args: Any, output: Any) -> None:
        if self._hooks.running:
            return
        order, index = self._order, self._entered.pop()
        if self._is_running(unit):
            return
        # The unit's backward begins when the gradient of any of its outputs is there.
        outputs = _requiring_grad(output)
        if outputs:
            register_multi_grad_hook(outputs, lambda _: self._before_backward(order, index), mode="any")
        unit.reshard()

    def _is_running(self, unit: ShardedUnit) -> bool:
        return any(self._order[index] is unit for index in self._entered)

    def _before_backward(self, order: list[ShardedUnit], index: int) -> None:
        self._hooks.begin()
        order[index].unshard()
        if index:
            order[index - 1].prefetch()  # backward visits units in the opposite order

    def _after_backward(self, unit: ShardedUnit) -> None:
        # A tied parameter gets its gradient only after the backward of its other module, which still needs it.
        if not any(bucket.missing for bucket in unit.trained):
            unit.reshard()

    def _end_backward(self, complete: bool) -> None:
        self._reshard_all()
        super()._end_backward(complete)

    def _reshard_all(self) -> None:
        for unit in self.units:
            unit.reshard()

    def _publish(self, bucket: ZeroBucket) -> list[Any]:
        """Send nothing: the next forward gathers the updated shards."""
        return []


def _requiring_grad(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.requires_grad]
