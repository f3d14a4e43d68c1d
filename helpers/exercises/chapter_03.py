"""Chapter 03: cutting by cost, the table of a schedule, the executor's parts, 1F1B, and what its exercises ask for."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from helpers.exercises.answers import WORLDS, NotYet, call, exercise, on_ranks
from helpers.exercises.schedules import check_idle, ideal, inputs, last_stage, needed, timeline_of
from helpers.memory.predict import ModelShape
from helpers.parallel.network import TINY
from helpers.parallel.pipeline import Action, Schedule, gpipe, interleaved, one_f_one_b
from helpers.parallel.traffic import count_traffic

# --- the chapter's own functions ---


@exercise
def partition_layers(answer: Callable[..., Any]) -> None:
    """Judge the cut of a network into stages that cost the same, of which a tie favours the last.

    Args:
        answer: Takes the network's sizes, the number of stages and the tokens per sequence.
    """
    for shape, stages, length in ((ModelShape(), 4, 2048), (ModelShape(), 7, 64), (TINY, 3, 16), (TINY, 8, 16)):
        layer, head = 2 * shape.layer_matrices + 4 * length * shape.query, 2 * shape.embedding
        extra = [0.0] * (stages - 1) + [head / layer]
        counts = [1] * stages
        for _ in range(shape.layers - stages):
            counts[min(range(stages), key=lambda s: (counts[s] + extra[s], -s))] += 1
        parts = [list(part) for part in call(answer, shape, stages, length)]
        found = [len(part) for part in parts]
        where = f"with {shape.layers} layers and {stages} stages"
        if [number for part in parts for number in part] != list(range(shape.layers)) or len(found) != stages:
            raise NotYet(f"{where}, the stages must hold each layer once, in order; they hold {parts}")
        slowest, best = (max(n + more for n, more in zip(sizes, extra, strict=True)) for sizes in (found, counts))
        if slowest > best:
            raise NotYet(f"{where}, the slowest stage takes as long as {slowest:.2f} layers; a better cut exists")
        if found != counts:
            raise NotYet(f"{where}, no stage is too slow, but a layer is on the wrong side of a tie: {found}")


@exercise
def needs(answer: Callable[..., Any]) -> None:
    """Judge which results an action takes in.

    Args:
        answer: Takes an action and the number of the last stage.
    """
    for last in (0, 1, 3):
        for action in (Action(kind, stage, number) for kind in "FB" for stage in range(last + 1) for number in (0, 5)):
            found = call(answer, action, last)
            if not isinstance(found, list) or sorted(found) != sorted(needed(action, last)):
                results = [f"{kind}{number} of stage {stage}" for kind, stage, number in found or []]
                text = ", ".join(results) or ("nothing" if found == [] else repr(found))
                raise NotYet(f"for {action} of {last + 1} stages, it names {text}")


def _simulated(
    answer: Callable[..., Any], cases: Sequence[Schedule], seconds: Mapping[str, float]
) -> list[list[list[tuple[Action, float, float]]] | None]:
    """In a rank, which can be ended: the times of every schedule, or None if the answer is that it never ends."""
    found: list[list[list[tuple[Action, float, float]]] | None] = []
    for schedule in cases:
        try:
            spans = answer(schedule, seconds)
            found.append([[(Action(*action), start, end) for action, start, end in actions] for actions in spans])
        except ValueError:
            found.append(None)
    return found


@exercise
def simulate(answer: Callable[..., Any]) -> None:
    """Judge the times of a schedule's actions on ideal ranks, and that a schedule which cannot end is refused.

    Args:
        answer: Takes a schedule and the seconds of each kind of action.
    """
    seconds = {"F": 1.0, "B": 3.0}
    cases = [gpipe(1, 3), gpipe(3, 4), one_f_one_b(4, 6), one_f_one_b(3, 2), interleaved(2, 4)]
    stuck = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]]
    (found,) = on_ranks(_simulated, 1, answer=answer, cases=[*cases, stuck], seconds=seconds)
    for schedule, spans in zip(cases, found, strict=False):
        size = f"a schedule of {len(schedule)} ranks with {sum(map(len, schedule))} actions"
        if spans is None:
            raise NotYet(f"it raises ValueError for {size} that can end")
        if [[action for action, *_ in actions] for actions in spans] != [list(actions) for actions in schedule]:
            raise NotYet(f"for {size}, it does not time each rank's actions once, in their order")
        pairs = zip(chain(*spans), chain(*ideal(schedule, seconds)), strict=True)
        for (action, *times), (_, *expected) in pairs:
            if times != expected:
                early = "early" if times < expected else "late"
                raise NotYet(f"for {size}, {action} runs from {times[0]:g} to {times[1]:g}: that is too {early}")
    if found[-1] is not None:
        raise NotYet("a schedule in which all ranks wait must raise ValueError")


class _Toy(nn.Sequential):
    last = False


def _toy(stages: int) -> list[_Toy]:
    """Stages of a small network: token ids below 11 go in, logits come out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stages)
        toys = [_Toy(nn.Linear(6, 6), nn.Tanh()) for _ in range(stages)]
        toys[0].insert(0, nn.Embedding(11, 6))
        toys[-1].append(nn.Linear(6, 11))
    toys[-1].last = True
    return toys


