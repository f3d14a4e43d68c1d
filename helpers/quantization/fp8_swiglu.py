"""An MLP with frozen matrices in fp8: SiLU, the product with it, and rounding are one pass over a row.

The compiler rounds a row in two passes over it, one for its largest magnitude and one to divide by it. Here a GPU holds
the row in registers in between (``fp8_swiglu_kernels``): it reads each number once, and writes only codes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.glm.modeling_glm import GlmMLP

from helpers.quantization.fp8 import Fp8Linear, multiply, multiply_back, round_gradient, round_rows

if torch.version.cuda:
    from helpers.quantization import fp8_swiglu_kernels as kernels


def round_swiglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute SiLU(gate) * up (Shazeer 2020) in fp32, and round its rows to e4m3.

    Args:
        gate_up: Gate in the first half of each row, up in the second, in any floating-point type [rows, 2 * width].

    Returns:
        Codes [rows, width] and scales [rows, 1], as :func:`helpers.quantization.fp8.round_rows` makes them.
    """
    if gate_up.is_cuda:
        return kernels.round_swiglu(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return round_rows(silu(gate) * up)


def round_swiglu_gradient(gradient: Tensor, gate_up: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of ``gate_up`` in fp32, multiply in its matrix's scales, and round its rows to e4m3.

    Args:
        gradient: Of SiLU(gate) * up [rows, width].
        gate_up: Gate and up [rows, 2 * width].
        scales: Of the rows of the matrix that made ``gate_up``, in fp32 [2 * width, 1].

    Returns:
        Codes [rows, 2 * width] and scales [rows, 1].
    """
    if gradient.is_cuda:
        return kernels.round_swiglu_gradient(gradient, gate_up, scales)
    gradient = gradient.float()
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    for_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    for_up = gradient * gate * sigmoid
    return round_rows(torch.cat([for_gate, for_up], dim=-1) * scales.t())


class _Mlp(torch.autograd.Function):
    """Both matmuls with SiLU in between. Only ``gate_up`` is kept for backward, as without fp8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        transposed: Tensor | None,
        down_codes: Tensor,
        down_scales: Tensor,
        down_transposed: Tensor | None,
    ) -> Tensor:
        gate_up = multiply(*round_rows(x.flatten(0, -2)), codes, scales, x.dtype)
        ctx.is_transposed = transposed is not None
        matrices = (codes, down_codes) if transposed is None else (transposed, down_transposed)
        ctx.save_for_backward(gate_up, scales, down_scales, *matrices)
        output = multiply(*round_swiglu(gate_up), down_codes, down_scales, x.dtype)
        return output.view(*x.shape[:-1], down_codes.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, scales, down_scales, matrix, down_matrix = ctx.saved_tensors
        rounded = round_gradient(gradient.flatten(0, -2), down_scales)
        inner = multiply_back(*rounded, down_matrix, ctx.is_transposed, gradient.dtype)
        rounded = round_swiglu_gradient(inner, gate_up, scales)
        product = multiply_back(*rounded, matrix, ctx.is_transposed, gradient.dtype)
        return product.view(*gradient.shape[:-1], product.shape[1]), *[None] * 6


class Fp8MLP(GlmMLP):
    """The MLP of ChatGLM3, both of whose matrices are an :class:`Fp8Linear` without an adapter and without a bias."""

    gate_up_proj: Fp8Linear
    down_proj: Fp8Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        first, last = self.gate_up_proj, self.down_proj
        return _Mlp.apply(
            hidden_states, first.codes, first.scales, first.transposed, last.codes, last.scales, last.transposed
        )


def fuse_mlp(mlp: nn.Module) -> None:
    """Let an MLP with frozen matrices in fp8 round in one pass; any other is left as it is.

    Args:
        mlp: Of a layer of ChatGLM3; becomes a :class:`Fp8MLP` in place.
    """
    matrices = [mlp.gate_up_proj, mlp.down_proj]
    if all(type(matrix) is Fp8Linear and matrix.bias is None for matrix in matrices):
        mlp.__class__ = Fp8MLP
