"""Inputs that the author of an answer has not seen."""

import torch


def random(seed: int, *shape: int) -> torch.Tensor:
    """Return small whole numbers in fp32: their sums are exact in any order.

    Args:
        seed: Decides the numbers.
        shape: Of the tensor.

    Returns:
        Numbers from -50 to 49.
    """
    return torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(seed)).float()
