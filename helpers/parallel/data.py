"""Data parallelism: every rank holds the full model, works on its own rows, and averages gradients with the others.

Chapter 02 derives it; Li et al. 2020 describe PyTorch's DDP, which works alike.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.errors import UserError
from helpers.memory.units import MIB
from helpers.parallel.buckets import BackwardHooks, Bucket, assign_buckets


def broadcast_parameters(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Copy the parameters and buffers of the group's first rank to all its ranks."""
    source = dist.get_process_group_ranks(group or dist.group.WORLD)[0]
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), source, group=group)


def ring_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over a group with messages to the next rank only (Patarasuk and Yuan 2009).

    The tensor is split into N chunks. In N - 1 rounds of reduce-scatter each rank adds the chunk that it receives to
    its own and passes the sum on. In N - 1 rounds of all-gather the finished chunks go round. So each rank sends
    2(N - 1)/N of the tensor's bytes.

    Args:
        tensor: Same shape on all ranks; it stays as it is.
        group: Ranks that take part; all by default.

    Returns:
        The sum, in the shape of ``tensor``.

    Raises:
        UserError: If the tensor's elements do not divide by the number of ranks.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    world_size, rank = len(ranks), ranks.index(dist.get_rank())
    if tensor.numel() % world_size:
        raise UserError(
            f"ring_all_reduce: {tensor.numel()} elements do not divide by {world_size} ranks; pad the tensor"
        )
    total = tensor.clone(memory_format=torch.contiguous_format)  # a transposed tensor has no flat view
    chunks = list(total.view(-1).chunk(world_size))  # world_size views, each [elements / world_size]
    received = torch.empty_like(chunks[0])

    def pass_on(chunk: Tensor) -> None:
        operations = [
            dist.P2POp(dist.isend, chunk, ranks[(rank + 1) % world_size], group),
            dist.P2POp(dist.irecv, received, ranks[(rank - 1) % world_size], group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    for turn in range(world_size - 1):  # reduce-scatter: afterwards chunk rank + 1 is complete on this rank
        pass_on(chunks[(rank - turn) % world_size])
        chunks[(rank - turn - 1) % world_size] += received
    for turn in range(world_size - 1):  # all-gather
        pass_on(chunks[(rank - turn + 1) % world_size])
        chunks[(rank - turn) % world_size].copy_(received)
    return total


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the group, after backward, with one all-reduce per dtype.

    For the time of the all-reduce there is a flat copy of all gradients.

    Args:
        parameters: Those with a gradient must be the same on all ranks.
        group: Ranks that take part; all by default.
    """
    of_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            of_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in of_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])  # [elements of all gradients]
        flat /= dist.get_world_size(group)  # before the sum, which could overflow in 16 bit
        dist.all_reduce(flat, group=group)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def loss_weight(tokens: int, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> float:
    """Compute the factor for a rank's mean loss that makes the average over ranks the mean over all their tokens.

    Args:
        tokens: Tokens that this rank's loss is a mean of; ranks may differ.
        group: Ranks that take part; all by default.
        device: A device that the group can communicate from.

    Returns:
        N * tokens / tokens of all N ranks.

    Raises:
        UserError: If no rank has a token.
    """
    total = torch.tensor(float(tokens), device=device, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    if not total:
        raise UserError("loss_weight: no rank has a token to learn from; leave this batch out on all ranks")
    return tokens * dist.get_world_size(group) / total.item()


class GradientBucket(Bucket):
    """A bucket whose gradients are views of one flat buffer, which one all-reduce averages.

    Attributes:
        buffer: [elements of all parameters].
        work: The running all-reduce, which can be waited for.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        self.buffer = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        pieces = self.buffer.split(sizes)
        self._views = {p: piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)}
        self.work: Any = None

    def collect(self, parameter: nn.Parameter) -> None:
        """Make the gradient a view of the buffer: averaging the buffer then averages the gradient itself."""
        gradient, view = parameter.grad, self._views[parameter]
        # Unless .grad was set to None, backward has already added to the view.
        if gradient is not None and gradient.data_ptr() != view.data_ptr():
            parameter.grad = view.copy_(gradient)
        super().collect(parameter)


class BucketedDataParallel(nn.Module):
    """Train ``module`` on every rank of a group; backward leaves the mean of all ranks' gradients in ``.grad``.

    Each bucket of gradients is all-reduced while backward continues with earlier layers (Li et al. 2020, section 3.2).
    Every rank must use every trained parameter in each backward. Otherwise that backward raises :class:`UserError` with
    the unused parameter's name. After a backward that failed, on all ranks, free the gradients (``zero_grad``).

    Args:
        module: Frozen parameters stay out; all ranks get the first rank's values.
        bucket_bytes: Bytes of gradients per all-reduce.
        group: Ranks that take part; all by default.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = 25 * MIB, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.module = module
        self.group = group
        self.buckets = [GradientBucket(parameters) for parameters in assign_buckets(module, bucket_bytes)]
        broadcast_parameters(module, group)
        self._hooks = BackwardHooks(self, module, self.buckets, self._start_all_reduce, self._wait_for_all)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module.

        Args:
            args: For the module's forward.
            kwargs: For the module's forward.

        Returns:
            Its result.
        """
        return self.module(*args, **kwargs)

    @property
    def tensors_by_category(self) -> dict[str, list[Tensor]]:
        """Tensors besides those of the module, by the categories of ``helpers.memory.ledger``.

        Gradients are views of the buckets; without gradients, the buckets stay.
        """
        return {"communication buffers": [bucket.buffer for bucket in self.buckets]}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward inside the block only add to this rank's gradients; the first one after it averages the sum.

        Returns:
            A context manager.
        """
        before, self._hooks.enabled = self._hooks.enabled, False
        try:
            yield
        finally:
            self._hooks.enabled = before

    def _start_all_reduce(self, bucket: GradientBucket) -> None:
        bucket.buffer /= dist.get_world_size(self.group)  # a mean; dividing first keeps 16-bit sums from overflowing
        bucket.work = dist.all_reduce(bucket.buffer, group=self.group, async_op=True)

    def _wait_for_all(self, complete: bool) -> None:
        for bucket in self.buckets:
            if bucket.work is not None:  # always, if backward was complete
                bucket.work.wait()
                bucket.work = None
