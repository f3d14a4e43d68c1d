"""Collect gradients in buckets, and hand each over as soon as backward has filled it (chapter 02 derives this).

Data parallelism, ZeRO-2 and -3 and optimizer offload share this part. They differ in what they do with a full bucket.
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from helpers.errors import UserError

AnyBucket = TypeVar("AnyBucket", bound="Bucket")


def assign_buckets(module: nn.Module, bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Assign trained parameters to buckets, last ones first: backward makes the last layers' gradients first.

    Args:
        module: Its parameters with ``requires_grad`` are assigned.
        bucket_bytes: Bytes per bucket, at most; a larger parameter gets a bucket of its own.

    Returns:
        The parameters of each bucket, all of one dtype.

    Raises:
        UserError: If ``bucket_bytes`` is not positive.
    """
    if bucket_bytes <= 0:
        raise UserError(f"bucket_bytes is {bucket_bytes}; give a size above 0")
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
        if not buckets or parameter.nbytes > room or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


def pop_gradient(parameter: nn.Parameter) -> Tensor:
    """Take a gradient away from its parameter, so that its memory is freed with the last use of the result."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "called before backward has made the gradient"
    return gradient


def missing_gradient_error(owner: object, model: nn.Module, unused: Collection[nn.Parameter]) -> UserError:
    """Make the error that names the first of the ``unused`` parameters of ``model``."""
    members = set(unused)
    name = next(name for name, parameter in model.named_parameters() if parameter in members)
    return UserError(
        f"{type(owner).__name__}: backward made no gradient for {name} ({len(members)} such parameters); freeze it "
        "(requires_grad_(False)) before you wrap the model, or use it on every rank"
    )


class Bucket:
    """Parameters whose gradients travel in one message.

    Args:
        parameters: Of one dtype and device.

    Attributes:
        missing: Parameters whose gradients the running backward has not made yet.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = set(parameters)

    def collect(self, parameter: nn.Parameter) -> None:
        """Take note of a finished gradient; subclasses also move it into the message."""
        self.missing.discard(parameter)


class FlatBucket(Bucket):
    """Parameters as views of one flat tensor, of which each rank owns a shard of equal size.

    A shard may begin and end in the middle of a parameter. That is fine for optimizers that treat every element alone.

    Args:
        parameters: Their data moves into the flat tensor.
        rank: This rank, in its group.
        world_size: Ranks that share the bucket.

    Attributes:
        flat: [world_size * shard_size], the parameters one after another, then zeros that make it divide.
        shard: [shard_size], the part of ``flat`` that this rank owns.
    """

    def __init__(self, parameters: list[nn.Parameter], rank: int, world_size: int) -> None:
        super().__init__(parameters)
        self.world_size = world_size
        self._shapes = [parameter.shape for parameter in parameters]
        self.elements = sum(shape.numel() for shape in self._shapes)
        self.shard_size = -(-self.elements // world_size)  # rounded up
        first = parameters[0]
        self.flat = torch.zeros(world_size * self.shard_size, dtype=first.dtype, device=first.device)
        for parameter, view in zip(parameters, self.views(self.flat), strict=True):
            parameter.data = view.copy_(parameter.data)
        self.shard = self.flat[rank * self.shard_size : (rank + 1) * self.shard_size]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of ``flat`` [world_size * shard_size] in the parameters' shapes, without its padding."""
        pieces = flat[: self.elements].split([shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]


class BackwardHooks(Generic[AnyBucket]):
    """Hand over each bucket of a model during backward, as soon as its last gradient is complete.

    Collectives of different ranks are matched by their order alone. So a full bucket waits for those before it: all
    ranks hand over their buckets in the order of ``buckets``, even if gradients are made in another order.

    Args:
        owner: Whose name errors begin with.
        model: Has the parameters.
        buckets: All buckets, in the order in which to hand them over.
        on_full: Called with each full bucket.
        on_end: Called at the end of each backward with whether it made all gradients of the buckets. If it did not, an
            error follows; what is in flight must be finished before that, or it would end up in the next backward.
            Called with False as well when :meth:`recover` finds that an error has broken a backward off.

    Attributes:
        enabled: Set to False, the hooks leave gradients alone.
        running: Whether a backward is under way.
    """

    def __init__(
        self,
        owner: object,
        model: nn.Module,
        buckets: Sequence[AnyBucket],
        on_full: Callable[[AnyBucket], None],
        on_end: Callable[[bool], None],
    ) -> None:
        self.enabled, self.running = True, False
        self._owner, self._model, self._buckets = owner, model, buckets
        self._on_full, self._on_end = on_full, on_end
        self._next = 0  # index of the bucket to hand over next
        self._end_callback: weakref.ref[partial[None]] | None = None  # lives as long as autograd's graph task
        self._bucket_of = {parameter: bucket for bucket in buckets for parameter in bucket.parameters}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def begin(self) -> None:
        """Tell autograd, if this is the first call in a backward, to call the hooks again at its end."""
        self.recover()
        if not self.running:
            self.running = True
            end = partial(self._end)
            self._end_callback = weakref.ref(end)
            Variable._execution_engine.queue_callback(end)

    def recover(self) -> None:
        """After a backward that an error broke off, finish what it left in flight, and expect a new one.

        Autograd does not call its hooks at the end of such a backward. But no backward is under way outside of
        autograd, nor after autograd has dropped the callback of the one that was.
        """
        if not self.running:
            return
        outside = torch._C._current_graph_task_id() == -1
        if outside or self._end_callback is None or self._end_callback() is None:
            self._reset()
            self._on_end(False)

    def _reset(self) -> None:
        self.running, self._next = False, 0
        for bucket in self._buckets:
            bucket.missing = set(bucket.parameters)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self.enabled:
            return
        self.begin()
        self._bucket_of[parameter].collect(parameter)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._on_full(self._buckets[self._next])
            self._next += 1

    def _end(self) -> None:
        unused = [parameter for bucket in self._buckets for parameter in bucket.missing]
        self._reset()
        self._on_end(not unused)
        if unused:
            raise missing_gradient_error(self._owner, self._model, unused)
