"""Multiply matrices in fp8 that read the same input as one: q, k and v of an attention layer.

k and v of ChatGLM3 have 256 rows each. Alone, such a matmul leaves half of a GPU idle, and its backward pass reads and
writes a gradient of the whole input. Joined, the three are one matmul forward and one backward. The gradients of their
outputs are rounded together, with one scale per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.quantization.fp8 import E4M3, Fp8Linear, multiply_frozen


@dataclass
class _Joined:
    """The rows of all matrices one after another, and the outputs that wait for the next ones to be called.

    Attributes:
        codes: In uint8, with the bytes of e4m3 [rows of all, inputs].
        scale_bits: In int32, with the bytes of fp32 [rows of all, 1].
        rows: Of each matrix.
        outputs: Of the matrices after the first, in order, until they are called.
        transposed: The codes in e4m3 once more [inputs, rows of all], if backward does not transpose them.
    """

    codes: Tensor
    scale_bits: Tensor
    rows: list[int]
    outputs: tuple[Tensor, ...] = ()
    transposed: Tensor | None = None


class _First(Fp8Linear):
    joined: _Joined

    def forward(self, input: Tensor) -> Tensor:
        joined = self.joined
        scales = joined.scale_bits.view(torch.float32)
        product = multiply_frozen(input, joined.codes.view(E4M3), scales, joined.transposed)
        output, *others = product.split(joined.rows, dim=-1)
        joined.outputs = tuple(others)
        return self.with_bias(output)

    def keep_transposed(self) -> None:
        self.joined.transposed = self.joined.codes.view(E4M3).t().contiguous()


class _Next(Fp8Linear):
    joined: _Joined

    def forward(self, input: Tensor) -> Tensor:
        output, *others = self.joined.outputs
        assert output.shape[:-1] == input.shape[:-1], "matrices are called in another order than they were joined"
        self.joined.outputs = tuple(others)
        return self.with_bias(output)

    def keep_transposed(self) -> None:
        pass  # the first one keeps the codes of all


def join_products(layers: list[nn.Module]) -> None:
    """Let the first of ``layers`` multiply for all of them.

    Each keeps its parameters, under the same names, as rows of one tensor.

    Args:
        layers: Matrices that read the same input, in the order in which they are always called. If one of them is not
            in fp8, all stay as they are.
    """
    if not all(type(layer) is Fp8Linear for layer in layers):
        return
    matrices = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    rows = [matrix.out_features for matrix in matrices]
    joined = _Joined(
        torch.cat([matrix.weight.data for matrix in matrices]),
        torch.cat([matrix.scale_bits for matrix in matrices]),
        rows,
    )
    codes, scale_bits = joined.codes.split(rows), joined.scale_bits.split(rows)
    for place, (matrix, own_codes, own_bits) in enumerate(zip(matrices, codes, scale_bits, strict=True)):
        matrix.weight.data, matrix.scale_bits = own_codes, own_bits
        matrix.__class__ = _Next if place else _First
        matrix.joined = joined  # type: ignore[assignment]  # a plain object: neither a parameter nor a buffer
