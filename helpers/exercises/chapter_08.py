"""Chapter 08: what its exercises ask for; other modules judge ZeRO-3's own functions and FSDP2."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, Function, NotYet, agree, exercise, without_fault
from helpers.exercises.fsdp import ddp_to_fsdp
from helpers.exercises.layers import (
    SIZES,
    Sizes,
    chain,
    complete,
    cut,
    expect_weights,
    fault_of_gradients,
    gradients_of,
    rows,
)
from helpers.exercises.zero_3 import backward, forward, gradients, shards, unshard_and_reshard, zero_3
from helpers.parallel.traffic import count_traffic

__all__ = [
    "accumulation",
    "backward",
    "ddp_to_fsdp",
    "forward",
    "gradients",
    "how_large",
    "keep_last",
    "prefetch",
    "shards",
    "unshard_and_reshard",
    "zero_3",
]


def _judge_numbers(found: dict[str, float], expected: dict[str, float], tolerance: float, question: str) -> None:
    for name, number in found.items():
        if not abs(number - expected[name]) < tolerance:
            raise NotYet(f"{name}'s number is too {'large' if number > expected[name] else 'small'}: {question}")


@exercise
def how_large(replicated: float, zero_2: float, zero_3: float) -> None:
    """Judge the billions of parameters whose model states fit 8 GPUs with 60 GB (10**9 bytes) each.

    Args:
        replicated: Under data parallelism.
        zero_2: Under ZeRO-2.
        zero_3: Under ZeRO-3.
    """
    found = {"data parallelism": replicated, "ZeRO-2": zero_2, "ZeRO-3": zero_3}
    expected = {"data parallelism": 60 / 16, "ZeRO-2": 60 / (2 + 14 / 8), "ZeRO-3": 60 * 8 / 16}
    _judge_numbers(found, expected, 0.05, "how many of the 16 bytes per parameter does a GPU hold?")


@exercise
def accumulation(replicated: float, zero_2: float, zero_3: float) -> None:
    """Judge the bytes per parameter that each of 2 ranks sends in a step of four micro-batches.

    Args:
        replicated: Under DDP with no_sync.
        zero_2: Under ZeRO-2.
        zero_3: Under ZeRO-3.
    """
    found = {"DDP": replicated, "ZeRO-2": zero_2, "ZeRO-3": zero_3}
    question = "which collectives run once per step, which once per micro-batch?"
    _judge_numbers(found, {"DDP": 2.0, "ZeRO-2": 5.0, "ZeRO-3": 12.0}, 0.01, question)


def _kept(
    answer: Function, make: Function, reshard: Function, hook_gradients: Function, sizes: Sizes, which: int
) -> str | None:
    rank, n, layers, mean = dist.get_rank(), dist.get_world_size(), chain(sizes), chain(sizes)
    for r in range(n):
        (mean(rows(r, sizes)).square().mean() / n).backward()
    kept = cut(make, reshard, layers)
    for number, (layer, sharded) in enumerate(zip(layers, kept, strict=True)):
        answer(layer, sharded, keep=number == which)
        hook_gradients(sharded)
        expect_weights(layer, sharded, number)
    with count_traffic() as traffic:
        loss = layers(rows(rank, sizes)).square().mean()
        between = complete(kept)
        loss.backward()
    units = [4 * (n - 1) * len(sharded.shard) for sharded in kept]
    fault = None
    if between != [which]:
        fault = f"with keep=True for layer {which}, the complete layers between forward and backward are {between}"
    elif complete(kept):
        fault = f"after backward the layers {complete(kept)} are still complete"
    elif traffic.sent != 3 * sum(units) - units[which]:
        fault = f"a step sent {traffic.sent} bytes: the kept layer is gathered once, the others twice"
    else:
        for part, sharded in zip(mean, kept, strict=True):
            whole = torch.cat([*(g.flatten() for g in gradients_of(part).values()), torch.zeros(sharded.padding)])
            fault = fault or fault_of_gradients(sharded, whole.chunk(n)[rank], "backward", 0)
    return agree(fault)


@exercise
def keep_last(answer: Function, make: Function, reshard: Function, hook_gradients: Function) -> None:
    """Judge the hooks that can keep a unit between its forward and its backward.

    Args:
        answer: Takes a module, its sharded parameters, and ``keep``.
        make: The class of sharded layers.
        reshard: Frees one.
        hook_gradients: Reduces a unit's gradients and frees it.
    """
    for n, sizes, which in zip(WORLDS, SIZES, (2, 1, 2), strict=True):
        used = {"make": make, "reshard": reshard, "hook_gradients": hook_gradients}
        without_fault(_kept, n, answer=answer, **used, sizes=sizes, which=which)


class _Handle:
    """A collective's handle that notes when somebody waits for it."""

    def __init__(self, work: Any, number: int, waited: list[int]) -> None:
        self.work, self.number, self.waited = work, number, waited

    def wait(self) -> Any:
        """Wait, and note the layer's number."""
        self.waited.append(self.number)
        return self.work.wait()


def _prefetched(
    begin: Function, hook_prefetch: Function, make: Function, reshard: Function, sizes: Sizes
) -> str | None:
    rank, layers, waited = dist.get_rank(), chain(sizes), list[int]()
    expected = layers(rows(rank, sizes)).detach()
    work = begin(make(chain(sizes)[0]))
    if found := agree(None if hasattr(work, "wait") else "begin waits for its message: it should return a handle"):
        return found
    work.wait()
    kept = cut(make, reshard, layers)
    places = {id(sharded): number for number, sharded in enumerate(kept)}
    # What the hooks call by the name of begin from here on.
    hook_prefetch.__globals__[begin.__name__] = lambda one: _Handle(begin(one), places[id(one)], waited)
    hook_prefetch(list(layers), kept)
    seen: list[tuple[list[int], list[int]]] = []

    def note(number: int) -> None:
        if number not in waited:  # it would compute with memory that is still being filled
            raise RuntimeError(f"layer {number} computes, but the hooks have not waited for its weights")
        seen.append((complete(kept), [*waited]))

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: note(number))
    for _ in range(2):
        seen.clear()
        waited.clear()
        with torch.no_grad():
            output = layers(rows(rank, sizes))
        fault = _fault_of_prefetch(seen, len(layers))
        if not fault and complete(kept):
            fault = f"after forward, the layers {complete(kept)} are still complete"
        if not fault and not torch.allclose(output, expected, atol=1e-5):
            fault = "the output is not that of the whole network"
        if found := agree(fault):
            return found
    return None


def _fault_of_prefetch(seen: Sequence[tuple[list[int], list[int]]], layers: int) -> str | None:
    for number, (there, waited) in enumerate(seen):
        when = f"when layer {number} begins"
        if there != list(range(number, min(number + 2, layers))):
            return f"{when}, the layers {there} have memory: it should be that one and the next"
        if waited != list(range(number + 1)):
            return f"{when}, the hooks have waited for the layers {waited}: it needs only its own weights by now"
    return None


@exercise
def prefetch(begin: Function, hook_prefetch: Function, make: Function, reshard: Function) -> None:
    """Judge the gathering of a layer while the one before it computes, in forward.

    Args:
        begin: Gets a sharded layer, starts to gather it, and returns the handle.
        hook_prefetch: Calls begin. Gets the modules in the order of forward, and their sharded parameters.
        make: The class of sharded layers.
        reshard: Frees one.
    """
    for n, sizes in zip(WORLDS, SIZES, strict=True):
        without_fault(_prefetched, n, begin=begin, hook_prefetch=hook_prefetch, make=make, reshard=reshard, sizes=sizes)
