"""3D parallelism: data, pipeline and tensor parallelism at once, each on one axis of a mesh of ranks (chapter 05)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import GlmForCausalLM

from helpers.errors import UserError
from helpers.memory.predict import ModelShape
from helpers.parallel.data import average_gradients
from helpers.parallel.pipeline import Executor, Table, cut, one_f_one_b, stages_of
from helpers.parallel.tensor import full_weights, parallelize
from helpers.parallel.tensor.loss import causal_loss

# From the outermost to the innermost: ranks that talk most are neighbours, so that they share a node and its fast link.
AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has. A rank's number is (pipeline x data + data) x tensor + tensor, of its places."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"Layout: {axis} is {getattr(self, axis)}; give a whole number above 0")

    @property
    def ranks(self) -> int:
        """All of them together."""
        return self.data * self.pipeline * self.tensor

    def stride(self, axis: str) -> int:
        """The distance of neighbours on ``axis``, in rank numbers."""
        return {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data}[axis]

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """The groups of ranks that talk to one another along ``axis``; every rank is in one of them."""
        stride, size = self.stride(axis), getattr(self, axis)
        firsts = [rank for rank in range(self.ranks) if rank // stride % size == 0]
        return [tuple(first + place * stride for place in range(size)) for first in firsts]

    def __str__(self) -> str:
        return f"data {self.data} x pipeline {self.pipeline} x tensor {self.tensor}"


def device_mesh(layout: Layout, device: torch.device | str) -> DeviceMesh:
    """All ranks as a mesh with the axes of ``layout``; raises :class:`UserError` where it is not for as many."""
    if layout.ranks != dist.get_world_size():
        raise UserError(
            f"{layout} needs {layout.ranks} ranks and there are {dist.get_world_size()}: change one of them"
        )
    sizes = tuple(getattr(layout, axis) for axis in AXES)
    return init_device_mesh(torch.device(device).type, sizes, mesh_dim_names=AXES)


class Parallel3D:
    """This rank's part of ``model``: a tensor parallel part of the stages that the mesh gives it.

        parallel = Parallel3D(build(shape, device), shape, device_mesh(layout, device), micro_batches=4, length=64)
        optimizer = torch.optim.AdamW(parallel.parameters())
        loss = parallel.step(ids, labels)
        optimizer.step()

    All ranks give the same weights, and in ``step`` the same rows of ``length`` tokens. ``schedule`` makes the table of
    actions for (ranks of the pipeline, micro-batches).
    """

    def __init__(
        self,
        model: GlmForCausalLM,
        shape: ModelShape,
        mesh: DeviceMesh,
        micro_batches: int,
        length: int,
        schedule: Callable[[int, int], Table] = one_f_one_b,
    ) -> None:
        self._data, self._pipeline, self._tensor = (mesh.get_group(axis) for axis in ("data", "pipeline", "tensor"))
        parallelize(model, self._tensor)
        table = schedule(dist.get_world_size(self._pipeline), micro_batches)
        mine = {action.stage for action in table[dist.get_rank(self._pipeline)]}
        layers = cut(shape, 1 + max(action.stage for row in table for action in row), length)
        self.stages = stages_of(model, layers, mine)
        self._executor = Executor(
            table,
            self.stages,
            self._pipeline,
            loss=lambda logits, labels: causal_loss(logits, labels, self._tensor),
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of this rank."""
        for stage in self.stages.values():
            yield from stage.parameters()

    def step(self, ids: Tensor, labels: Tensor) -> float | None:
        """Forward and backward of ``ids`` and ``labels`` [rows, length]: in each ``grad``, that of the mean loss.

        The loss is returned where the last stage is, None elsewhere. Raises :class:`UserError` where the rows do not
        divide by data ranks and micro-batches.
        """
        n, place = dist.get_world_size(self._data), dist.get_rank(self._data)
        if len(ids) % n:
            raise UserError(f"{len(ids)} rows do not divide by {n} data parallel ranks; change one of the two")
        loss = self._executor.step(ids.chunk(n)[place], labels.chunk(n)[place]).loss
        average_gradients(self.parameters(), self._data)
        if loss is None:
            return None
        mean = torch.tensor(loss / n, dtype=torch.float64).to(ids.device)
        dist.all_reduce(mean, group=self._data)
        return mean.item()

    def full_weights(self) -> dict[str, Tensor]:
        """Copies of the whole parameters of this rank's stages on the CPU, by name; all tensor ranks call it."""
        return {
            name: weight for stage in self.stages.values() for name, weight in full_weights(stage, self._tensor).items()
        }
