"""Chapter 02: the ring, averaging, buckets, and what its exercises ask for; another module judges the program."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, NotYet, exercise, on_ranks
from helpers.exercises.inputs import random
from helpers.exercises.program import program
from helpers.parallel.traffic import Traffic, count_traffic

__all__ = [
    "all_gather",
    "average_gradients",
    "compressed_mean",
    "global_mean",
    "lora_traffic",
    "program",
    "reduce_scatter",
    "two_level",
]

SIZES = (1, 5, 64)  # elements of a part
Tensors = list[torch.Tensor]

# --- the chapter's own functions ---


def _ring(answer: Callable[..., Any], size: int, gathers: bool) -> tuple[Tensors, Tensors, Traffic]:
    """In a rank: the parts after the answer, their sums over ranks, and what was sent."""
    rank, n = dist.get_rank(), dist.get_world_size()
    all_parts = [[random(97 * r + part, size) for part in range(n)] for r in range(n)]
    sums = [torch.stack([of_rank[part] for of_rank in all_parts]).sum(0) for part in range(n)]
    parts = all_parts[rank]
    if gathers:  # as a reduce-scatter leaves them: this rank's finished part, and unfinished ones
        parts = [sums[part] if part == (rank + 1) % n else parts[part] for part in range(n)]
    with count_traffic() as traffic:
        answer(parts)
    return parts, sums, traffic


def _check_messages(traffic: Traffic, n: int, size: int, name: str) -> None:
    if any(sent.operation != "send" for sent in traffic.collectives):
        raise NotYet(f"{name} may only send to a neighbour, but it called {traffic.collectives[0].operation}")
    if traffic.sent != (n - 1) * size * 4:
        parts = traffic.sent / (4 * size)
        raise NotYet(f"with {n} ranks each sends {n - 1} parts of N, here a rank sent {parts:g}")


@exercise
def reduce_scatter(answer: Callable[[list[torch.Tensor]], None]) -> None:
    """Judge the first half of the ring: each rank ends with the sum of one part.

    Args:
        answer: Takes this rank's N parts and changes them in place.
    """
    for n, size in zip(WORLDS, SIZES, strict=True):
        for rank, (parts, sums, traffic) in enumerate(on_ranks(_ring, n, answer=answer, size=size, gathers=False)):
            mine = (rank + 1) % n
            if not torch.equal(parts[mine], sums[mine]):
                done = [part for part in range(n) if torch.equal(parts[part], sums[part])]
                raise NotYet(f"with {n} ranks, rank {rank} should end with the sum of part {mine}; complete are {done}")
            _check_messages(traffic, n, size, "the first half")


@exercise
def all_gather(answer: Callable[[list[torch.Tensor]], None]) -> None:
    """Judge the second half of the ring: every finished part reaches every rank.

    Args:
        answer: Takes this rank's N parts, of which number rank + 1 is finished, and changes the list in place.
    """
    for n, size in zip(WORLDS, SIZES, strict=True):
        for rank, (parts, sums, traffic) in enumerate(on_ranks(_ring, n, answer=answer, size=size, gathers=True)):
            wrong = [part for part in range(n) if not torch.equal(parts[part], sums[part])]
            if wrong:
                raise NotYet(f"with {n} ranks, rank {rank} still lacks the finished parts {wrong}")
            _check_messages(traffic, n, size, "the second half")


def _averaged(answer: Callable[..., Any], sizes: Sequence[int]) -> tuple[Tensors, Tensors, int]:
    rank, n = dist.get_rank(), dist.get_world_size()
    every = [[random(31 * r + number, size) for number, size in enumerate(sizes)] for r in range(n)]
    model = torch.nn.ParameterList([torch.zeros(size) for size in sizes])
    for parameter, gradient in zip(model, every[rank], strict=True):
        parameter.grad = gradient.clone()
    with count_traffic() as traffic:
        answer(model)
    means = [torch.stack(gradients).mean(0) for gradients in zip(*every, strict=True)]
    return [parameter.grad for parameter in model if parameter.grad is not None], means, traffic.sent


@exercise
def average_gradients(answer: Callable[[torch.nn.Module], None]) -> None:
    """Judge the average of all gradients over the ranks.

    Args:
        answer: Takes a model whose parameters have gradients, and changes these.
    """
    for n, sizes in zip(WORLDS, ((3, 8), (5,), (1, 2, 30)), strict=True):
        for rank, (found, means, sent) in enumerate(on_ranks(_averaged, n, answer=answer, sizes=sizes)):
            if len(found) != len(means):
                raise NotYet(f"with {n} ranks, rank {rank} has no gradient at all for some parameters")
            off = max(float((a - b).abs().max()) for a, b in zip(found, means, strict=True))
            if not off < 1e-3:
                raise NotYet(f"with {n} ranks, a gradient of rank {rank} is off by {off:.3g} from the mean of all")
            if sent > 2 * (n - 1) / n * 4 * sum(sizes) + 1:
                raise NotYet(f"the mean is right, but rank {rank} sent {sent} bytes: one all-reduce of each is enough")


# --- exercises ---


@exercise
def lora_traffic(adapter_megabytes: float, full_megabytes: float) -> None:
    """Judge the megabytes (10**6) that each of two ranks sends in a step, for LoRA and for all parameters.

    Args:
        adapter_megabytes: For an adapter in 32 bit.
        full_megabytes: For all parameters in 16 bit.
    """
    for name, found, expected in (
        ("the adapter's", adapter_megabytes, 4 * 3.784704),
        ("the full model's", full_megabytes, 2 * 6243.584),
    ):
        if not abs(found - expected) < 0.06:
            too = "many" if found > expected else "few"
            raise NotYet(f"{name} megabytes are too {too}: all gradients' bytes, times the ring's factor")


def _mean_of(answer: Callable[..., Any], counts: Sequence[int]) -> tuple[float, int]:
    losses = random(dist.get_rank(), counts[dist.get_rank()])
    with count_traffic() as traffic:
        found = answer(losses.sum(), len(losses))
    return float(found), len(traffic.collectives)


@exercise
def global_mean(answer: Callable[..., Any]) -> None:
    """Judge the mean over all rows of all ranks, by one collective.

    Args:
        answer: Takes the sum of this rank's losses and their number.
    """
    for n, counts in zip(WORLDS, ((3, 8), (1, 6, 2), (5, 1, 9, 4)), strict=True):
        expected = float(torch.cat([random(rank, count) for rank, count in enumerate(counts)]).mean())
        found = on_ranks(_mean_of, n, answer=answer, counts=counts)
        for rank, (mean, calls) in enumerate(found):
            if not abs(mean - expected) < 1e-4:
                raise NotYet(f"with {n} ranks that have {counts} rows, rank {rank} is off by {mean - expected:+.3f}")
            if calls != 1:
                raise NotYet(f"the mean is right, but it took {calls} collectives: one is enough")


def _compressed(answer: Callable[..., Any], elements: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    n = dist.get_world_size()
    buffers = [torch.randn(elements, generator=torch.Generator().manual_seed(rank)) for rank in range(n)]
    mine = buffers[dist.get_rank()].clone()
    with count_traffic() as traffic:
        answer(mine)
    return mine, torch.stack(buffers).mean(0), traffic.sent


@exercise
def compressed_mean(answer: Callable[[torch.Tensor], None]) -> None:
    """Judge an all-reduce that averages in place and travels in 16 bit.

    Args:
        answer: Takes an fp32 buffer.
    """
    for n, elements in zip(WORLDS, (1000, 7, 130), strict=True):
        full = 2 * (n - 1) / n * 4 * elements
        for rank, (mine, mean, sent) in enumerate(on_ranks(_compressed, n, answer=answer, elements=elements)):
            error = float((mine.float() - mean).abs().max())
            if mine.dtype != torch.float32 or not error < 0.05:
                raise NotYet(f"with {n} ranks, rank {rank}'s buffer is off by {error:.2g} from the mean of all")
            if not abs(sent / full - 0.5) < 0.01:
                raise NotYet(f"the mean is right, but rank {rank} sent {sent / full:.0%} of the bytes of fp32")


def _two_level(answer: Callable[..., Any], elements: int) -> tuple[bool, dict[str, int]]:
    groups = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))}
    inside, across = (group for ranks, group in groups.items() if dist.get_rank() in ranks)
    every = [random(rank, elements) for rank in range(4)]
    x = every[dist.get_rank()].clone()
    with count_traffic() as traffic:
        answer(x, inside, across)
    sent = {"inside": traffic.within(inside).sent, "across": traffic.within(across).sent, "all": traffic.sent}
    return torch.equal(x, torch.stack(every).sum(0)), sent


@exercise
def two_level(answer: Callable[..., None]) -> None:
    """Judge an all-reduce over two machines in which each rank sends half of the tensor to the other machine.

    Args:
        answer: Takes the tensor, and this rank's groups inside of its machine and across machines.
    """
    for elements in (8, 34):
        for rank, (right, sent) in enumerate(on_ranks(_two_level, 4, answer=answer, elements=elements)):
            if not right:
                raise NotYet(f"rank {rank} does not have the sum of all four ranks")
            if sent["all"] > sent["inside"] + sent["across"]:
                raise NotYet("the sum is right, but something was sent to all four ranks: use only the two groups")
            if sent["across"] > elements * 4 / 2:
                raise NotYet(f"rank {rank} sent {sent['across']:g} of {elements * 4} bytes to the other machine")
