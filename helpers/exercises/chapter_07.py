"""Chapter 07: ZeRO-2's buckets, reduced to their owners in backward and freed, and what its exercises ask for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, NotYet, agree, call, exercise, on_ranks, without_fault
from helpers.exercises.inputs import random
from helpers.parallel.traffic import Collective, count_traffic

SHAPES = (((3, 4), (5,)), ((1,), (2, 3)), ((7, 3), (1,), (2, 2, 2)))  # of a bucket's parameters
Shapes = Sequence[tuple[int, ...]]

# --- the chapter's own functions ---


def _views(answer: Callable[..., Any], shapes: Shapes) -> str | None:
    values = [random(number, *shape) for number, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    bucket = answer(parameters)
    flat = random(99, *bucket.flat.shape)
    return agree(_fault_of_views(bucket.views(flat), parameters, flat) or _moved(parameters, values))


def _moved(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> str | None:
    same = all(torch.equal(p.data, value) for p, value in zip(parameters, values, strict=True))
    return None if same else "a new bucket's parameters have lost their values"


def _fault_of_views(views: Any, parameters: Sequence[torch.nn.Parameter], flat: torch.Tensor) -> str | None:
    if not isinstance(views, dict) or set(views) != set(parameters):
        return "views should return a dictionary that has every parameter of the bucket as a key"
    begin = 0
    for number, parameter in enumerate(parameters):
        view, place = views[parameter], flat[begin : begin + parameter.numel()]
        if view.shape != parameter.shape:
            return f"the view of a parameter of shape {tuple(parameter.shape)} has the shape {tuple(view.shape)}"
        if not torch.equal(view.flatten(), place):
            return f"the view of parameter {number} should begin at element {begin} of the flat tensor"
        view += 1
        if not torch.equal(view.flatten(), place):
            return "a change of a view does not change the flat tensor: it is a copy"
        begin += parameter.numel()
    return None


@exercise
def bucket(answer: Callable[[list[torch.nn.Parameter]], Any]) -> None:
    """Judge the views of a bucket: the places of its parameters in a flat tensor.

    Args:
        answer: The class of buckets.
    """
    for n, shapes in zip(WORLDS, SHAPES, strict=True):
        without_fault(_views, n, answer=answer, shapes=shapes)


def _collected(collect: Callable[..., Any], reduce: Callable[..., Any], make: Any, shapes: Shapes) -> str | None:
    rank, n = dist.get_rank(), dist.get_world_size()
    parameters = [torch.nn.Parameter(random(i, *shape)) for i, shape in enumerate(shapes)]
    bucket, elements = make(parameters), sum(p.numel() for p in parameters)
    padding, left = torch.zeros(-elements % n), torch.zeros(1)
    for number in range(2):  # micro-batches
        every = [[random(50 * number + 7 * r + i, *shape) for i, shape in enumerate(shapes)] for r in range(n)]
        flats = [torch.cat([*(gradient.flatten() for gradient in of_rank), padding]) / n for of_rank in every]
        for missing in reversed(range(len(parameters))):  # the last parameter's gradient comes first
            parameters[missing].grad = every[rank][missing].clone()
            collect(bucket, parameters[missing])
            fault = _fault_of_collect(bucket, parameters, missing, flats[rank][:elements])
            if found := agree(fault):
                return found
        with count_traffic() as traffic:
            reduce(bucket)
        left = left + sum(flats).chunk(n)[rank]  # type: ignore[union-attr]  # a sum of tensors is never an int
        fault = _fault_of_reduce(bucket, set(parameters), left, traffic.sent, 4 * (n - 1) * len(left))
        if found := agree(fault):
            return f"{found} (micro-batch {number + 1})"
    return None


def _fault_of_collect(
    bucket: Any, parameters: list[torch.nn.Parameter], missing: int, flat: torch.Tensor
) -> str | None:
    if parameters[missing].grad is not None:
        return "collect should free the parameter's own gradient"
    if bucket.unreduced is None or bucket.unreduced.shape != bucket.flat.shape:
        return "collect should make room in bucket.unreduced, as long as bucket.flat"
    if bucket.missing != set(parameters[:missing]):
        return f"{missing} gradients are missing after a collect, but bucket.missing has {len(bucket.missing)}"
    begin = sum(p.numel() for p in parameters[:missing])
    off = float((bucket.unreduced[begin : len(flat)] - flat[begin:]).abs().max())
    if not off < 1e-4:
        return f"bucket.unreduced is off by {off:.3g} from the gradients, each in its place and divided by N"
    return None


def _fault_of_reduce(bucket: Any, members: set[Any], left: torch.Tensor, sent: int, most: int) -> str | None:
    if bucket.unreduced is not None:
        return "reduce should free bucket.unreduced"
    if bucket.missing != members:
        return "after reduce, all gradients of the next backward are missing again"
    if bucket.gradient is None or bucket.gradient.shape != left.shape:
        return "reduce should leave a tensor as long as the shard in bucket.gradient"
    off = float((bucket.gradient - left).abs().max())
    if not off < 1e-3:
        return f"bucket.gradient is off by {off:.3g} from this rank's part of the mean gradients so far"
    if sent > most:
        return f"the result is right, but it took {sent} bytes, and {most} are enough"
    return None


@exercise
def collect_and_reduce(collect: Callable[..., None], reduce: Callable[..., None], make: Any) -> None:
    """Judge what happens to a gradient that has arrived, and to a bucket that is full.

    Args:
        collect: Gets a bucket and a parameter that has a gradient.
        reduce: Gets a full bucket.
        make: The class of buckets.
    """
    for n, shapes in zip(WORLDS, SHAPES, strict=True):
        without_fault(_collected, n, collect=collect, reduce=reduce, make=make, shapes=shapes)


class Chain(torch.nn.Module):
    """Four linear layers, three of them of equal size; the two in the middle change places on odd ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((3, width), (width, width), (width, width), (width, width))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(*size) for size in sizes])
        for number, parameter in enumerate(self.parameters()):
            parameter.data = random(number, *parameter.shape) / 100

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Return [rows, width] for x [rows, 3], in the order of that rank."""
        for number in (0, 1, 2, 3) if rank % 2 == 0 else (0, 2, 1, 3):
            x = self.layers[number](x)
        return x


def _zero_2(answer: Callable[..., Any], width: int, micro_batches: int) -> str | None:
    rank, n = dist.get_rank(), dist.get_world_size()
    model, reference = Chain(width), Chain(width)
    make_optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    optimizer = answer(model, make_optimizer, bucket_bytes=4 * (width * width + width))  # a layer's bytes
    single, arrived = make_optimizer(reference.parameters()), []
    calls: list[Collective] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: arrived.append(len(calls)))
    whole = 4 * sum(p.numel() for p in model.parameters())
    for step in range(2):
        for number in range(micro_batches):
            for r in range(n):  # the reference sees the rows of all ranks, in each rank's order of layers
                (reference(random(40 * step + 10 * number + r, 4, 3) / 50, r).square().mean() / n).backward()
            with count_traffic() as traffic:
                calls = traffic.collectives
                model(random(40 * step + 10 * number + rank, 4, 3) / 50, rank).square().mean().backward()
            fault = _fault_of_backward(optimizer, model, len(calls), arrived[-2], whole / n)
            if found := agree(fault):
                return f"{found}, after backward {number + 1} of step {step + 1}"
        optimizer.step()
        optimizer.zero_grad()
        single.step()
        single.zero_grad()
        off = max(
            float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
        )
        fault = None if off < 1e-5 else f"a weight is off by {off:.2g} from a single process's"
        if not fault and optimizer.gradient_bytes():
            fault = f"{optimizer.gradient_bytes()} bytes of gradients are still there"
        if not fault and any(master.grad is not None for master in optimizer.masters):
            fault = "a master still has its gradient"
        if found := agree(fault):
            return f"{found}, after step {step + 1}"
    return None


def _fault_of_backward(optimizer: Any, model: Chain, calls: int, before_last: int, part: float) -> str | None:
    if any(parameter.grad is not None for parameter in model.parameters()):
        return "a parameter still has its own gradient"
    buckets = len(optimizer.buckets)
    if calls != buckets:
        return f"{buckets} buckets should be reduced, but there were {calls} collectives"
    if before_last < 1:
        return "no bucket was reduced before the last gradient came"
    if optimizer.gradient_bytes() > part + 4 * buckets:
        return f"{optimizer.gradient_bytes()} bytes of gradients are left, where this rank's part has about {part:.0f}"
    return None


@exercise
def zero_2(answer: Callable[..., Any]) -> None:
    """Judge a class that reduces gradients in buckets during backward, in one order on all ranks.

    Args:
        answer: Takes a model, what makes an optimizer of a list of parameters, and ``bucket_bytes``.
    """
    for n, width, micro_batches in zip(WORLDS, (3, 4, 5), (1, 2, 1), strict=True):
        without_fault(_zero_2, n, answer=answer, width=width, micro_batches=micro_batches)


# --- exercises ---


@exercise
def six_billion_again(states_gb: float, sent_gb: float) -> None:
    """Judge ZeRO-2's GB (10**9 bytes) for 6,243,584,000 parameters on 8 GPUs.

    Args:
        states_gb: Model states that a rank holds.
        sent_gb: What it sends in a step of 16 micro-batches.
    """
    psi = 6.243584
    for name, found, expected, question in (
        ("the model states are", states_gb, (2 + 14 / 8) * psi, "which of the 16 bytes per parameter are divided"),
        ("the bytes sent are", sent_gb, 17 * 7 / 8 * 2 * psi, "which collective runs per micro-batch, which per step"),
    ):
        if not abs(found - expected) < 0.06:
            raise NotYet(f"{name} too {'many' if found > expected else 'few'}: {question}?")


@exercise
def largest_bucket(answer: Callable[[int, int, int], int]) -> None:
    """Judge the largest bucket for the room that is left.

    Args:
        answer: Takes the room in bytes, the parameters, and the ranks; they divide the parameters.
    """
    for room, parameters, ranks in ((1000, 100, 2), (1000, 100, 4), (90, 100, 2), (103, 50, 1), (5000, 1200, 3)):
        found = call(answer, room, parameters, ranks)
        expected = max(0, (room - 2 * parameters // ranks) // 3)
        if found != expected or not isinstance(found, int):
            case = f"{room} bytes of room, {parameters} parameters, {ranks} ranks"
            too = "no whole number" if not isinstance(found, int) else "too large" if found > expected else "too small"
            raise NotYet(f"for {case} the answer is {too}")


def _to_owners(answer: Callable[..., Any], sizes: Sequence[int]) -> tuple[list[int], float]:
    rank, n = dist.get_rank(), dist.get_world_size()
    every = [[random(13 * r + i, size) for i, size in enumerate(sizes)] for r in range(n)]
    gradients = [gradient.clone() for gradient in every[rank]]
    with count_traffic() as traffic:
        answer(gradients)
    own = range(rank, len(sizes), n)
    return [i for i in own if not torch.equal(gradients[i], sum(of_rank[i] for of_rank in every))], traffic.sent  # type: ignore[arg-type]  # a sum of tensors is never an int


@exercise
def to_owners(answer: Callable[[list[torch.Tensor]], None]) -> None:
    """Judge the sums of whole gradients, dealt to the ranks in turn.

    Args:
        answer: Takes this rank's gradients, and changes them in place.
    """
    for n, sizes in zip(WORLDS, ((5, 100, 7), (1, 30, 8, 9), (3, 3, 3, 3, 3, 3)), strict=True):
        most = 4 * sum(sizes) * (n - 1) / n + len(sizes)
        for rank, (wrong, sent) in enumerate(on_ranks(_to_owners, n, answer=answer, sizes=sizes)):
            if wrong:
                raise NotYet(f"with {n} ranks, rank {rank} does not have the sums of its gradients {wrong}")
            if sent > most:
                raise NotYet(f"the sums are right, but rank {rank} sent {sent} bytes: {most:.0f} are enough")
