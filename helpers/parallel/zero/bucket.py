"""Reduce-scatter the gradients of a bucket and all-gather its parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.parallel.buckets import FlatBucket, pop_gradient


class ZeroBucket(FlatBucket):
    """A flat bucket of which each rank gets its shard of the mean gradient.

    Args:
        parameters: Of one dtype and device.
        group: Ranks that share the bucket.

    Attributes:
        unreduced: [world_size * shard_size], this rank's own gradients, from the first one to the reduce-scatter.
        gradient: [shard_size], the mean over all ranks, from the reduce-scatter to the step.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        super().__init__(parameters, dist.get_rank(group), dist.get_world_size(group))
        self.group = group
        self.unreduced: Tensor | None = None
        self.gradient: Tensor | None = None
        self._unreduced_views: dict[nn.Parameter, Tensor] = {}
        self._in_flight: tuple[Tensor, Any] | None = None  # the shard that is received, and what to wait for

    def collect(self, parameter: nn.Parameter) -> None:
        """Move a gradient into the flat tensor, divided by N: the sum over ranks is then their mean."""
        if self.unreduced is None:
            self.unreduced = self.flat.new_zeros(self.flat.numel())
            self._unreduced_views = dict(zip(self.parameters, self.views(self.unreduced), strict=True))
        torch.div(pop_gradient(parameter), self.world_size, out=self._unreduced_views[parameter])
        super().collect(parameter)

    def start_reduce_scatter(self) -> None:
        """Start to send each rank its shard of the gradients; :meth:`finish_reduce_scatter` must follow."""
        assert self.unreduced is not None, "collect() comes first"
        received = self.unreduced.new_empty(self.shard_size)
        work = dist.reduce_scatter_tensor(received, self.unreduced, group=self.group, async_op=True)
        self._in_flight = received, work

    def finish_reduce_scatter(self) -> None:
        """Wait for this rank's shard, add it to what earlier micro-batches left, and free the unreduced gradients."""
        assert self._in_flight is not None, "start_reduce_scatter() comes first"
        received, work = self._in_flight
        work.wait()
        self.gradient = received if self.gradient is None else self.gradient.add_(received)
        self.unreduced, self._unreduced_views, self._in_flight = None, {}, None

    def pop_gradient(self) -> Tensor:
        """Take away this rank's shard of the gradient [shard_size], so that it is freed with the result."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None, "called before the reduce-scatter"
        return gradient

    def start_all_gather(self) -> Any:
        """Start to fill ``flat`` with the shards of all ranks; return what to wait for."""
        return dist.all_gather_into_tensor(self.flat, self.shard, group=self.group, async_op=True)
