"""What a rank keeps of a bucket: parameters on the device, the optimizer's part on the host."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from helpers.parallel.buckets import FlatBucket


class SendBuffer:
    """Device memory for one bucket's gradients on their way to the host.

    Args:
        largest: The flat tensor of the largest bucket.
        world_size: Ranks that share a bucket.

    Attributes:
        flat: [elements of the largest bucket].
        shard: [elements / world_size], this rank's part after the reduce-scatter; empty for a single rank.
        sent: When the last copy from this buffer is complete.
    """

    def __init__(self, largest: Tensor, world_size: int) -> None:
        self.flat = torch.empty_like(largest)
        self.shard = self.flat.new_empty(largest.numel() // world_size if world_size > 1 else 0)
        self.sent: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.flat.nbytes + self.shard.nbytes


class OffloadedBucket(FlatBucket):
    """A flat bucket on the device, and on the host what Adam needs to update this rank's shard.

    Args:
        parameters: Of one dtype and device.
        rank: This rank, in its group.
        world_size: Ranks that share the bucket.
        settings: Arguments of AdamW.

    Attributes:
        staging: [shard_size], in the parameters' dtype, page-locked: gradients arrive in it, values leave from it.
        gradient: [shard_size], fp32, the sum over the micro-batches of a step.
        master: [shard_size], the parameters in fp32, which Adam updates.
        adam: AdamW over ``master``.
    """

    def __init__(self, parameters: list[nn.Parameter], rank: int, world_size: int, settings: Mapping[str, Any]) -> None:
        super().__init__(parameters, rank, world_size)
        # Only page-locked memory is copied while both processors go on working.
        page_locked = self.flat.device.type == "cuda"
        self.staging = torch.zeros(self.shard_size, dtype=self.flat.dtype, pin_memory=page_locked)
        self.gradient = torch.zeros(self.shard_size)
        self.master = self.shard.detach().to("cpu", torch.float32, copy=True).requires_grad_()
        self.master.grad = self.gradient
        self.adam = torch.optim.AdamW([self.master], fused=True, **settings)

    @property
    def padding_bytes(self) -> int:
        """Bytes after the last parameter, which give all ranks equally many elements."""
        return (self.flat.numel() - self.elements) * self.flat.element_size()

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of master and moments; Adam makes its moments in the first update."""
        state = self.adam.state.get(self.master, {}).values()
        return self.master.nbytes + sum(tensor.nbytes for tensor in state if tensor.numel() == self.master.numel())

    def accumulate(self, first: bool) -> None:
        """Add the gradients that arrived in ``staging``; the first ones of a step replace those of the last step."""
        if first:
            self.gradient.copy_(self.staging)
        else:
            self.gradient.add_(self.staging)
