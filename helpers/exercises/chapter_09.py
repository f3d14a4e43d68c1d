"""Chapter 09: ZeRO-Offload's own functions, which other modules judge, and what its exercises ask for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, Function, NotYet, agree, alone, exercise, without_fault
from helpers.exercises.inputs import random
from helpers.exercises.offload import (
    DTYPES,
    copy_to_host,
    host_gradients,
    host_parameters,
    off_by,
    step_on_host,
    step_on_hosts,
    update_and_return,
)
from helpers.exercises.overlap import late_step, send_in_backward
from helpers.parallel.traffic import count_traffic

__all__ = [
    "copy_to_host",
    "fold",
    "how_many_tokens",
    "late_step",
    "norm",
    "send_in_backward",
    "step_on_host",
    "step_on_hosts",
    "update_and_return",
    "which_cut",
]


@exercise
def how_many_tokens(tokens: float) -> None:
    """Judge the tokens per step with which a GPU of 6,000 tokens/s loses a fifth of its time to 4 s per step.

    Args:
        tokens: The answer.
    """
    if not abs(tokens - 6_000 * (4 / 0.2 - 4)) < 100:
        too = "many" if tokens > 96_000 else "few"
        raise NotYet(f"too {too}: the 4 seconds may be a fifth of the whole step, computing included")


@exercise
def which_cut(bytes_crossing: float) -> None:
    """Judge the bytes per parameter that cross the bus if only the moments live on the host.

    Args:
        bytes_crossing: Down and up together.
    """
    if bytes_crossing != 16:
        too = "many" if bytes_crossing > 16 else "few"
        raise NotYet(f"too {too}: which tensors does Adam read, which does it change, and how many bytes has each?")


def _norm(answer: Function, lengths: Sequence[Sequence[int]]) -> str | None:
    every = [[random(7 * r + i, n) / 10 for i, n in enumerate(of_rank)] for r, of_rank in enumerate(lengths)]
    mine = every[dist.get_rank()]
    expected = float(torch.cat([share for of_rank in every for share in of_rank]).norm())
    before = [share.clone() for share in mine]
    with count_traffic() as traffic:
        found = answer(mine)
    fault = None
    if not isinstance(found, int | float | torch.Tensor):
        fault = f"norm should return a number, not {found!r}"
    elif not abs(float(found) - expected) < 1e-3 * expected:
        too = "large" if float(found) > expected else "small"
        fault = f"the norm of the whole gradient is {abs(float(found) / expected - 1):.1%} too {too}"
    elif not all(torch.equal(share, old) for share, old in zip(mine, before, strict=True)):
        fault = "norm should not change the shares"
    elif len(traffic.collectives) != 1 or traffic.collectives[0].nbytes > 8 * dist.get_world_size():
        sizes = [collective.nbytes for collective in traffic.collectives]
        fault = f"the norm is right, but it took collectives of {sizes} bytes: one, of a number per rank, is enough"
    return agree(fault)


@exercise
def norm(answer: Callable[[list[torch.Tensor]], float]) -> None:
    """Judge the norm of a gradient of which each rank has shares, in host memory.

    Args:
        answer: Takes this rank's shares.
    """
    cases = (([3, 5], [40]), ([1], [2, 30], [5, 5]), ([4, 4], [0, 1], [100], [7, 2, 6]))
    for n, lengths in zip(WORLDS, cases, strict=True):
        without_fault(_norm, n, answer=answer, lengths=lengths)


def _fold(answer: Function, make: Any) -> str | None:
    for dtype in DTYPES:
        parameters = host_parameters(dtype)
        host = make(parameters)
        for step, micro_batches in enumerate((2, 3, 1)):
            sums = [torch.zeros(p.shape) for p in parameters]
            for number in range(micro_batches):
                gradients = host_gradients(5 * step + number, dtype)
                for i, gradient in enumerate(gradients):
                    host.staging[i].copy_(gradient)
                    answer(host, i, first=number == 0)
                    sums[i] += gradient.float()
                    found = host.masters[i].grad
                    if found is None or found.dtype != torch.float32:
                        return "the sum is the master's gradient, in fp32"
                    if not (off := off_by(found, sums[i])) < 1e-5:
                        return (
                            f"after micro-batch {number + 1} of step {step + 1}, in {str(dtype)[6:]}, the gradient of "
                            f"master {i} is off by {off:.2g} from the step's sum so far"
                        )
    return None


@exercise
def fold(answer: Function, make: Any) -> None:
    """Judge how gradients of several micro-batches add up on the host.

    Args:
        answer: Takes a host, the number of a parameter whose gradient is in staging, and whether it is a step's first.
        make: The class of hosts.
    """
    alone(_fold, answer=answer, make=make)
