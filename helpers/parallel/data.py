"""Data parallelism: every rank holds the whole model, works on its own rows, and averages gradients with the others.

Chapter 02 derives what is here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from helpers.errors import UserError
from helpers.memory.units import MIB


def broadcast_parameters(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give all ranks of ``group`` the parameters and buffers of its first rank."""
    source = dist.get_process_group_ranks(group or dist.group.WORLD)[0]
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), source, group=group)


def ring_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of ``tensor`` over the group's ranks, by messages to the next rank only (Patarasuk and Yuan 2009).

    The tensor is cut into N parts. In N - 1 rounds of reduce-scatter each rank adds what it received to its own part
    and passes the sum on; in N - 1 rounds of all-gather the finished parts go round. Each rank sends 2(N - 1)/N of the
    tensor's bytes, which must divide by N.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    n, here = len(ranks), ranks.index(dist.get_rank())
    if tensor.numel() % n:
        raise UserError(f"ring_all_reduce: {tensor.numel()} elements do not divide by {n} ranks; pad the tensor")
    total = tensor.clone()
    parts = list(total.view(-1).chunk(n))
    received = torch.empty_like(parts[0])

    def pass_on(part: Tensor) -> None:
        operations = [
            dist.P2POp(dist.isend, part, ranks[(here + 1) % n], group),
            dist.P2POp(dist.irecv, received, ranks[(here - 1) % n], group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    for turn in range(n - 1):
        pass_on(parts[(here - turn) % n])
        parts[(here - turn - 1) % n] += received
    for turn in range(n - 1):
        pass_on(parts[(here - turn + 1) % n])
        parts[(here - turn) % n].copy_(received)
    return total


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the group, after backward; one message for all of one dtype.

    The message is a copy of them, for a moment. Ranks must have gradients of the same parameters.
    """
    of_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            of_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in of_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        flat /= dist.get_world_size(group)
        dist.all_reduce(flat, group=group)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def loss_weight(tokens: int, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> float:
    """What a rank multiplies its mean loss by, so that the average over ranks is the mean over all their tokens.

    ``tokens`` is how many this rank's loss was averaged over; ranks may differ.
    """
    total = torch.tensor(float(tokens), device=device, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    if not total:
        raise UserError("loss_weight: no rank has a token to learn from; leave this batch out on all ranks")
    return tokens * dist.get_world_size(group) / total.item()


class Bucket:
    """Gradients that lie in one flat tensor and are averaged by one all-reduce."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.buffer = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        pieces = self.buffer.split([p.numel() for p in parameters])
        self.views = {p: piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)}
        self.missing = set(parameters)
        self.work: Any = None

    def take(self, parameter: nn.Parameter) -> None:
        """Make ``parameter``'s gradient a view of the buffer: what is averaged is then the gradient itself."""
        view = self.views[parameter]
        if parameter.grad.data_ptr() != view.data_ptr():
            parameter.grad = view.copy_(parameter.grad)
        self.missing.discard(parameter)


class BucketedDataParallel(nn.Module):
    """``module`` on every rank of ``group``; backward leaves the mean of all ranks' gradients in ``.grad``.

    Buckets are filled in the order in which backward makes gradients, last layers first, and each is all-reduced while
    backward goes on (Li et al. 2020). Every rank must use every parameter that is trained in each backward; otherwise
    that backward raises :class:`UserError` with the unused parameter's name.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = 25 * MIB, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if bucket_bytes <= 0:
            raise UserError(f"BucketedDataParallel: bucket_bytes is {bucket_bytes}; give a size above 0")
        self.module = module
        self.group = group
        broadcast_parameters(module, group)
        self.buckets = [Bucket(parameters) for parameters in in_buckets(module, bucket_bytes)]
        self._synchronises = True
        self._next = 0  # the bucket that goes next: all ranks must send theirs in one order
        self._of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` returns."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward inside only adds to this rank's gradients; the first one after it averages the sum."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._synchronises:
            return
        if all(len(bucket.missing) == len(bucket.parameters) for bucket in self.buckets):  # the first of this backward
            Variable._execution_engine.queue_callback(self._finish)
        self._of[parameter].take(parameter)
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self._reduce(self.buckets[self._next])
            self._next += 1

    def _reduce(self, bucket: Bucket) -> None:
        bucket.buffer /= dist.get_world_size(self.group)
        bucket.work = dist.all_reduce(bucket.buffer, group=self.group, async_op=True)

    def _finish(self) -> None:
        """At the end of backward: wait for what is still under way."""
        unused = {parameter for bucket in self.buckets for parameter in bucket.missing}
        if unused:
            name = next(name for name, parameter in self.module.named_parameters() if parameter in unused)
            raise UserError(
                f"BucketedDataParallel: backward made no gradient for {name} ({len(unused)} such parameters), and the "
                "other ranks would wait for it; freeze it (requires_grad_(False)), or use it on every rank"
            )
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work = None
            bucket.missing = set(bucket.parameters)
        self._next = 0


def in_buckets(module: nn.Module, bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """The trained parameters, last ones first, in lists of one dtype; a list ends before it would be too large."""
    bucket: list[nn.Parameter] = []
    for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
        size = sum(p.numel() * p.element_size() for p in (*bucket, parameter))
        if bucket and (size > bucket_bytes or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
