"""Chapter 06: one flat tensor, ZeRO-1's parts and step, and what its exercises ask for."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, NotAnswered, NotYet, call, exercise, on_ranks
from helpers.exercises.inputs import random
from helpers.parallel.traffic import count_traffic

SHAPES = (
    ((3, 4), (5,)),
    ((6,), (2, 3)),
    ((1,),),
    ((7, 3), (1,), (2, 2, 2)),
)  # of parameters; their sums are odd and even
Shapes = Sequence[tuple[int, ...]]

# --- the chapter's own functions ---


def _flat(answer: Callable[..., Any], cases: Sequence[Shapes]) -> list[str | None]:
    """In a rank: what is wrong with each case."""
    return [_flat_fault(answer, shapes, dtype) for shapes in cases for dtype in (torch.float32, torch.bfloat16)]


def _flat_fault(answer: Callable[..., Any], shapes: Shapes, dtype: torch.dtype) -> str | None:
    values = [random(number, *shape).to(dtype) for number, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    n, whole = dist.get_world_size(), torch.cat([value.flatten() for value in values])
    flat = answer(parameters)
    name = f"for {len(whole)} elements on {n} ranks"
    if not isinstance(flat, torch.Tensor) or flat.dim() != 1 or flat.dtype != dtype:
        return f"{name} it should return a flat tensor of the parameters' type"
    if len(flat) % n or not len(whole) <= len(flat) < len(whole) + n:
        return f"{name} the flat tensor has {len(flat)} elements: as few as possible, but they must divide by the ranks"
    if not torch.equal(flat[: len(whole)], whole) or flat[len(whole) :].any():
        return f"{name} the flat tensor is not the parameters one after another, with zeros behind them"
    flat += 1
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.shape != value.shape:
            return f"{name} a parameter of shape {tuple(value.shape)} has become {tuple(parameter.shape)}"
        if not torch.equal(parameter.data, value + 1):
            return f"{name} a change of the flat tensor does not change the parameters: they must be views of it"
    return None


@exercise
def flatten_parameters(answer: Callable[[list[torch.nn.Parameter]], torch.Tensor]) -> None:
    """Judge the flat tensor of which all parameters become views.

    Args:
        answer: Takes parameters, and returns the padded flat tensor.
    """
    for n in WORLDS:
        for faults in on_ranks(_flat, n, answer=answer, cases=SHAPES):
            for fault in filter(None, faults):
                raise NotYet(fault)


def _zero_1(answer: Callable[..., Any], shapes: Shapes, steps: int) -> SimpleNamespace:
    """In a rank: what a model looks like after every part of ``steps`` steps, and what it should look like."""
    rank, n = dist.get_rank(), dist.get_world_size()
    make_optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.5)  # it has states, and exact numbers
    model, reference = (torch.nn.ParameterList([random(i, *shape) for i, shape in enumerate(shapes)]) for _ in range(2))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = answer(torch.nn.ParameterList([frozen, *model]), make_optimizer)
    single = make_optimizer(reference.parameters())
    seen = SimpleNamespace(shard=optimizer.shard.clone(), reduced=[], off=[], sent=[])
    elements = sum(p.numel() for p in model)
    seen.part = torch.cat([*(p.data.flatten() for p in reference), torch.zeros(-elements % n)]).chunk(n)[rank]
    seen.most = 2 * (n - 1) * 4 * len(seen.part)
    for step in range(steps):
        every = [[random(100 * step + 10 * r + i, *shape) for i, shape in enumerate(shapes)] for r in range(n)]
        for i, (mine, alone) in enumerate(zip(model, reference, strict=True)):
            mine.grad, alone.grad = every[rank][i].clone(), torch.stack([of_rank[i] for of_rank in every]).mean(0)
        single.step()
        if step == 0:
            mean = torch.cat([*(p.grad.flatten() for p in reference if p.grad is not None), torch.zeros(-elements % n)])
            seen.reduced = [optimizer.reduce_gradients(), mean.chunk(n)[rank]]
            if getattr(seen.reduced[0], "shape", None) != seen.part.shape:
                return seen
        try:
            with count_traffic() as traffic:
                optimizer.step()
        except NotImplementedError:
            return seen  # reduce_gradients can be judged already
        seen.sent.append(traffic.sent)
        seen.off.append(max(float((a - b).detach().abs().max()) for a, b in zip(model, reference, strict=True)))
        optimizer.zero_grad()
    return seen


def _drift(answer: Callable[..., Any]) -> float:
    """In a rank: a 16-bit weight of 256 after eight steps of a quarter, each too small for 16 bit alone."""
    model = torch.nn.ParameterList([torch.full((5,), 256.0, dtype=torch.bfloat16)])
    optimizer = answer(model, partial(torch.optim.SGD, lr=0.25))
    for _ in range(8):
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return float(model[0].detach().float().max())


@exercise
def zero_1(answer: Callable[..., Any]) -> None:
    """Judge a class that partitions an optimizer's states.

    Args:
        answer: Takes a model and what makes an optimizer of a list of parameters. It has flat, shard, master,
            reduce_gradients and step.
    """
    for n, shapes in zip(WORLDS, SHAPES[1:], strict=True):
        ranks = {
            f"with {n} ranks, rank {rank}": seen
            for rank, seen in enumerate(on_ranks(_zero_1, n, answer=answer, shapes=shapes, steps=3))
        }
        for who, seen in ranks.items():
            if not (seen.shard.shape == seen.part.shape and torch.equal(seen.shard, seen.part)):
                raise NotYet(f"{who} should keep part number {who.split()[-1]} of {n} of the flat tensor as its shard")
        for who, seen in ranks.items():
            _judge_reduced(who, *seen.reduced)
        for who, seen in ranks.items():
            _judge_steps(who, seen)
    for weight in on_ranks(_drift, 2, answer=answer):
        if weight != 254:
            raise NotYet(
                f"eight 16-bit steps of a quarter moved a weight by {256 - weight:g}: which copy adds them up?"
            )


def _judge_reduced(who: str, found: object, mean: torch.Tensor) -> None:
    if not isinstance(found, torch.Tensor) or found.shape != mean.shape:
        raise NotYet(f"{who}: reduce_gradients should return a tensor as long as the shard")
    off = float((found.float() - mean).abs().max())
    if not off < 1e-3:
        raise NotYet(f"{who}: reduce_gradients is off by {off:.3g} from this rank's part of the mean gradient")


def _judge_steps(who: str, seen: SimpleNamespace) -> None:
    if not seen.off:
        raise NotAnswered
    for number, off in enumerate(seen.off, 1):
        if not off < 1e-3:
            raise NotYet(f"{who}: after step {number} a weight is off by {off:.3g} from a single process's")
    if max(seen.sent) > seen.most:
        raise NotYet(f"the weights are right, but {who} sent {max(seen.sent)} bytes where {seen.most} are enough")


@exercise
def states_by_hand(answer: Callable[[int, int], int]) -> None:
    """Judge the bytes of model states that a rank holds under ZeRO-1.

    Args:
        answer: Takes the number of parameters and of ranks.
    """
    for parameters, n in ((1000, 1), (1000, 4), (1001, 2), (10, 3), (7, 4)):
        found = call(answer, parameters, n)
        part = -(-parameters // n)
        expected = 2 * n * part + 2 * parameters + 12 * part + 4
        if found != expected:
            padding = f"{n * part - parameters} elements of padding"
            raise NotYet(f"{parameters} parameters on {n} ranks: off by {found - expected:+} bytes; with {padding}")


# --- exercises ---


@exercise
def six_billion(replicated_gb: float, zero_1_gb: float) -> None:
    """Judge the GB (10**9 bytes) of model states of 6,243,584,000 parameters on each of 8 GPUs.

    Args:
        replicated_gb: Under plain data parallelism.
        zero_1_gb: Under ZeRO-1.
    """
    for name, found, per_parameter in (
        ("data parallelism's", replicated_gb, 16.0),
        ("ZeRO-1's", zero_1_gb, 4 + 12 / 8),
    ):
        expected = 6.243584 * per_parameter
        if not abs(found - expected) < 0.06:
            too = "large" if found > expected else "small"
            raise NotYet(f"{name} number is too {too}: which of the 16 bytes per parameter does each rank hold?")


def _clipped(answer: Callable[..., Any], sizes: Sequence[int], limits: Sequence[float]) -> list[SimpleNamespace]:
    rank, found = dist.get_rank(), []
    for limit in limits:
        every = [random(r, size) / 10 for r, size in enumerate(sizes)]
        part, norm = every[rank].clone(), torch.cat(every).norm()
        with count_traffic() as traffic:
            answered = answer(part, limit)
        scale = min(1.0, limit / float(norm))
        off = float((part - every[rank] * scale).abs().max())
        found.append(
            SimpleNamespace(
                norm=None if answered is None else float(answered) - float(norm),
                off=off,
                sent=traffic.sent,
                limit=limit,
                clips=scale < 1,
            )
        )
    return found


@exercise
def clip(answer: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """Judge the clipping of a gradient of which every rank has a part.

    Args:
        answer: Takes this rank's part and the limit for the norm of all. Scales the part in place; returns the norm.
    """
    for n, sizes in zip(WORLDS, ((3, 8), (1, 20, 2), (6, 6, 1, 30)), strict=True):
        for rank, cases in enumerate(on_ranks(_clipped, n, answer=answer, sizes=sizes, limits=(1.0, 2.5, 1e4))):
            for case in cases:
                if case.norm is None or not abs(case.norm) < 1e-3:
                    what = "nothing" if case.norm is None else f"a norm that is off by {case.norm:+.3g}"
                    raise NotYet(f"with {n} ranks, rank {rank} returned {what}: squares add up over ranks")
                if not case.off < 1e-4:
                    asked = "is above" if case.clips else "is below"
                    raise NotYet(
                        f"rank {rank}'s part is wrongly scaled where the norm {asked} the limit {case.limit:g}"
                    )
                if case.sent > 2 * (n - 1) / n * 8 + 1:
                    raise NotYet(f"the result is right, but rank {rank} sent {case.sent} bytes: one number is enough")


@exercise
def rejoined(answer: Callable[[list[torch.Tensor], int, int], list[torch.Tensor]]) -> None:
    """Judge the parts that another number of ranks loads.

    Args:
        answer: Takes the saved parts, the number of real elements, and the new number of ranks.
    """
    for elements, old, new in ((7, 4, 3), (7, 4, 1), (12, 3, 4), (3, 1, 2), (5, 4, 4), (9, 2, 4), (100, 8, 7)):
        values = random(elements, elements)
        saved = list(torch.cat([values, torch.zeros(-elements % old)]).chunk(old))
        wanted = list(torch.cat([values, torch.zeros(-elements % new)]).chunk(new))
        found = call(answer, saved, elements, new)
        case = f"{elements} elements, from {old} ranks to {new}"
        lengths = [len(part) for part in found]
        if lengths != [len(part) for part in wanted]:
            raise NotYet(
                f"{case}: the parts have {lengths} elements; they must be equally long, and as short as possible"
            )
        if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            raise NotYet(f"{case}: the lengths are right, but the parts are not the old elements in order, then zeros")
