"""Chapter 00: the collectives of its pictures, and what its exercises ask for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, NotYet, exercise, on_ranks
from helpers.exercises.inputs import random
from helpers.parallel.traffic import Traffic, count_traffic

Operation = Callable[[torch.Tensor], torch.Tensor]
Found = tuple[torch.Tensor | None, bool, Traffic]


def _operate(answer: Operation, elements: int) -> Found:
    """In a rank: what the answer returned, whether its input stayed as it was, and what was sent."""
    x = random(dist.get_rank(), elements)
    with count_traffic() as traffic:
        found = answer(x)
    unchanged = torch.equal(x, random(dist.get_rank(), elements))
    return (found.clone() if isinstance(found, torch.Tensor) else None), unchanged, traffic


def _check(where: str, found: torch.Tensor | None, expected: torch.Tensor) -> None:
    if found is None:
        raise NotYet(f"{where} gets no tensor")
    if found.shape != expected.shape:
        raise NotYet(f"{where} gets {found.numel()} elements, not {expected.numel()}")
    if not torch.equal(found, expected):
        raise NotYet(f"{where} gets the right number of elements, but others")


# --- the chapter's own functions ---


@exercise
def reduce_scatter(answer: Operation) -> None:
    """Judge the sum of which each rank gets its own slice.

    Args:
        answer: Takes the full tensor and returns a new one.
    """
    for n, size in zip(WORLDS, (4, 1, 6), strict=True):
        total = torch.stack([random(rank, size * n) for rank in range(n)]).sum(0)
        for rank, (found, _, traffic) in enumerate(on_ranks(_operate, n, answer=answer, elements=size * n)):
            _check(f"rank {rank} of {n}", found, total.chunk(n)[rank])
            if traffic.sent > (n - 1) * size * 4 + 1:
                raise NotYet(f"the slice is right, but rank {rank} sent {traffic.sent} bytes, as for the whole sum")


@exercise
def all_gather(answer: Operation) -> None:
    """Judge the operation after which all ranks have all parts.

    Args:
        answer: Takes this rank's part and returns a new tensor.
    """
    for n, size in zip(WORLDS, (4, 1, 6), strict=True):
        whole = torch.cat([random(rank, size) for rank in range(n)])
        for rank, (found, _, traffic) in enumerate(on_ranks(_operate, n, answer=answer, elements=size)):
            _check(f"rank {rank} of {n}", found, whole)
            if traffic.sent > (n - 1) * size * 4 + 1:
                raise NotYet(f"the parts are right, but rank {rank} sent {traffic.sent} bytes: it has only one part")


@exercise
def pass_on(answer: Operation) -> None:
    """Judge the message to the next rank.

    Args:
        answer: Takes what to send and returns what the rank before sent.
    """
    for n, size in zip(WORLDS, (4, 1, 6), strict=True):
        for rank, (found, unchanged, traffic) in enumerate(on_ranks(_operate, n, answer=answer, elements=size)):
            _check(f"rank {rank} of {n}", found, random((rank - 1) % n, size))
            if not unchanged:
                raise NotYet(f"rank {rank} of {n} overwrote the tensor that it sends")
            if any(call.operation != "send" for call in traffic.collectives) or traffic.sent != size * 4:
                raise NotYet("the numbers are right, but a rank may send its tensor to one neighbour only")


# --- exercises ---


@exercise
def sent_gigabytes(gigabytes: float) -> None:
    """Judge what each of 8 GPUs sends to all-reduce the 16-bit gradients of 6.2 billion parameters.

    Args:
        gigabytes: 10**9 bytes.
    """
    expected = 2 * 7 / 8 * 2 * 6.2
    if not abs(gigabytes - expected) < 0.1:
        too = "much" if gigabytes > expected else "little"
        raise NotYet(f"{gigabytes:g} gigabytes are too {too}: the tensor's bytes, times the ring's factor")


@exercise
def my_all_reduce(answer: Operation) -> None:
    """Judge an all-reduce that consists of messages between two ranks.

    Args:
        answer: Takes a tensor and returns the sum over all ranks.
    """
    for n, size in zip(WORLDS, (4, 1, 6), strict=True):
        total = torch.stack([random(rank, size) for rank in range(n)]).sum(0)
        for rank, (found, unchanged, traffic) in enumerate(on_ranks(_operate, n, answer=answer, elements=size)):
            others = [call.operation for call in traffic.collectives if call.operation != "send"]
            if others:
                raise NotYet(f"it calls {others[0]}: use nothing but send and receive")
            _check(f"rank {rank} of {n}", found, total)
            if not unchanged:
                raise NotYet(f"rank {rank} of {n} returns the sum, but changed the tensor that it got")


def _reductions(answer: Callable[[int], Any], rows: int) -> int:
    with count_traffic() as traffic:
        answer(rows)
    return len(traffic.collectives)


@exercise
def hang(nprocs: int, mended: Callable[[int], Any]) -> None:
    """Judge a number of ranks with which ten rows hang, and the function without the hang.

    Args:
        nprocs: Of ranks.
        mended: Gets the number of rows that are dealt out to the ranks.
    """
    if not isinstance(nprocs, int) or nprocs < 1:
        raise NotYet(f"{nprocs} is not a number of ranks")
    if 10 % nprocs == 0:
        raise NotYet(f"with {nprocs} ranks it ends: each has {10 // nprocs} rows")
    for n, rows in zip(WORLDS, (5, 10, 10), strict=True):
        counts = on_ranks(_reductions, n, answer=mended, rows=rows)
        if len(set(counts)) > 1 or not rows // n <= counts[0] <= -(-rows // n):
            raise NotYet(f"it ends, but {n} ranks with {rows} rows call {counts} collectives: all-reduce once per row")


@exercise
def returned_mib(every_second: float, first_half: float) -> None:
    """Judge how much of 64 tensors of 4 MiB, five to a block, an allocator can give back.

    Args:
        every_second: MiB that go back if every second tensor is deleted.
        first_half: MiB that go back if the first 32 are deleted.
    """
    for name, found, deleted in (
        ("every second tensor", every_second, set(range(1, 64, 2))),
        ("the first half", first_half, set(range(32))),
    ):
        blocks = [set(range(first, min(first + 5, 64))) for first in range(0, 64, 5)]
        expected = 20 * sum(block <= deleted for block in blocks)
        if not abs(found - expected) < 0.5:
            too = "much" if found > expected else "little"
            raise NotYet(f"if {name} is deleted, {found:g} MiB are too {too}: which blocks are empty then?")
