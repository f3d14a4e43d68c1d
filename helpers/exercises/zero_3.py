"""Judge the functions that chapter 08 writes: one sharded layer, and ZeRO-3's hooks.

A trial also uses other functions of the notebook, which were judged before.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, Function, agree, exercise, without_fault
from helpers.exercises.inputs import random
from helpers.exercises.layers import (
    SIZES,
    Sizes,
    chain,
    complete,
    cut,
    expect_weights,
    fault_of_gradients,
    gather,
    gradients_of,
    rows,
)
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.traffic import count_traffic

SMALL = replace(TINY, layers=2, vocab=64)


def _sharded(answer: Function, sizes: Sizes) -> str | None:
    rank, n = dist.get_rank(), dist.get_world_size()
    return agree(next(filter(None, (_fault_of_shard(answer, torch.nn.Linear(*size), rank, n) for size in sizes)), None))


def _fault_of_shard(answer: Function, layer: torch.nn.Linear, rank: int, n: int) -> str | None:
    whole = torch.cat([p.detach().flatten() for p in layer.parameters()])
    padded = torch.cat([whole, torch.zeros(-len(whole) % n)])
    found, name = answer(layer), f"for {len(whole)} elements"
    if [id(p) for p in found.parameters] != [id(p) for p in layer.parameters()]:
        return "parameters should be the list of the module's own parameters"
    if found.padding != len(padded) - len(whole):
        return f"{name} padding is {found.padding}"
    if found.flat.shape != padded.shape or not torch.equal(found.flat, padded):
        return f"{name} flat is not the parameters one after another, with as many zeros as padding says"
    if found.shard.shape != padded.chunk(n)[rank].shape or not torch.equal(found.shard, padded.chunk(n)[rank]):
        return f"{name} shard is not part {rank} of {n} of flat"
    if not (found.flat.is_leaf and found.shard.is_leaf):
        return "flat and shard belong to autograd's graph of the parameters: an optimizer takes leaves only"
    storage = found.flat.untyped_storage().data_ptr()
    if found.shard.untyped_storage().data_ptr() == storage:
        return "shard lies in flat's memory, and would be freed with it"
    if [view.shape for view in found.views] != [p.shape for p in layer.parameters()]:
        return "views should have the parameters' shapes"
    if any(view.untyped_storage().data_ptr() != storage for view in found.views):
        return "views should be places in flat, not copies"
    same = all(torch.equal(view, p) for view, p in zip(found.views, layer.parameters(), strict=True))
    return None if same else "a view is not at its parameter's place"


@exercise
def shards(answer: Function) -> None:
    """Judge the class that keeps a rank's shard of a module.

    Args:
        answer: Takes a module. It has parameters, padding, flat, shard, and views.
    """
    for n, sizes in zip(WORLDS, SIZES, strict=True):
        without_fault(_sharded, n, answer=answer, sizes=sizes)


def _life(unshard: Function, reshard: Function, make: Function, size: tuple[int, int]) -> str | None:
    n, layer = dist.get_world_size(), torch.nn.Linear(*size)
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = random(number, *parameter.shape)
    values = [p.detach().clone() for p in layer.parameters()]
    sharded = make(layer)
    flat, most = sharded.flat, 4 * (n - 1) * len(sharded.shard)
    for turn in range(2):
        reshard(sharded)
        if found := agree(_fault_of_reshard(sharded, flat)):
            return found
        with torch.no_grad():
            sharded.shard += 1  # an optimizer's step
        with count_traffic() as traffic:
            unshard(sharded)
        if found := agree(_fault_of_unshard(sharded, flat, [value + turn + 1 for value in values], traffic.sent, most)):
            return found
    return None


def _fault_of_reshard(sharded: Any, flat: torch.Tensor) -> str | None:
    if sharded.flat is not flat:
        return "reshard should keep the tensor object flat: autograd's saved tensors point at its storage"
    if nbytes := flat.untyped_storage().nbytes():
        return f"after reshard there are still {nbytes} bytes behind flat"
    if left := sum(p.numel() for p in sharded.parameters):
        return f"after reshard the parameters still have {left} elements"
    return None


def _fault_of_unshard(sharded: Any, flat: torch.Tensor, values: list[torch.Tensor], sent: int, most: int) -> str | None:
    if sharded.flat is not flat:
        return "unshard should fill the storage of flat again, not make another tensor"
    for parameter, value in zip(sharded.parameters, values, strict=True):
        if parameter.shape != value.shape:
            return f"after unshard a parameter has the shape {tuple(parameter.shape)}, not {tuple(value.shape)}"
        if not torch.equal(parameter.data, value):
            return "after unshard a parameter does not have the values of all ranks' shards"
        if parameter.data.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            return "after unshard a parameter is a copy: it should be its view of flat"
    return None if sent <= most else f"unshard sent {sent} bytes, where {most} are enough"


@exercise
def unshard_and_reshard(unshard: Function, reshard: Function, make: Function) -> None:
    """Judge how a layer is freed and gathered again.

    Args:
        unshard: Gets a sharded layer, and completes it.
        reshard: Gets a complete one, and frees it.
        make: The class of sharded layers.
    """
    for n, size in zip(WORLDS, ((3, 4), (5, 2), (1, 1)), strict=True):
        without_fault(_life, n, unshard=unshard, reshard=reshard, make=make, size=size)


def _forward(answer: Function, make: Function, reshard: Function, sizes: Sizes) -> str | None:
    rank, layers, seen = dist.get_rank(), chain(sizes), list[list[int]]()
    expected = layers(rows(rank, sizes)).detach()
    kept = cut(make, reshard, layers)
    for layer, sharded in zip(layers, kept, strict=True):
        answer(layer, sharded)
        layer.register_forward_pre_hook(lambda *_: seen.append(complete(kept)))
    for training in (True, False):
        seen.clear()
        with torch.set_grad_enabled(training), count_traffic() as traffic:
            found = layers(rows(rank, sizes)).detach()
        if fault := agree(_fault_of_forward(kept, seen, found, expected, traffic.sent)):
            return fault
    return None


def _fault_of_forward(
    kept: list[Any], seen: list[list[int]], found: torch.Tensor, expected: torch.Tensor, sent: int
) -> str | None:
    most = 4 * (dist.get_world_size() - 1) * sum(len(sharded.shard) for sharded in kept)
    if seen != [[number] for number in range(len(kept))]:
        number = next(number for number, here in enumerate(seen) if here != [number])
        return f"when layer {number} begins its forward, the complete layers are {seen[number]}"
    if complete(kept):
        return f"after forward, the layers {complete(kept)} are still complete"
    if not torch.allclose(found, expected, atol=1e-5):
        return "the output is not that of the whole network"
    return f"one forward sent {sent} bytes: gather each layer once" if sent > most else None


@exercise
def forward(answer: Function, make: Function, reshard: Function) -> None:
    """Judge the hooks of a module's forward.

    Args:
        answer: Takes a module and its sharded parameters.
        make: The class of sharded layers.
        reshard: Frees one.
    """
    for n, sizes in zip(WORLDS, SIZES, strict=True):
        without_fault(_forward, n, answer=answer, make=make, reshard=reshard, sizes=sizes)


def _backward(answer: Function, hook_forward: Function, make: Function, reshard: Function, sizes: Sizes) -> str | None:
    rank, n, layers, reference = dist.get_rank(), dist.get_world_size(), chain(sizes), chain(sizes)
    reference(rows(rank, sizes)).square().mean().backward()
    kept, seen = cut(make, reshard, layers), []
    for number, (layer, sharded) in enumerate(zip(layers, kept, strict=True)):
        hook_forward(layer, sharded)
        answer(layer, sharded)
        expect_weights(layer, sharded, number)
        layer.get_parameter("bias").register_post_accumulate_grad_hook(lambda _: seen.append(complete(kept)))
    with torch.no_grad():
        layers(rows(rank, sizes))  # without gradients, backward never runs
    loss = layers(rows(rank, sizes)).square().mean()
    with count_traffic() as traffic:
        loss.backward()
    off = largest_difference(gradients_of(layers), gradients_of(reference))
    early = [here for number, here in zip(range(len(layers))[::-1], seen, strict=True) if min(here) < number]
    fault = None
    if not off < 1e-5:
        fault = f"a gradient is off by {off:.2g} from the whole network's"
    elif early:
        fault = f"in backward the layers {early[0]} are complete at once: gather a layer when its turn has come"
    elif traffic.sent > 4 * (n - 1) * sum(len(sharded.shard) for sharded in kept):
        fault = f"one backward sent {traffic.sent} bytes: gather each layer once"
    return agree(fault)


@exercise
def backward(answer: Function, hook_forward: Function, make: Function, reshard: Function) -> None:
    """Judge the hook that gathers a layer for its backward.

    Args:
        answer: Takes a module and its sharded parameters.
        hook_forward: Does the same for forward.
        make: The class of sharded layers.
        reshard: Frees one.
    """
    for n, sizes in zip(WORLDS, SIZES, strict=True):
        without_fault(_backward, n, answer=answer, hook_forward=hook_forward, make=make, reshard=reshard, sizes=sizes)


def _reduced(
    reduce: Function, hook_gradients: Function, make: Function, size: tuple[int, int], bias_first: bool
) -> str | None:
    rank, n, (layer,), mean = dist.get_rank(), dist.get_world_size(), chain([size]), chain([size])
    for linear in (layer, mean[0]) if bias_first else ():  # then gradients come in the order of the parameters
        linear.register_parameter("weight", linear._parameters.pop("weight"))
    for r in range(n):
        (mean(rows(r, [size])).square().mean() / n).backward()
    sharded = make(layer)
    padded = torch.cat([*(g.flatten() for g in gradients_of(mean).values()), torch.zeros(sharded.padding)])
    layer(rows(rank, [size])).square().mean().backward()
    with count_traffic() as traffic:
        reduce(sharded)
    if found := agree(fault_of_gradients(sharded, padded.chunk(n)[rank], "reduce", traffic.sent)):
        return found
    hook_gradients(sharded)
    for when in ("backward", "the next backward"):
        sharded.shard.grad = None
        with count_traffic() as traffic:
            layer(rows(rank, [size])).square().mean().backward()
        fault = fault_of_gradients(sharded, padded.chunk(n)[rank], when, traffic.sent)
        if not fault and sharded.flat.untyped_storage().nbytes():
            fault = f"after {when} the layer is still complete"
        if found := agree(fault):
            return found
        gather(sharded)
    return None


@exercise
def gradients(reduce: Function, hook_gradients: Function, make: Function) -> None:
    """Judge how a layer's gradients are averaged and freed once all of them have come.

    Args:
        reduce: Gets a sharded layer whose parameters have gradients.
        hook_gradients: Gets a sharded layer before its backward.
        make: The class of sharded layers.
    """
    for n, size in zip(WORLDS, ((3, 5), (5, 4), (2, 1)), strict=True):
        used = {"reduce": reduce, "hook_gradients": hook_gradients, "make": make}
        without_fault(_reduced, n, **used, size=size, bias_first=n == 2)


def _zero_3(answer: Function, unshard: Function) -> str | None:
    rank, n, model, reference = dist.get_rank(), dist.get_world_size(), build(SMALL), build(SMALL)
    kept = answer(model)
    if found := agree("not every parameter is freed after shard" if next(model.parameters()).numel() else None):
        return found
    optimizer, single = (torch.optim.SGD(p, 0.1, 0.5) for p in ([s.shard for s in kept], reference.parameters()))
    for step in range(2):
        whole = batch(SMALL, 2 * n, 8, step)
        reference(**whole).loss.backward()
        with count_traffic() as traffic:
            model(**{name: tensor.chunk(n)[rank] for name, tensor in whole.items()}).loss.backward()
        for each in (optimizer, single):
            each.step()
            each.zero_grad()
    fault = f"the units {complete(kept)} are still complete after backward" if complete(kept) else None
    most = 3 * 4 * (n - 1) * sum(len(sharded.shard) for sharded in kept)
    if not fault and traffic.sent > most:
        fault = f"a step sent {traffic.sent} bytes, where {most} are enough"
    if found := agree(fault):
        return found
    for sharded in kept:
        unshard(sharded)
    off = largest_difference(weights(model), weights(reference))
    return agree(None if off < 1e-5 else f"after two steps a weight is off by {off:.2g} from a single process's")


@exercise
def zero_3(answer: Function, unshard: Function) -> None:
    """Judge the sharding of a whole network, trained for two steps.

    Args:
        answer: Takes a network, shards and hooks its units, and returns them.
        unshard: Completes a unit.
    """
    for n in WORLDS[:2]:
        without_fault(_zero_3, n, answer=answer, unshard=unshard)
