"""Three ways to store a matrix with 8 or 4 bits per weight, as plain arithmetic on tensors.

* int8 with one scale per row: LLM.int8() (Dettmers et al. 2022), which bitsandbytes uses for 8 bits;
* int4 with one scale per row: the format of ChatGLM's own ``quantization_bit 4`` and ``model.quantize(4)``;
* NF4 with one scale per block of 64 weights: QLoRA (Dettmers et al. 2023), which bitsandbytes uses for 4 bits.

All three are absmax quantisation: a scale maps the largest weight of its group to the largest codebook entry, and every
weight is replaced by the nearest entry.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK_SIZE = 64  # weights that share a scale in NF4
# The quantile of the outermost codebook entries: the mean of 1 - 1/30 and 1 - 1/32. At 1 they would be infinite.
OUTERMOST_QUANTILE = 0.9677083


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised matrix.

    Attributes:
        codes: Index into the codebook, per weight [rows, columns], uint8.
        scales: One per group of equally many consecutive weights, fp32 [groups]. A group is a row, or a block.
        codebook: The values that a weight can take before scaling, fp32, at most 256.
        shape: Of the matrix, (rows, columns).
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    shape: torch.Size

    def dequantize(self) -> Tensor:
        """Compute the matrix in fp32: each weight is its codebook entry times the scale of its group."""
        values = self.codebook[self.codes.long()].view(len(self.scales), -1) * self.scales[:, None]  # [groups, weights]
        return values.view(self.shape)


@cache
def nf4_codebook() -> Tensor:
    """Compute the 16 entries of NF4 in [-1, 1], fp32: quantiles of the normal distribution (QLoRA, section 3).

    Each entry then represents about as many weights, because trained weights are roughly normally distributed. Zero has
    an entry of its own, so that padding and pruned weights stay exactly zero. That leaves seven entries below zero and
    eight above it, so the steps of the two halves differ slightly.
    """
    above = torch.special.ndtri(torch.linspace(OUTERMOST_QUANTILE, 0.5, 9)[:-1].double())  # [8]
    below = -torch.special.ndtri(torch.linspace(OUTERMOST_QUANTILE, 0.5, 8)[:-1].double())  # [7]
    codebook = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (codebook / codebook.abs().max()).float()


def _quantize_rows(weight: Tensor, largest: int) -> QuantizedMatrix:
    scales = weight.float().abs().amax(dim=1) / largest  # [rows]
    # A row of zeros keeps the scale 0; divide it by 1 instead.
    integers = torch.round(weight.float() / torch.where(scales == 0, 1, scales)[:, None])
    codebook = torch.arange(-largest, largest + 1, dtype=torch.float32, device=weight.device)
    return QuantizedMatrix((integers + largest).to(torch.uint8), scales, codebook, weight.shape)


def int8_rows(weight: Tensor) -> QuantizedMatrix:
    """Quantise ``weight`` [rows, columns] to the integers -127 to 127, with a scale per row."""
    return _quantize_rows(weight, 127)


def int4_rows(weight: Tensor) -> QuantizedMatrix:
    """Quantise ``weight`` [rows, columns] to the integers -7 to 7, with a scale per row: ChatGLM's own 4 bits."""
    return _quantize_rows(weight, 7)


def nf4(weight: Tensor, block_size: int = BLOCK_SIZE) -> QuantizedMatrix:
    """Quantise ``weight`` [rows, columns] to NF4, with a scale per ``block_size`` consecutive weights.

    Raises:
        ValueError: The weights do not divide into blocks.
    """
    if weight.numel() % block_size:
        raise ValueError(f"{weight.numel():,} weights do not divide into blocks of {block_size}")
    blocks = weight.float().reshape(-1, block_size)  # [blocks, weights]
    scales = blocks.abs().amax(dim=1)
    codebook = nf4_codebook().to(weight.device)
    # Two neighbouring entries meet halfway: a weight below the midpoint goes to the lower one.
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(scales == 0, 1, scales)[:, None], midpoints)
    return QuantizedMatrix(codes.to(torch.uint8).view(weight.shape), scales, codebook, weight.shape)


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """Compute the norm of the difference, relative to the norm of ``weight``."""
    return ((quantized.float() - weight.float()).norm() / weight.float().norm()).item()
