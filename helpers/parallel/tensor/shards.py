"""Which part of a parameter each rank holds: pure functions of tensors and numbers, no communication."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import GlmConfig

from helpers.errors import UserError


@dataclass(frozen=True)
class Cut:
    """A tensor divided along ``dim``.

    ``fused`` tensors lie behind one another along it, and each of them is divided: of the gated MLP's gate and up a
    rank needs its part of both. ``copies`` neighbouring ranks hold the same part: keys and values, where there are
    more ranks than groups.
    """

    dim: int
    fused: int = 1
    copies: int = 1

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """Rank ``rank``'s part of ``whole``, in memory of its own."""
        place, places = rank // self.copies, ranks // self.copies
        pieces = [one.chunk(places, self.dim)[place] for one in whole.chunk(self.fused, self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks, in their order."""
        pieces = [part.chunk(self.fused, self.dim) for part in parts[:: self.copies]]
        return torch.cat([piece[one] for one in range(self.fused) for piece in pieces], self.dim)


def cuts(config: GlmConfig, ranks: int) -> Mapping[str, Cut]:
    """The cut of each divided parameter, by the last two parts of its name ("q_proj.weight"); all others stay whole.

    A weight is [output, input]: column parallel matrices are cut along dim 0, row parallel ones along dim 1. The
    names come from the paper, which multiplies from the left.

    Raises :class:`UserError` where the network cannot be divided evenly among so many ranks.
    """
    groups = config.num_key_value_heads
    for name, size in (
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ):
        if size % ranks:
            raise UserError(f"{name} is {size} and cannot be divided by {ranks} ranks: take a divisor of it")
    if groups % ranks and ranks % groups:
        raise UserError(
            f"num_key_value_heads is {groups}: take a number of ranks that divides it or is a multiple, not {ranks}"
        )
    if config.tie_word_embeddings:
        raise UserError("tie_word_embeddings is set: build the network with an output layer of its own")
    column = Cut(0)
    key_value = Cut(0, copies=max(1, ranks // groups))
    return MappingProxyType(
        {
            "embed_tokens.weight": column,
            "q_proj.weight": column,
            "q_proj.bias": column,
            "k_proj.weight": key_value,
            "k_proj.bias": key_value,
            "v_proj.weight": key_value,
            "v_proj.bias": key_value,
            "o_proj.weight": Cut(1),
            "gate_up_proj.weight": Cut(0, fused=2),
            "down_proj.weight": Cut(1),
            "lm_head.weight": column,
        }
    )


def suffix(name: str) -> str:
    """The last two parts of a parameter's name: what :func:`cuts` knows it by."""
    return ".".join(name.split(".")[-2:])
