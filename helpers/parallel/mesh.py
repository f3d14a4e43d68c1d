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
from helpers.parallel.pipeline import Executor, Schedule, build_stages, one_f_one_b, partition_layers
from helpers.parallel.tensor import full_weights, parallelize, vocab_parallel_causal_lm_loss

# From the outermost to the innermost axis. Ranks that talk most (tensor) are neighbours, so that they share a node and
# its fast link.
AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Layout:
    """Size of each axis of the mesh.

    Ranks are numbered row by row: rank = (p * data + d) * tensor + t, for a rank's coordinates p, d, t on the axes
    pipeline, data and tensor.

    Attributes:
        data: Replicas, each with its share of the rows.
        pipeline: Ranks that share the layers.
        tensor: Ranks that share each matrix.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"Layout: {axis} is {getattr(self, axis)}; give a whole number above 0")

    @property
    def world_size(self) -> int:
        """Number of ranks in the whole mesh."""
        return self.data * self.pipeline * self.tensor

    def stride(self, axis: str) -> int:
        """Return the distance of neighbours on an axis, in rank numbers.

        Args:
            axis: One of ``AXES``.

        Returns:
            1 for neighbouring ranks.
        """
        return {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data}[axis]

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """List the groups of ranks that communicate along an axis; every rank is in exactly one.

        Args:
            axis: One of ``AXES``.

        Returns:
            The ranks of each group, in ascending order.
        """
        stride, size = self.stride(axis), getattr(self, axis)
        # The first rank of a group is the one with coordinate 0 on this axis.
        firsts = [rank for rank in range(self.world_size) if rank // stride % size == 0]
        return [tuple(first + coordinate * stride for coordinate in range(size)) for first in firsts]

    def __str__(self) -> str:
        return f"data {self.data} x pipeline {self.pipeline} x tensor {self.tensor}"


def device_mesh(layout: Layout, device: torch.device | str) -> DeviceMesh:
    """Arrange all ranks as a mesh with the axes of ``layout``.

    Args:
        layout: Size of each axis.
        device: The ranks' kind of device.

    Returns:
        torch's mesh, with a process group per axis.

    Raises:
        UserError: If the layout is for another number of ranks.
    """
    if layout.world_size != dist.get_world_size():
        raise UserError(
            f"{layout} needs {layout.world_size} ranks and there are {dist.get_world_size()}: change one of them"
        )
    sizes = tuple(getattr(layout, axis) for axis in AXES)
    return init_device_mesh(torch.device(device).type, sizes, mesh_dim_names=AXES)


class Parallel3D:
    """This rank's part of ``model``: tensor parallel shards of the pipeline stages that the mesh assigns to it.

        model = build(shape, device)
        parallel = Parallel3D(model, shape, device_mesh(layout, device), micro_batches=4, sequence_length=64)
        optimizer = torch.optim.AdamW(parallel.parameters())
        loss = parallel.step(ids, labels)
        optimizer.step()

    Args:
        model: The full model, with the same weights on all ranks; it is sharded in place.
        shape: Its shape.
        mesh: From :func:`device_mesh`.
        micro_batches: Micro-batches per step and data parallel rank.
        sequence_length: Tokens per row, which weigh attention against the head when layers are assigned to stages.
        schedule: Makes the pipeline's schedule from (pipeline ranks, micro-batches).
    """

    def __init__(
        self,
        model: GlmForCausalLM,
        shape: ModelShape,
        mesh: DeviceMesh,
        micro_batches: int,
        sequence_length: int,
        schedule: Callable[[int, int], Schedule] = one_f_one_b,
    ) -> None:
        self._data_group, self._tensor_group = mesh.get_group("data"), mesh.get_group("tensor")
        pipeline_group = mesh.get_group("pipeline")
        # The order matters: first every matrix is sharded, then this rank picks its layers of the thinner model.
        parallelize(model, self._tensor_group)
        actions = schedule(dist.get_world_size(pipeline_group), micro_batches)
        own_stages = {action.stage for action in actions[dist.get_rank(pipeline_group)]}
        layers = partition_layers(shape, 1 + max(action.stage for row in actions for action in row), sequence_length)
        self.stages = build_stages(model, layers, own_stages)
        self._executor = Executor(
            actions,
            self.stages,
            pipeline_group,
            loss=lambda logits, labels: vocab_parallel_causal_lm_loss(logits, labels, self._tensor_group),
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that this rank holds.

        Returns:
            Shards [rows / tensor ranks, columns] or [rows, columns / tensor ranks] of matrices; norms unsharded.
        """
        for stage in self.stages.values():
            yield from stage.parameters()

    def step(self, ids: Tensor, labels: Tensor) -> float | None:
        """Run forward and backward; afterwards each ``grad`` is the gradient of the mean loss over all rows.

        Args:
            ids: Token ids [rows, sequence_length], the same on all ranks.
            labels: Labels [rows, sequence_length], the same on all ranks.

        Returns:
            The mean loss on ranks with the last stage, else None.

        Raises:
            UserError: If rows do not divide by data parallel ranks and micro-batches.
        """
        world_size, rank = dist.get_world_size(self._data_group), dist.get_rank(self._data_group)
        if len(ids) % world_size:
            raise UserError(f"{len(ids)} rows do not divide by {world_size} data parallel ranks; change one of the two")
        # [rows, sequence_length] -> [rows / data ranks, sequence_length]: all ranks of a replica take the same rows.
        loss = self._executor.step(ids.chunk(world_size)[rank], labels.chunk(world_size)[rank]).loss
        average_gradients(self.parameters(), self._data_group)
        if loss is None:
            return None
        mean = torch.tensor(loss / world_size, dtype=torch.float64).to(ids.device)
        dist.all_reduce(mean, group=self._data_group)
        return mean.item()

    def full_weights(self) -> dict[str, Tensor]:
        """Gather copies of the full parameters of this rank's stages; all ranks of a tensor group must call it.

        Returns:
            Parameters by name, on the CPU.
        """
        return {
            name: weight
            for stage in self.stages.values()
            for name, weight in full_weights(stage, self._tensor_group).items()
        }
