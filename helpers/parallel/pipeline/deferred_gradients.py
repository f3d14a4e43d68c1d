"""Split a backward pass in two: the gradient of the input now, the gradients of the weights later.

Zero-bubble schedules need this (Qi et al. 2023): the previous stage waits only for the gradient of the input, so the
gradients of the weights can fill the time in which a rank would be idle.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Deferred(NamedTuple):
    """What the weight gradient of one linear layer is made of."""

    weight: Tensor  # [output, input]
    bias: Tensor | None  # [output]
    x: Tensor  # [..., input]
    gradient: Tensor  # [..., output], with respect to the layer's output


class defer_weight_gradients(TorchFunctionMode):
    """Defer the weight and bias gradients of every linear layer that runs inside the block.

        with defer_weight_gradients() as deferred:
            y = stage(x)
        y.backward(gradient)        # I: x.grad, and the gradients of norms and embedding
        deferred.backward_weight()  # W: the gradients of all matrices

    Only linear layers are split, because they do nearly all of the work. What else a stage trains, norms and embedding,
    gets its gradient in the first half.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferred: list[_Deferred] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace ``functional.linear``; run every other torch function as it is."""
        if func is functional.linear and torch.is_grad_enabled():
            return _linear(self._deferred, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def backward_weight(self) -> None:
        """Add the deferred gradients to ``grad`` of weights and biases, and free the tensors kept for them.

        The gradients go through autograd, so hooks on a parameter run as usual. Tensor parallelism needs that: its
        hooks sum gradients over ranks.
        """
        for weight, bias, x, gradient in self._deferred:
            x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)  # [tokens, input], [tokens, output]
            if weight.requires_grad:
                weight.backward(gradient.T @ x)  # [output, input]
            if bias is not None and bias.requires_grad:
                bias.backward(gradient.sum(0))
        self._deferred.clear()


class _InputGradientLinear(torch.autograd.Function):
    """Compute ``x @ weight.T + bias``; backward returns the input's gradient and records what the weight's needs."""

    @staticmethod
    def forward(ctx: Any, deferred: list[_Deferred], x: Tensor, parameters: tuple[Tensor, Tensor | None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.deferred, ctx.parameters = deferred, parameters
        return functional.linear(x, *parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        weight, bias = ctx.parameters
        ctx.deferred.append(_Deferred(weight, bias, x, gradient))
        return None, gradient @ weight, None  # [..., output] @ [output, input]


def _linear(deferred: list[_Deferred], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not input.requires_grad:
        # Without an input that requires a gradient autograd would skip the backward that records the layer.
        input = input.detach().requires_grad_()
    # Autograd does not look into a tuple, so it does not see the parameters and does not run their hooks too early.
    return _InputGradientLinear.apply(deferred, input, (weight, bias))
