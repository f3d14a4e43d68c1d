"""Judge an operation of autograd: what it returns forward and backward, and what it sends for that."""

from collections.abc import Callable
from typing import Any

import torch

from helpers.exercises.answers import NotYet
from helpers.parallel.traffic import count_traffic


def both_passes(operation: Callable[..., Any], x: torch.Tensor, upstream: torch.Tensor) -> dict[str, Any]:
    """Run an operation forward and backward in a rank.

    Args:
        operation: The answer's.
        x: Its input.
        upstream: The gradient of its output.

    Returns:
        The output, the gradient of x, whether x is unchanged, and the bytes sent in each direction; or the output's
        shape, if that is not the gradient's.
    """
    leaf = x.clone().requires_grad_()
    with count_traffic() as there:
        output = operation(leaf)
    if output.shape != upstream.shape:
        return {"shape": list(output.shape)}
    with count_traffic() as back:
        output.backward(upstream)
    return {
        "output": output.detach(),
        "gradient": leaf.grad,
        "unchanged": torch.equal(leaf.detach(), x),
        "sent": (there.sent, back.sent),
    }


def check_passes(
    where: str, name: str, found: dict[str, Any], expected: tuple[torch.Tensor, torch.Tensor], most: tuple[float, float]
) -> None:
    """Compare both passes with what they should be.

    Args:
        where: Begins the sentence.
        name: Of the operation.
        found: By :func:`both_passes`.
        expected: The output, and the gradient of the input.
        most: Bytes that are enough, forward and backward.

    Raises:
        NotYet: Something differs.
    """
    output, gradient = expected
    if "shape" in found:
        raise NotYet(f"{where}, {name} returns the shape {found['shape']}, not {list(output.shape)}")
    if not torch.allclose(found["output"], output, atol=1e-4):
        raise NotYet(f"{where}, what {name} returns forward is not right")
    if not found["unchanged"]:
        raise NotYet(f"{where}, {name} changes the tensor that it gets; others may hold it")
    if found["gradient"] is None or not torch.allclose(found["gradient"], gradient, atol=1e-4):
        raise NotYet(f"{where}, the gradient that {name} returns backward is not right")
    for direction, sent, limit in zip(("forward", "backward"), found["sent"], most, strict=True):
        if sent > limit + 1:
            raise NotYet(f"{where}, {name} is right but sends {sent} bytes {direction}; {limit:.0f} are enough")