def _pass_all(forward: Callable[..., Any], backward: Callable[..., Any], part: SimpleNamespace) -> None:
    stages = len(part.stages)
    for number in range(len(part.ids)):
        x = None
        for stage in range(stages):
            x = call(forward, part, Action("F", stage, number), x)
            if stage == stages - 1 and x is not None:
                raise NotYet("the last stage sends nothing on, but its forward returned something")
            if stage < stages - 1 and (not isinstance(x, torch.Tensor) or x.requires_grad):
                raise NotYet("forward must return what the next rank gets: a tensor without this rank's graph")
    for number in range(len(part.ids)):
        gradient = None
        for stage in reversed(range(stages)):
            gradient = call(backward, part, Action("B", stage, number), gradient)
            if stage and not isinstance(gradient, torch.Tensor):
                raise NotYet(f"backward of stage {stage} did not return the gradient of the stage's input")
    if part.kept:
        raise NotYet(f"after all backward passes, {len(part.kept)} inputs and outputs are still kept")


@exercise
def passes(forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Judge the forward and the backward pass of a stage.

    Args:
        forward: Gets the part, the action and the input.
        backward: Gets the part, the action and the gradient of the output.
    """
    for stages, micro_batches in ((1, 2), (2, 3), (3, 4)):
        toys, ids = _toy(stages), torch.randint(11, (micro_batches, 5), generator=torch.Generator().manual_seed(stages))
        chunks = ids.chunk(micro_batches)
        part = SimpleNamespace(stages=dict(enumerate(toys)), kept={}, ids=chunks, labels=chunks)
        _pass_all(forward, backward, part)
        whole = nn.Sequential(*_toy(stages))
        functional.cross_entropy(whole(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for stage, (toy, twin) in enumerate(zip(toys, whole, strict=True)):
            for found, expected in zip(toy.parameters(), twin.parameters(), strict=True):
                where = f"with {stages} stages and {micro_batches} micro-batches"
                if found.grad is None or expected.grad is None:
                    raise NotYet(f"{where}, weights of stage {stage} have no gradient")
                if not torch.allclose(found.grad, expected.grad, atol=1e-6):
                    ratio = float(found.grad.norm() / expected.grad.norm())
                    raise NotYet(f"{where}, a gradient of stage {stage} is {ratio:.2f} times as long as the batch's")


def _executed(answer: Callable[..., Any], schedule: Schedule, pace: Mapping[str, float]) -> tuple[Any, Any]:
    """In a rank: what each action received, and the answer's spans."""
    received, last = {}, last_stage(schedule)

    def work(_: object, action: Action, x: torch.Tensor | None) -> torch.Tensor | None:
        received[action] = None if x is None else x.tolist()
        start = torch.full((1, 3), action.micro_batch + 1.0)
        end = last if action.kind == "F" else 0
        return None if action.stage == end else (start if x is None else x) * 2 + action.stage

    spans = answer(schedule, None, {"F": work, "B": work}, torch.empty(1, 3), pace)
    return received, [(Action(*action), start, end) for action, start, end in spans]


@exercise
def execute(answer: Callable[..., Any]) -> None:
    """Judge the loop that runs a rank's actions: what they receive, their order and their times.

    Args:
        answer: Takes the schedule, the part, the work, a tensor like a message, and the pace.
    """
    pace = {"F": 0.002, "B": 0.004}
    for schedule in (one_f_one_b(2, 3), gpipe(3, 2), interleaved(4, 4)):
        expected, n = inputs(schedule), len(schedule)
        found = on_ranks(_executed, n, answer=answer, schedule=schedule, pace=pace)
        for rank, (received, spans) in enumerate(found):
            where = f"with {n} ranks, rank {rank}"
            if [action for action, *_ in spans] != list(schedule[rank]) or set(received) != set(schedule[rank]):
                raise NotYet(f"{where} does not run and return each action of its list once, in order")
            for action, x in received.items():
                right = expected[action]
                if x != (None if right is None else [[right] * 3]):
                    raise NotYet(f"{where} ran {action} with an input that is not the result it needs")
            if any(later[1] < earlier[2] for earlier, later in pairwise(spans)):
                raise NotYet(f"{where} has actions that overlap in time: one starts before the last has ended")
            if any(end - start < pace[action.kind] for action, start, end in spans):
                raise NotYet(f"{where} has an action that is shorter than its pace")


@exercise
def one_f_one_b_schedule(answer: Callable[..., Any]) -> None:
    """Judge the schedule with one forward and one backward in turn.

    Args:
        answer: Takes the number of ranks and of micro-batches.
    """
    for p, m in ((1, 2), (2, 5), (3, 2), (4, 8), (5, 5)):
        timeline, where = timeline_of(call(answer, p, m), p, m), f"with {p} ranks and {m} micro-batches"
        for rank, alive in enumerate(timeline.alive):
            if alive > min(m, p - rank):
                raise NotYet(f"{where}, {alive} micro-batches are alive on rank {rank}, more than need be")
        check_idle(timeline, (p - 1) / (m + p - 1), where)


# --- exercises ---


@exercise
def micro_batches(number: int) -> None:
    """Judge the fewest micro-batches that keep eight ranks under 1F1B idle for at most 5 % of the time.

    Args:
        number: Of micro-batches.
    """
    if not isinstance(number, int) or number < 1:
        raise NotYet(f"{number} is not a number of micro-batches")
    idle, fewer = (7 / (m + 7) for m in (number, number - 1))
    if idle > 0.05 + 1e-9:
        raise NotYet(f"with {number} the ranks idle {idle:.1%} of the time")
    if fewer <= 0.05 + 1e-9:
        raise NotYet("that is enough, but not the smallest number")


@exercise
def sent_gib(plain: float, chunked: float) -> None:
    """Judge what four ranks send together in a step of ChatGLM3-6B.

    Args:
        plain: GiB under 1F1B.
        chunked: GiB when interleaved with seven chunks per rank.
    """
    for name, found, cuts in (("1F1B", plain, 3), ("interleaved", chunked, 27)):
        expected = 2 * cuts * 16 * 2048 * ModelShape().hidden * 2 / 2**30
        if not abs(found - expected) < 0.01:
            too = "much" if found > expected else "little"
            raise NotYet(f"{name}: {found:g} GiB is too {too}; count the cuts, then what crosses one")


@exercise
def gpipe_in_rounds(answer: Callable[..., Any], predicted_idle: float) -> None:
    """Judge GPipe in rounds, and the prediction of its idle fraction.

    Args:
        answer: Takes the numbers of ranks, of micro-batches and of rounds.
        predicted_idle: For 4 ranks, 8 micro-batches and 2 rounds.
    """
    for p, m, rounds in ((4, 8, 2), (2, 6, 3), (3, 4, 1)):
        timeline, size = timeline_of(call(answer, p, m, rounds), p, m), m // rounds
        where = f"with {p} ranks and {m} micro-batches in {rounds} rounds"
        kinds = {"".join(span.action.kind for span in spans) for spans in timeline.ranks}
        if kinds != {("F" * size + "B" * size) * rounds}:
            raise NotYet(f"{where}, a rank does not do rounds of {size} forward and {size} backward passes")
        check_idle(timeline, (p - 1) / (size + p - 1), where)
    if not abs(predicted_idle - 3 / 7) < 0.005:
        more = "more" if predicted_idle < 3 / 7 else "less"
        raise NotYet(f"the schedule is right, but it idles {more} than the {predicted_idle:g} that you predicted")


def _norm_of(answer: Callable[..., Any], sizes: Sequence[Sequence[int]]) -> tuple[float, float, int]:
    every = [
        [torch.randn(size, generator=torch.Generator().manual_seed(31 * rank + n)) for n, size in enumerate(of_rank)]
        for rank, of_rank in enumerate(sizes)
    ]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in every[dist.get_rank()]]
    for parameter, gradient in zip(parameters, every[dist.get_rank()], strict=True):
        parameter.grad = gradient.clone()
    with count_traffic() as traffic:
        found = float(answer(parameters))
    return found, float(torch.cat(list(chain(*every))).norm()), traffic.sent


@exercise
def global_norm(answer: Callable[..., Any]) -> None:
    """Judge the norm of all ranks' gradients, on every rank.

    Args:
        answer: Takes the parameters of this rank's stages.
    """
    for n, sizes in zip(WORLDS, (((3, 8), (40,)), ((5,), (1, 2), (9,)), ((7,), (2, 3), (4,), (30, 1))), strict=True):
        for rank, (found, expected, sent) in enumerate(on_ranks(_norm_of, n, answer=answer, sizes=sizes)):
            if not abs(found / expected - 1) < 1e-4:
                raise NotYet(f"with {n} ranks, rank {rank}'s norm is {found / expected:.3f} times the norm of all")
            if sent > 64:
                raise NotYet(f"the norm is right, but rank {rank} sent {sent} bytes: a number per rank is enough")
