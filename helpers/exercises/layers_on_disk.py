"""Judge how chapter 10 keeps layers in files: their memory, their gradients, their parts on N ranks, and tiles."""

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, Function, agree, alone, exercise, without_fault
from helpers.exercises.inputs import random
from helpers.parallel.traffic import count_traffic

SHAPES = ((3, 4), (5,), (2, 2, 3))  # of a layer's parameters


def _life(drop: Function, load: Function) -> str | None:
    sizes = (6, 6, 6)
    flat = [random(i, n) for i, n in enumerate(sizes)]
    views = [tensor.view(2, 3) for tensor in flat]
    # Methods get what they need of the class: the flat tensors, and what a rank makes of its part of a file.
    layers = SimpleNamespace(flat=[*flat], disk=None, most=0, whole=lambda part: torch.cat([part, -part]))
    read = list[int]()

    def fetch(disk: object, i: int) -> torch.Tensor:
        read.append(i)
        return random(10 + i, 3)

    load.__globals__["fetch"] = fetch
    there, most = set(range(len(sizes))), 0
    turns = [(drop, 1), (drop, 0), (drop, 2), (load, 2), (drop, 2), (load, 0), (load, 1), (drop, 0), (load, 2)]
    for action, i in turns:
        action(layers, i)
        there = there - {i} if action is drop else there | {i}
        name = f"{action.__name__}({i})"
        if layers.flat[i] is not flat[i]:
            return f"{name} should leave the tensor object where it is: autograd's saved tensors use its storage"
        found = {number for number, tensor in enumerate(flat) if tensor.untyped_storage().nbytes()}
        if found != there:
            return f"after {name} the layers {sorted(found)} have memory, but it should be {sorted(there)}"
        if action is drop:
            continue
        most = max(most, 4 * sum(sizes[number] for number in there))
        value = torch.cat([random(10 + i, 3), -random(10 + i, 3)])
        if not torch.equal(flat[i], value) or not torch.equal(views[i].flatten(), value):
            return f"after {name} the layer does not have what self.whole makes of the file's record {i}"
        if layers.most != most:
            return f"up to {most} bytes of layers have been in memory at once, but self.most is {layers.most}"
    return None if read == [2, 0, 1, 2] else "load should read its layer's record once, and no other"


@exercise
def drop_and_load(drop: Function, load: Function) -> None:
    """Judge how a layer's memory is freed, and filled again from its file.

    Args:
        drop: Gets the layers and a layer's number.
        load: Gets the same. Calls fetch.
    """
    alone(_life, drop=drop, load=load)


def _on_gradient(answer: Function) -> str | None:
    dropped = list[int]()
    own = [[torch.nn.Parameter(random(i, *shape)) for i, shape in enumerate(SHAPES)] for _ in range(2)]
    # Half of the gradient, doubled, so that it shows whether the place where ranks divide it was used.
    layers = SimpleNamespace(parameters=own, gradients={}, drop=dropped.append, mine=lambda gradient: 2 * gradient[::2])
    for turn, i in enumerate((1, 0, 1)):
        gradients = [random(30 * turn + number, *shape) for number, shape in enumerate(SHAPES)]
        dropped.clear()
        layers.gradients.clear()
        for count, missing in enumerate((2, 0, 1), 1):
            own[i][missing].grad = gradients[missing].clone()
            if count < len(SHAPES):
                answer(layers, i)
                if dropped or layers.gradients:
                    return f"{count} of {len(SHAPES)} gradients have come, and the layer is treated as complete"
        answer(layers, i)
        if dropped != [i]:
            return f"when the last gradient has come, self.drop should be called once with {i}; it got {dropped}"
        if any(parameter.grad is not None for parameter in own[i]):
            return "a parameter still has its gradient, on the device"
        found, whole = layers.gradients.get(i), torch.cat([gradient.flatten() for gradient in gradients])
        if not isinstance(found, torch.Tensor) or not torch.equal(found, 2 * whole[::2]):
            return f"self.gradients[{i}] should be what self.mine makes of the layer's gradients, one behind the other"
    return None


@exercise
def on_gradient(answer: Function) -> None:
    """Judge what happens when a parameter's gradient has come.

    Args:
        answer: Takes the layers and a layer's number.
    """
    alone(_on_gradient, answer=answer)


