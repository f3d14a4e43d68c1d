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
        """Add what was left undone to the ``grad`` of the weights and biases, and let go of what it was kept for.

        Through autograd, so that hooks on a parameter (tensor parallelism's sums) see these gradients as any other.
        """
        for weight, bias, x, gradient in self._undone:
            x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
            if weight.requires_grad:
                weight.backward(gradient.T @ x)
            if bias is not None and bias.requires_grad:
                bias.backward(gradient.sum(0))
        self._undone.clear()


class _Linear(torch.autograd.Function):
    """x W' + b that gives only x a gradient, and notes what the others' would be made of."""

    @staticmethod
    def forward(ctx: Any, undone: list, x: Tensor, parameters: tuple[Tensor, Tensor | None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.undone, ctx.parameters = undone, parameters
        return functional.linear(x, *parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.undone.append((*ctx.parameters, x, gradient))
        return None, gradient @ ctx.parameters[0], None


def _linear(undone: list, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not input.requires_grad:
        input = input.detach().requires_grad_()  # or there would be no backward that could note anything
    # The parameters in a tuple, which autograd does not look into: their hooks must not see that they get nothing now.
    return _Linear.apply(undone, input, (weight, bias))
