"""ZeRO-1: each rank keeps the optimizer states of its shard of the parameters (chapter 06)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.errors import UserError
from helpers.memory.units import MIB
from helpers.parallel.buckets import assign_buckets, missing_gradient_error
from helpers.parallel.data import broadcast_parameters
from helpers.parallel.zero.bucket import ZeroBucket

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Zero1:
    """Shard the optimizer: each rank keeps states for its shards of the trained parameters, and updates only those.

    Backward is the ordinary one and leaves full gradients. :meth:`step` reduce-scatters them, updates this rank's
    shards, and all-gathers the new parameters, one bucket at a time.

    Args:
        model: All ranks get the first rank's weights; its parameters become views of flat tensors.
        make_optimizer: Gets this rank's shards in fp32, one per bucket, and makes an optimizer that treats elements one
            by one (SGD, Adam, AdamW; not Adafactor or LAMB). The shards are the master weights of 16-bit parameters;
            for fp32 parameters they are the parameters themselves.
        bucket_bytes: Bytes of parameters per message.
        group: Ranks that take part; all by default.

    Attributes:
        buckets: In the order in which gradients are sent.
        masters: This rank's fp32 shard of each bucket [shard_size].
        optimizer: What ``make_optimizer`` made.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        bucket_bytes: int = 50 * MIB,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        assigned = assign_buckets(model, bucket_bytes)  # refuses a wrong size before anything is sent
        broadcast_parameters(model, group)
        self._set_up(model, [ZeroBucket(parameters, group) for parameters in assigned], make_optimizer)

    def _set_up(self, model: nn.Module, buckets: Sequence[ZeroBucket], make_optimizer: MakeOptimizer) -> None:
        if not buckets:
            raise UserError(f"{type(self).__name__}: every parameter is frozen; leave some to be trained")
        self._model = model
        self.buckets = buckets
        self.masters = [nn.Parameter(bucket.shard.float()) for bucket in buckets]
        self.optimizer = make_optimizer(self.masters)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, in which a scheduler sets the learning rate."""
        return self.optimizer.param_groups

    @property
    def tensors_by_category(self) -> Mapping[str, list[Tensor]]:
        """Tensors besides those of model and optimizer, by the categories of ``helpers.memory.ledger``."""
        return {
            "parameters": [bucket.shard for bucket in self.buckets],
            "gradients": [bucket.gradient for bucket in self.buckets if bucket.gradient is not None],
            "communication buffers": [bucket.unreduced for bucket in self.buckets if bucket.unreduced is not None],
        }

    def reduce(self) -> None:
        """Replace full gradients by this rank's shards of their means, unless backward has done so already.

        Raises:
            UserError: Names a parameter that has no gradient.
        """
        pending = [bucket for bucket in self.buckets if bucket.gradient is None]
        unused = [parameter for bucket in pending for parameter in bucket.parameters if parameter.grad is None]
        if unused:
            raise missing_gradient_error(self, self._model, unused)
        for bucket in pending:
            for parameter in bucket.parameters:
                bucket.collect(parameter)
            bucket.start_reduce_scatter()
            bucket.finish_reduce_scatter()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradient so that its norm over all ranks' shards is at most ``max_norm``.

        Args:
            max_norm: Limit of the 2-norm.

        Returns:
            The norm before, a scalar, the same on all ranks.

        Raises:
            UserError: Names a parameter that has no gradient.
        """
        self.reduce()
        gradients = [bucket.gradient for bucket in self.buckets if bucket.gradient is not None]
        # Norms of shards do not add up; their squares do.
        square = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square, group=self.buckets[0].group)
        norm = square.sqrt()
        for gradient in gradients:
            gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters with the gradients since the last step, and free these.

        Buckets are updated one by one, so that at most one has its gradient in fp32.

        Raises:
            UserError: Names a parameter that has no gradient.
        """
        self.reduce()
        in_flight = []
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            master.grad = bucket.pop_gradient().float()  # [shard_size]
            self.optimizer.step()  # skips the masters of all other buckets: they have no gradient
            master.grad = None
            if master.dtype != bucket.shard.dtype:  # else the master is the shard itself
                bucket.shard.copy_(master)
            in_flight += self._publish(bucket)
        for work in in_flight:
            work.wait()

    def _publish(self, bucket: ZeroBucket) -> list[Any]:
        """Start to send updated parameters to the ranks that need them; return what to wait for."""
        return [bucket.start_all_gather()]

    def zero_grad(self) -> None:
        """Free the gradients since the last step."""
        for bucket in self.buckets:
            bucket.gradient = None
            for parameter in bucket.parameters:
                parameter.grad = None
