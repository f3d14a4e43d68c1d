"""Keep only the input of SwiGLU for backward, and recompute the rest of it there."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.glm.modeling_glm import GlmMLP


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        for_gate, for_up = result.chunk(2, dim=-1)
        # The operations of autograd, so the results are equal bit for bit; written in place, to need no other memory.
        torch.mul(gradient, up, out=for_up)
        torch.ops.aten.silu_backward.grad_input(for_up, gate, grad_input=for_gate)
        torch.ops.aten.silu.out(gate, out=for_up)
        for_up.mul_(gradient)
        return result


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute SiLU(gate) * up (Shazeer 2020), and save only ``gate_up`` for backward.

    Autograd would save SiLU(gate) as well, a third of what the MLP keeps. Recomputing it reads the gate once more.

    Args:
        gate_up: Gate in the first half of the last dimension, up in the second [..., 2 * width].

    Returns:
        SiLU(gate) * up [..., width].
    """
    return _SwiGLU.apply(gate_up)


class RecomputingMLP(GlmMLP):
    """The MLP of ChatGLM3 with :func:`swiglu`. A model's MLPs become such ones by assignment to their ``__class__``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(hidden_states)))