def _sharded(answer: Any, sizes: Sequence[int]) -> str | None:
    rank, n = dist.get_rank(), dist.get_world_size()
    for size in sizes:
        layers, value = object.__new__(answer), random(size, size)
        layers.flat = [value.clone()]
        padded = torch.cat([value, torch.zeros(-size % n)])
        part = layers.own(value.clone())
        fault = None
        if part.shape != padded.chunk(n)[rank].shape or not torch.equal(part, padded.chunk(n)[rank]):
            fault = f"own should return part {rank} of {n} of {size} elements, filled up with zeros"
        if found := agree(fault):
            return found
        with count_traffic() as gathered:
            whole = layers.whole(padded.chunk(n)[rank].clone())
        every = [random(40 * r + size, size) for r in range(n)]
        mean = torch.cat([torch.stack(every).mean(0), torch.zeros(-size % n)]).chunk(n)[rank]
        with count_traffic() as reduced:
            mine = layers.mine(every[rank].clone())
        most = 4 * (n - 1) * len(part)
        if whole.shape != value.shape or not torch.equal(whole, value):
            fault = f"whole should return all {size} elements of the layer, without padding"
        elif mine.shape != mean.shape or not float((mine - mean).abs().max()) < 1e-4:
            fault = f"mine should return this rank's part, {len(mean)} elements, of the gradients' mean over ranks"
        elif max(gathered.sent, reduced.sent) > most:
            fault = (
                f"whole sent {gathered.sent:.0f} bytes and mine {reduced.sent:.0f}, where {most} are enough for each"
            )
        if found := agree(fault):
            return found
    return None


@exercise
def sharded(answer: type) -> None:
    """Judge how ranks divide a layer among their files.

    Args:
        answer: The class, with own, whole and mine.
    """
    for n, sizes in zip(WORLDS, ((6, 5), (7, 9), (1, 10)), strict=True):
        without_fault(_sharded, n, answer=answer, sizes=sizes)


class _Tiles:
    """Tiles of a weight [out, in], which count those in memory when the next one is read."""

    def __init__(self, weight: torch.Tensor, count: int) -> None:
        self.parts = weight.chunk(count)
        self.shapes = [part.shape for part in self.parts]
        self.gradients: dict[int, torch.Tensor] = {}
        self.reads, self.given, self.most = list[int](), list[weakref.ref[torch.Tensor]](), 0

    def read(self, i: int) -> torch.Tensor:
        """Return a tile."""
        tile = self.parts[i].clone()
        self.most = max(self.most, 1 + sum(given() is not None for given in self.given))
        self.reads.append(i)
        self.given.append(weakref.ref(tile))
        return tile


def _tiled(answer: Any, cases: Sequence[tuple[int, int, int]]) -> str | None:
    for out, width, count in cases:
        weight, x = random(out, out, width) / 50, (random(width, 6, width) / 50).requires_grad_()
        tiles, upstream = _Tiles(weight, count), random(9, 6, out) / 50
        name = f"for a weight of {out} x {width} in {len(tiles.shapes)} tiles"
        found = answer.apply(x, tiles)
        if found.shape != (6, out) or not torch.allclose(found, x @ weight.T, atol=1e-4):
            return f"{name}, what forward returns is not x @ W.T"
        found.backward(upstream)
        if x.grad is None or not torch.allclose(x.grad, upstream @ weight, atol=1e-4):
            return f"{name}, the gradient of x is not right"
        expected = (upstream.T @ x.detach()).chunk(count)
        if sorted(tiles.gradients) != list(range(len(expected))):
            return f"{name}, tiles.gradients has the keys {sorted(tiles.gradients)}"
        for i, gradient in enumerate(expected):
            right = tiles.gradients[i].shape == gradient.shape
            if not right or not torch.allclose(tiles.gradients[i], gradient, atol=1e-4):
                return f"{name}, tiles.gradients[{i}] is not the gradient of that tile"
        if tiles.most > 2:  # one in use while the next is read
            return f"{name}, up to {tiles.most} tiles are in memory at once: a tile is needed for one product only"
        if len(tiles.reads) != 2 * len(expected):
            return f"{name}, tiles were read {len(tiles.reads)} times: each is needed once forward and once backward"
    return None


@exercise
def tiled(answer: type) -> None:
    """Judge a linear operation that has one tile of its weight in memory at a time.

    Args:
        answer: The autograd function of x and the tiles.
    """
    alone(_tiled, answer=answer, cases=((12, 5, 4), (7, 3, 3), (9, 8, 9)))
