"""Define which shard of a parameter each rank holds: pure functions of tensors and numbers, without communication."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import GlmConfig

from helpers.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Shard a tensor along one dimension, as DTensor's ``Shard(dim)`` does, with the two extensions ChatGLM3 needs.

    Attributes:
        dim: The dimension to shard.
        fused: Number of matrices concatenated along ``dim``, each of which is sharded on its own. The gated MLP fuses
            gate and up, and a rank needs its part of both.
        copies: Number of neighbouring ranks that hold the same shard. Keys and values need this if there are more
            ranks than key-value heads.
    """

    dim: int
    fused: int = 1
    copies: int = 1

    def to_local(self, full: Tensor, rank: int, world_size: int) -> Tensor:
        """Return the shard of ``rank``, copied so that ``full`` can be freed."""
        shard, num_shards = rank // self.copies, world_size // self.copies
        pieces = [matrix.chunk(num_shards, self.dim)[shard] for matrix in full.chunk(self.fused, self.dim)]
        return torch.cat(pieces, self.dim)

    def full_tensor(self, local_tensors: Sequence[Tensor]) -> Tensor:
        """Join the shards of all ranks, given in the order of ranks."""
        distinct = local_tensors[:: self.copies]
        pieces = [local.chunk(self.fused, self.dim) for local in distinct]
        return torch.cat([piece[matrix] for matrix in range(self.fused) for piece in pieces], self.dim)


def shard_plan(config: GlmConfig, world_size: int) -> Mapping[str, Shard]:
    """Map each sharded parameter to its shard, by the last two parts of its name ("q_proj.weight").

    Parameters that are not in the plan are complete on every rank. A weight is [output, input], so column-parallel
    matrices are sharded along dim 0 and row-parallel ones along dim 1. The names come from the paper, which multiplies
    X A with A = weight.T (Shoeybi et al. 2019, section 3).

    Args:
        config: The model's configuration.
        world_size: Number of ranks that share the model.

    Returns:
        The plan.

    Raises:
        UserError: The model does not divide evenly among ``world_size`` ranks.
    """
    for name, size in (
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ):
        if size % world_size:
            raise UserError(f"{name} is {size} and does not divide by {world_size} ranks; use a divisor of {size}")
    key_value_heads = config.num_key_value_heads or config.num_attention_heads
    if key_value_heads % world_size and world_size % key_value_heads:
        raise UserError(
            f"num_key_value_heads is {key_value_heads} but there are {world_size} ranks; "
            f"use a divisor or a multiple of {key_value_heads}"
        )
    if config.tie_word_embeddings:
        raise UserError("tie_word_embeddings is set; build the model with a separate output layer")
    column_parallel, row_parallel = Shard(0), Shard(1)
    key_value = Shard(0, copies=max(1, world_size // key_value_heads))
    return MappingProxyType(
        {
            "embed_tokens.weight": column_parallel,
            "q_proj.weight": column_parallel,
            "q_proj.bias": column_parallel,
            "k_proj.weight": key_value,
            "k_proj.bias": key_value,
            "v_proj.weight": key_value,
            "v_proj.bias": key_value,
            "o_proj.weight": row_parallel,
            "gate_up_proj.weight": Shard(0, fused=2),
            "down_proj.weight": row_parallel,
            "lm_head.weight": column_parallel,
        }
    )


def plan_key(name: str) -> str:
    """Return the last two parts of a parameter's name: its key in :func:`shard_plan`."""
    return ".".join(name.split(".")[-2:])
