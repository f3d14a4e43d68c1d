"""Judge how a network is sharded by FSDP2, and how its weights are collected."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from helpers.exercises.answers import WORLDS, NotYet, agree, exercise, on_ranks
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.traffic import count_traffic

LAYERS = (2, 3, 1)  # of the networks, by world
RATE = 0.1


def _fault_of_units(model: Any, inputs: dict[str, torch.Tensor], layers: int) -> str | None:
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        return f"{whole[0]} is not sharded: what is in no layer needs a unit, too"
    with count_traffic() as traffic:
        model(**inputs).loss.backward()
    gathers = sum(sent.operation == "all-gather" for sent in traffic.collectives)
    # Each layer is gathered in forward and in backward. The rest stays complete from one to the other.
    if gathers == layers + 1:
        return "a step gathers each layer once: it stays complete from its forward to its backward"
    if gathers != 2 * layers + 1:
        return f"a step gathers {gathers} times: with {layers} layers it is one unit per layer, and one for the rest"
    return None


def _sharded(answer: Callable[..., Any], collect: Callable[..., Any], layers: int) -> str | None:
    """In a rank: train a step with the answer and with a mean over all rows, and compare the collected weights."""
    rank, n, shape = dist.get_rank(), dist.get_world_size(), replace(TINY, layers=layers)
    inputs = batch(shape, 2 * n, 8)
    model = answer(build(shape), init_device_mesh("cpu", (n,)))
    if not isinstance(model, torch.nn.Module):
        return agree("the model is not returned")
    mine = {name: rows.chunk(n)[rank] for name, rows in inputs.items()}
    if found := agree(_fault_of_units(model, mine, layers)):
        return found
    alone = build(shape)
    alone(**inputs).loss.backward()
    for trained in (model, alone):
        torch.optim.SGD(trained.parameters(), lr=RATE).step()
    fault = _fault_of_weights(collect(model), weights(alone))
    return f"rank {rank}: {fault}" if fault else None  # no agreement: ranks may still wait in what collect calls


def _fault_of_weights(found: Any, expected: dict[str, torch.Tensor]) -> str | None:
    if not isinstance(found, dict) or found.keys() != expected.keys():
        return "the collected weights do not have the names that the network has in one process"
    for name, weight in found.items():
        if isinstance(weight, DTensor) or weight.shape != expected[name].shape:
            return f"the collected {name} is not complete: it is of type {type(weight).__name__} and a shard"
    off = largest_difference(found, expected)
    return None if off < 1e-5 else f"after a step, the collected weights are off by {off:.2g} from one process"


@exercise
def ddp_to_fsdp(answer: Callable[..., Any], collect: Callable[..., Any]) -> None:
    """Judge the two lines in which a training program with FSDP2 differs from one with DDP.

    Args:
        answer: Takes a network and a device mesh, shards the network in units of a layer, and returns it.
        collect: Gets the sharded network on every rank, and returns its complete weights by name.
    """
    for n, layers in zip(WORLDS, LAYERS, strict=True):
        for fault in on_ranks(_sharded, n, answer=answer, collect=collect, layers=layers):
            if fault:
                raise NotYet(f"with {n} ranks, {fault}")
