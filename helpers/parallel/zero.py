"""ZeRO: data parallelism without copies of what only one rank needs at a time (Rajbhandari et al. 2019).

Three classes, each the one before it with one thing more that is partitioned: :class:`Zero1` optimizer states,
:class:`Zero2` gradients as well, :class:`Zero3` parameters as well. With 16-bit weights and Adam a rank of N holds
4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N and 16Ψ/N bytes of model states, and sends 2Ψ, 2Ψ and 3Ψ elements a step. Chapters 06 to 08
derive what is here.

    zero = Zero2(model, partial(torch.optim.AdamW, lr=1e-5))
    model(**batch).loss.backward()
    zero.step()

Ranks begin with the first one's weights, and all must run the same operations in each backward. Parameters that are
frozen (``requires_grad_(False)``) when one of these is made stay whole under ZeRO-1 and -2; ZeRO-3 partitions them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from helpers.errors import UserError
from helpers.memory.units import MIB
from helpers.parallel.data import broadcast_parameters, in_buckets

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Bucket:
    """Parameters of one dtype in one flat tensor, cut into equal parts, of which each rank owns one.

    ``flat`` [N * size] holds the parameters one after another, and zeros at the end where they do not divide by N.
    ``part`` [size] is this rank's part of it. ``gradient`` [size] is the mean over all ranks of the part's gradient,
    from its reduce-scatter to the step.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self.parameters, self.group = parameters, group
        self.ranks = dist.get_world_size(group)
        self._shapes = [parameter.shape for parameter in parameters]
        self._elements = sum(shape.numel() for shape in self._shapes)
        self.size = -(-self._elements // self.ranks)
        self.flat = torch.zeros(self.ranks * self.size, dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, view in zip(parameters, self.views(self.flat), strict=True):
            parameter.data = view.copy_(parameter.data)
        here = dist.get_rank(group)
        self.part = self.flat[here * self.size : (here + 1) * self.size]
        self.gradient: Tensor | None = None
        self.missing = set(parameters)  # those without a gradient in this backward
        self._whole: Tensor | None = None  # the gradients of all parts, until they are reduced
        self._received: Tensor | None = None
        self._work: Any = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """``flat``, which is laid out as the parameters are, as views in their shapes."""
        pieces = flat[: self._elements].split([shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def take(self, parameter: nn.Parameter) -> None:
        """Move the parameter's gradient into a flat tensor, divided by N: what is summed is then a mean."""
        if self._whole is None:
            self._whole = torch.zeros(self.ranks * self.size, dtype=parameter.dtype, device=parameter.device)
            self._places = dict(zip(self.parameters, self.views(self._whole), strict=True))
        torch.div(parameter.grad, self.ranks, out=self._places[parameter])
        parameter.grad = None
        self.missing.discard(parameter)

    def reduce(self) -> None:
        """Send each rank its part of the gradient; :meth:`settle` has to follow."""
        self._received = torch.empty(self.size, dtype=self._whole.dtype, device=self._whole.device)
        self._work = dist.reduce_scatter_tensor(self._received, self._whole, group=self.group, async_op=True)

    def settle(self) -> None:
        """Wait for the part, add it to what earlier micro-batches left, and let go of the whole gradient."""
        self._work.wait()
        self.gradient = self._received if self.gradient is None else self.gradient.add_(self._received)
        self._whole = self._places = self._received = self._work = None

    def gather(self) -> Any:
        """Begin to fill ``flat`` with all ranks' parts; returns what to wait for."""
        return dist.all_gather_into_tensor(self.flat, self.part, group=self.group, async_op=True)


class Zero1:
    """Each rank keeps optimizer states for its parts of ``model``'s trained parameters only, and updates only those.

    ``make_optimizer`` gets this rank's parts, in fp32, and makes an optimizer that treats elements one by one (SGD,
    Adam, AdamW: not Adafactor or LAMB). The fp32 parts are the master weights of 16-bit parameters; of fp32
    parameters they are the parameters themselves. Backward is the ordinary one and leaves whole gradients;
    :meth:`step` reduce-scatters them, updates, and all-gathers the new parameters, ``bucket_bytes`` at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        bucket_bytes: int = 50 * MIB,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if bucket_bytes <= 0:
            raise UserError(f"{type(self).__name__}: bucket_bytes is {bucket_bytes}; give a size above 0")
        broadcast_parameters(model, group)
        self._start(model, [Bucket(parameters, group) for parameters in in_buckets(model, bucket_bytes)])
        self._make(make_optimizer)

    def _start(self, model: nn.Module, buckets: list[Bucket]) -> None:
        if not buckets:
            raise UserError(f"{type(self).__name__}: every parameter is frozen; leave some to be trained")
        self.buckets = buckets
        self._names = {parameter: name for name, parameter in model.named_parameters()}

    def _make(self, make_optimizer: MakeOptimizer) -> None:
        self.masters = [nn.Parameter(bucket.part.float()) for bucket in self.buckets]
        self.optimizer = make_optimizer(self.masters)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's: where a scheduler sets the learning rate."""
        return self.optimizer.param_groups

    @property
    def held(self) -> Mapping[str, list[Tensor]]:
        """What is held beside model and optimizer, by the ledger's categories (helpers.memory.ledger counts it)."""
        return {
            "parameters": [bucket.part for bucket in self.buckets],
            "gradients": [bucket.gradient for bucket in self.buckets if bucket.gradient is not None],
            "communication buffers": [bucket._whole for bucket in self.buckets if bucket._whole is not None],
        }

    def reduce(self) -> None:
        """Replace whole gradients by this rank's parts of their means. :meth:`step` does it where it was not done.

        Raises :class:`UserError` with the name of a parameter that has no gradient.
        """
        for bucket in self.buckets:
            if bucket.gradient is None:
                for parameter in bucket.parameters:
                    if parameter.grad is None:
                        raise self._without_gradient(parameter)
                    bucket.take(parameter)
                bucket.reduce()
                bucket.settle()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradient to a norm of at most ``max_norm``; the norm before, a scalar, over all ranks' parts."""
        self.reduce()
        gradients = [bucket.gradient for bucket in self.buckets]
        square = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square, group=self.buckets[0].group)
        norm = square.sqrt()
        for gradient in gradients:
            gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters by the gradients of the backwards since the last step, and let go of these.

        One bucket at a time, so that no more than one has its gradient in fp32.
        """
        self.reduce()
        under_way = []
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            master.grad = bucket.gradient.float()
            self.optimizer.step()  # leaves out what has no gradient: all other buckets
            master.grad = bucket.gradient = None
            if master.dtype != bucket.part.dtype:
                bucket.part.copy_(master)
            under_way += self._publish(bucket)
        for work in under_way:
            work.wait()

    def _publish(self, bucket: Bucket) -> list[Any]:
        """Begin to send this rank's updated parameters to those that need them; returns what to wait for."""
        return [bucket.gather()]

    def zero_grad(self) -> None:
        """Forget the gradients since the last step."""
        for bucket in self.buckets:
            bucket.gradient = None
            for parameter in bucket.parameters:
                parameter.grad = None

    def _without_gradient(self, parameter: nn.Parameter) -> UserError:
        return UserError(
            f"{type(self).__name__}: backward made no gradient for {self._names[parameter]}; freeze it "
            "(requires_grad_(False)) before, or use it on every rank"
        )


class Zero2(Zero1):
    """As :class:`Zero1`, and gradients are reduce-scattered during backward: a rank keeps its own part only.

    Whole gradients exist in the bucket under way and in those that backward fills: three in all where a bucket is at
    least as large as a layer, whose gradients do not come in the order of its parameters. Every backward sends, so
    accumulating over k micro-batches costs k times the gradients' traffic. A parameter without a gradient makes
    backward raise :class:`UserError`.
    """

    def _start(self, model: nn.Module, buckets: list[Bucket]) -> None:
        super()._start(model, buckets)
        self._in_backward = False
        self._next = 0  # the bucket that goes next: all ranks must send theirs in one order
        self._under_way: Bucket | None = None
        for bucket in buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket))

    def reduce(self) -> None:
        """Backward did it."""
        for bucket in self.buckets:
            if bucket.gradient is None:
                raise self._without_gradient(bucket.parameters[0])

    def _on_gradient(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        self._begin_backward()
        bucket.take(parameter)
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self._settle()
            self._under_way = self.buckets[self._next]
            self._under_way.reduce()
            self._next += 1

    def _settle(self) -> None:
        if self._under_way is not None:
            self._under_way.settle()
            self._under_way = None

    def _begin_backward(self) -> None:
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        """At the end of backward."""
        self._in_backward, self._next = False, 0
        self._settle()
        unused = [parameter for bucket in self.buckets for parameter in bucket.missing]
        for bucket in self.buckets:
            bucket.missing = set(bucket.parameters)
        if unused:
            raise self._without_gradient(unused[0])


class PartitionedBucket(Bucket):
    """A bucket whose ``flat`` has memory only from :meth:`gather` to :meth:`free`; ``part`` is a tensor of its own."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        super().__init__(parameters, group)
        self.part = self.part.clone()
        self._views = self.views(self.flat)
        self._nothing = self.flat.new_empty(0)
        self.free()

    def gather(self) -> Any:
        """Begin to fill ``flat``; after the wait, :meth:`show` gives it to the parameters."""
        # The memory behind a tensor can be given back and fetched anew: what autograd saved are views of ``flat``, and
        # they find the parameters again at their old place.
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        return super().gather()

    def show(self) -> None:
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view

    def free(self) -> None:
        for parameter in self.parameters:
            parameter.data = self._nothing
        self.flat.untyped_storage().resize_(0)


class Unit:
    """Modules whose parameters are gathered and freed together, in one message for each kind of parameter."""

    def __init__(self, modules: list[nn.Module], group: dist.ProcessGroup | None) -> None:
        self.modules = modules
        kinds: dict[tuple[Any, ...], dict[nn.Parameter, None]] = {}
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            kinds.setdefault((parameter.dtype, parameter.requires_grad), {})[parameter] = None
        self.buckets = [PartitionedBucket(list(parameters), group) for parameters in kinds.values()]
        self.trained = [bucket for bucket in self.buckets if bucket.parameters[0].requires_grad]
        self.here = False
        self._works: list[Any] = []

    def prefetch(self) -> None:
        """Begin to gather, if that was not done."""
        if not self.here and not self._works:
            self._works = [bucket.gather() for bucket in self.buckets]

    def gather(self) -> None:
        """Have the parameters in their modules."""
        if not self.here:
            self.prefetch()
            for bucket, work in zip(self.buckets, self._works, strict=True):
                work.wait()
                bucket.show()
            self.here, self._works = True, []

    def free(self) -> None:
        if self._works:
            self.gather()
        if self.here:
            for bucket in self.buckets:
                bucket.free()
            self.here = False


class Zero3(Zero2):
    """As :class:`Zero2`, and each rank keeps its parts of the parameters only; a unit is whole while it computes.

    Units are ``blocks`` (a transformer's layers) and every other module with parameters of its own; modules that share
    a parameter are one. Before a unit's forward its parameters are gathered, after it they are freed; the same in
    backward. While one unit computes, the next one of the last forward's order is gathered. Outside of forward and
    backward a parameter has no elements: see :meth:`whole`. Works under activation checkpointing of whole blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        blocks: Iterable[nn.Module],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        broadcast_parameters(model, group)
        self.units = [Unit(modules, group) for modules in _units(model, list(blocks))]
        self._order: list[Unit] = []  # of the last forward
        self._seen: list[Unit] = []  # in this forward
        self._start(model, [bucket for unit in reversed(self.units) for bucket in unit.trained])
        self._make(make_optimizer)
        model.register_forward_pre_hook(self._begin_forward)
        model.register_forward_hook(self._end_forward)
        for unit in self.units:
            for module in unit.modules:
                module.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True)
                module.register_forward_hook(partial(self._after_forward, unit))

    @property
    def held(self) -> Mapping[str, list[Tensor]]:
        """As in :class:`Zero1`; what is gathered is a communication buffer."""
        held, buckets = super().held, [bucket for unit in self.units for bucket in unit.buckets]
        gathered = [bucket.flat for bucket in buckets]
        return {
            **held,
            "parameters": [bucket.part for bucket in buckets],
            "communication buffers": [*held["communication buffers"], *gathered],
        }

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters whole inside, to be read on every rank; what is written there is lost."""
        for unit in self.units:
            unit.gather()
        try:
            yield
        finally:
            self._free_all()

    def _begin_forward(self, *_: Any) -> None:
        self._in_backward = False
        self._order, self._seen = self._seen, []

    def _end_forward(self, *_: Any) -> None:
        self._free_all()

    def _before_forward(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        unit.gather()
        if self._in_backward:  # a checkpointed block, computed again
            return
        place = len(self._seen)
        self._seen.append(unit)
        if self._order[place : place + 1] == [unit]:
            for following in self._order[place + 1 : place + 2]:
                following.prefetch()
        inputs = _with_gradient((args, kwargs))
        if inputs:
            register_multi_grad_hook(inputs, lambda _: self._after_backward(unit), mode="all")

    def _after_forward(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_backward:
            return
        outputs, seen, place = _with_gradient(output), self._seen, len(self._seen) - 1
        if outputs:
            register_multi_grad_hook(outputs, lambda _: self._before_backward(seen, place), mode="any")
        unit.free()

    def _before_backward(self, seen: list[Unit], place: int) -> None:
        """The gradient of a unit's output is there: it is the unit's turn."""
        self._begin_backward()
        seen[place].gather()
        if place:
            seen[place - 1].prefetch()

    def _after_backward(self, unit: Unit) -> None:
        """The gradient of a unit's input is there. A shared parameter waits for its other module, though."""
        if not any(bucket.missing for bucket in unit.trained):
            unit.free()

    def _finish(self) -> None:
        self._free_all()
        super()._finish()

    def _free_all(self) -> None:
        for unit in self.units:
            unit.free()

    def _publish(self, bucket: Bucket) -> list[Any]:
        """Nobody needs them before the next forward."""
        return []


def _with_gradient(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.requires_grad]


def _units(model: nn.Module, blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Modules by unit, in the model's order; one that shares a parameter with an earlier one joins its unit."""
    inside = {module for block in blocks for module in block.modules()} - set(blocks)
    units: list[list[nn.Module]] = []
    owner: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        parameters = list(module.parameters(recurse=module in blocks))
        if module in inside or not parameters:
            continue
        unit = next((owner[parameter] for parameter in parameters if parameter in owner), None)
        if unit is None:
            unit = []
            units.append(unit)
        unit.append(module)
        owner.update(dict.fromkeys(parameters, unit))
    return units
