"""Count the floating-point operations of matmuls, those of every attention kernel included."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATEN = torch.ops.aten
_KERNELS = tuple(
    f"_scaled_dot_product_{name}" for name in ("flash_attention", "efficient_attention", "cudnn_attention")
)
_CPU_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


def count_flops() -> FlopCounterMode:
    """Make a counter of the operations that run in a ``with`` block.

        with count_flops() as counter:
            model(**batch).loss.backward()
        counter.get_total_flops()

    It is torch's, with a formula of ours for attention. Torch's refuses keys with fewer heads than queries in some
    versions, and does not know the CPU's kernel. Like torch's, ours counts a causal mask as if there were none.

    Returns:
        The counter.
    """
    forward = {getattr(_ATEN, name): _attention for name in (*_KERNELS, _CPU_KERNEL)}
    backward = {getattr(_ATEN, f"{name}_backward"): _attention_backward for name in (*_KERNELS, _CPU_KERNEL)}
    return FlopCounterMode(display=False, custom_mapping=forward | backward)


def _attention(query: Sequence[int], key: Sequence[int], *others: Any, **options: Any) -> int:
    """Count two matmuls, scores and weighted values; shapes are [rows, heads, tokens, width of a head]."""
    rows, heads, queries, width = query
    return 2 * 2 * rows * heads * queries * key[2] * width


def _attention_backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], *others: Any, **options: Any
) -> int:
    """Count five matmuls: the scores once more, and the gradients of weights, values, queries and keys."""
    return _attention(query, key) * 5 // 2
