"""The backward pass in two halves: the gradient of the input now, the gradients of the weights when there is time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class defer_weight_gradients(TorchFunctionMode):
    """Linear layers that run in the block leave the gradients of weight and bias undone in backward.

    with defer_weight_gradients() as deferred:
        y = stage(x)
    y.backward(gradient)  # x.grad is there, and the gradients of norms and embedding
    deferred.finish()     # now those of the matrices, too

    The matrices are nearly all of the work: what else a stage trains are vectors and the embedding's rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._undone: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and torch.is_grad_enabled():
            return _linear(self._undone, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def finish(self) -> None:
        """Add what was left undone to the ``grad`` of the weights and biases, and let go of what it was kept for."""
        with torch.no_grad():
            for weight, bias, x, gradient in self._undone:
                x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
                if weight.requires_grad:
                    _add(weight, gradient.T @ x)
                if bias is not None and bias.requires_grad:
                    _add(bias, gradient.sum(0))
        self._undone.clear()


class _Linear(torch.autograd.Function):
    """x W' + b that gives only x a gradient, and notes what the others' would be made of."""

    @staticmethod
    def forward(ctx: Any, undone: list, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.undone, ctx.weight, ctx.bias = undone, weight, bias
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.undone.append((ctx.weight, ctx.bias, x, gradient))
        return None, gradient @ ctx.weight if ctx.needs_input_grad[1] else None, None, None


def _linear(undone: list, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(undone, input, weight, bias)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
