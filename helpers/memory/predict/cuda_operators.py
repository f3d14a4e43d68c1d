"""Let a model on fake tensors call the operators that it would call on CUDA."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import transformers.models.glm.modeling_glm as modeling_glm
from torch import Tensor


@contextlib.contextmanager
def cuda_operators() -> Iterator[None]:
    """Replace the functions that choose another operator without a GPU; restore them at the end."""
    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "dropout", fused_dropout),
        mock.patch.object(functional, "scaled_dot_product_attention", cuda_attention),
        # Under FakeTensorMode transformers would make a mask where there need be none.
        mock.patch.object(modeling_glm, "create_causal_mask", lambda attention_mask=None, **_: attention_mask),
    ):
        yield


def fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop elements as on CUDA, with a boolean mask. A CPU would keep a mask of ``x``'s own type."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the kernel that SDPA chooses on Hopper: cuDNN's with a mask, otherwise flash; in fp32 another one.

    See ``attention_kernel`` in saved_tensors.py.
    """
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else q.dtype
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if attn_mask is None and dtype == torch.float32:  # flash takes 16 bit only
            math = torch.ops.aten._scaled_dot_product_attention_math
            return math(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        length = q.shape[2]
        bias = torch.zeros(attn_mask.shape, dtype=dtype, device=q.device)
        bias = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
        bias = torch.nn.functional.pad(bias, (0, -length % 16))[..., :length].expand(*q.shape[:2], length, length)
        if dtype == torch.float32:  # which cuDNN does not take
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[0]
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        return cudnn(q, k, v, bias, True, 0.0, False, False, scale=scale)[0]
