"""Attention for packs: sequences one after another that do not see each other.

FlashAttention's kernel for sequences of different lengths (PyTorch's ``varlen_attn``) computes only the blocks on the
diagonal of the attention matrix, so a pack costs what its rows would cost alone. If the kernel cannot run (on a CPU, or
in 32 bit), transformers builds the whole mask from the position ids, which restart at 0 with every row.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

IMPLEMENTATION = "packed"
# ChatGLM3's query heads share the keys of a group. Torch before 2.12 has no such switch, and does not need it.
_SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the kernel can run: in 16 bit, on a GPU of compute capability 8 (Ampere) or later."""
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
    """Attend causally within each row of each pack, with the interface of transformers' attention implementations.

    Args:
        module: The attention layer; unused.
        query: [packs, heads, tokens, width].
        key: [packs, groups, tokens, width].
        value: [packs, groups, tokens, width].
        attention_mask: Unused.
        cu_seqlens: Cumulative sequence lengths: where each row begins and the last one ends, in tokens from the start
            of the first pack, [rows + 1] int32. A row may be empty.
        max_seqlen: Tokens of the longest row.
        scaling: Factor of the attention scores; None is 1 / sqrt(width).
        **kwargs: What other implementations take; unused.

    Returns:
        The output, [packs, tokens, heads, width], and no attention weights.
    """
    packs, heads, tokens, width = query.shape
    # The kernel knows no packs: it takes all tokens in one dimension, [packs * tokens, heads, width].
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_q=cu_seqlens,
        cu_seq_k=cu_seqlens,
        max_q=max_seqlen,
        max_k=max_seqlen,
        window_size=(-1, 0),  # any number of tokens to the left, none to the right: causal
        scale=scaling,
        **_SHARED_KEYS,
    )
    return cast(Tensor, output).view(packs, tokens, heads, width), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
