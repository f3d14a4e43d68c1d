"""Attention for packs: rows one after another in one sequence, which do not see each other.

FlashAttention's kernel for rows of different lengths (PyTorch's ``varlen_attn``) computes the blocks of the
block-diagonal matrix and no others, so a pack costs what its rows would cost alone. Where it does not run (a CPU, 32
bit), transformers builds the whole mask from the position ids, which begin at 0 in every row.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

IMPLEMENTATION = "packed"
# torch before 2.12 has no such switch, and lets a group of heads share keys without it.
_SHARED_KEYS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there: 16-bit numbers on a GPU of compute capability 8 (Ampere) or later."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside of each row, called as transformers calls an attention implementation.

    ``query`` [packs, heads, tokens, width]; ``key`` and ``value`` [packs, groups, tokens, width]. ``cu_seqlens`` [rows
    + 1] int32: where rows begin, and the last one ends, in tokens from the beginning of the first pack; a row may be
    empty. No row has more than ``max_seqlen`` tokens. Returns [packs, tokens, heads, width].
    """
    packs, heads, tokens, width = query.shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    causal = {"window_size": (-1, 0), "scale": scaling}
    found = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **causal, **_SHARED_KEYS)
    return found.view(packs, tokens, heads, width), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
