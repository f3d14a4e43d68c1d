"""Three ways to write a matrix with 8 or 4 bits a weight, as plain arithmetic on tensors.

* int8, one scale a row: LLM.int8() (Dettmers 2022a), what bitsandbytes does at 8 bits;
* int4, one scale a row: what ChatGLM's own ``quantization_bit 4`` and ``model.quantize(4)`` did;
* NF4, one scale for each block of 64 weights: QLoRA (Dettmers 2023), what bitsandbytes does at 4 bits.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 64
# The share of a normal distribution that the outermost level stands for; the mean of 1 - 1/30 and 1 - 1/32 (QLoRA).
OUTERMOST = 0.9677083


@dataclass(frozen=True)
class Quantized:
    """``codes`` number the ``levels`` [at most 256]; ``scales`` has one number for each group of equally many weights.

    ``shape`` is the matrix's. A group is a row, or a block of weights that follow each other across rows.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    shape: torch.Size

    def dequantize(self) -> Tensor:
        """The matrix in fp32, each weight its level times its group's scale."""
        values = self.levels[self.codes.long()].view(len(self.scales), -1) * self.scales[:, None]
        return values.view(self.shape)


@cache
def nf4_levels() -> Tensor:
    """The 16 levels [-1, 1] of NF4, fp32: quantiles of a normal distribution, 8 below zero, zero itself, 8 above.

    Half of the distribution has eight levels below zero, the other half eight above it, so the steps differ a little
    (QLoRA, section 3). Zero is a level of its own because padding and pruned weights must stay zero.
    """
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:-1].double())
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.abs().max()).float()


def _symmetric_rows(weight: Tensor, largest: int) -> Quantized:
    scales = weight.float().abs().amax(dim=1) / largest
    # A row of zeros keeps a scale of 0; whole numbers need something to divide by.
    whole = torch.round(weight.float() / torch.where(scales == 0, 1, scales)[:, None])
    levels = torch.arange(-largest, largest + 1, dtype=torch.float32, device=weight.device)
    return Quantized((whole + largest).to(torch.uint8), scales, levels, weight.shape)


def int8_rows(weight: Tensor) -> Quantized:
    """Whole numbers from -127 to 127, and a scale for each row of ``weight`` [rows, columns]."""
    return _symmetric_rows(weight, 127)


def int4_rows(weight: Tensor) -> Quantized:
    """Whole numbers from -7 to 7, and a scale for each row of ``weight`` [rows, columns]: ChatGLM's own 4 bits."""
    return _symmetric_rows(weight, 7)


def nf4(weight: Tensor, block: int = BLOCK) -> Quantized:
    """NF4 with a scale for each ``block`` weights. Raises ``ValueError`` where they do not divide evenly."""
    if weight.numel() % block:
        raise ValueError(f"{weight.numel():,} weights do not divide into blocks of {block}")
    blocks = weight.float().reshape(-1, block)
    scales = blocks.abs().amax(dim=1)
    levels = nf4_levels().to(weight.device)
    # A weight between two levels takes the nearer one: the middles are the borders.
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(scales == 0, 1, scales)[:, None], middles)
    return Quantized(codes.to(torch.uint8).view(weight.shape), scales, levels, weight.shape)


def error(weight: Tensor, quantized: Tensor) -> float:
    """Root mean square of the difference by the root mean square of ``weight``."""
    return ((quantized.float() - weight.float()).norm() / weight.float().norm()).item()
