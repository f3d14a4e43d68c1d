"""Frozen matrices in fp8 (e4m3), multiplied in fp8 in both directions, from one copy.

A number in e4m3 has a sign, 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022, "FP8 formats for deep
learning"): it reaches from 2^-9 to 448. So each row gets a scale that maps its largest magnitude to 448: a row of the
activations or the gradients when it is multiplied, a row of the weights (an output) once, while loading.

Forward: y = x Wᵀ, with W = diag(s) Q. The scales of x's rows belong to rows of y, those of W's rows to columns of y, so
the kernel multiplies them in after the sum. Backward: dx = dy W = (dy diag(s)) Q. Here s belongs to what is summed, so
it is multiplied into dy before dy's rows are rounded. The kernel reads both operands along the sum: the bytes of Q are
transposed for it each time, instead of keeping a second copy of them.

On a GPU, ``torch._scaled_mm`` multiplies. Elsewhere the same codes and scales are multiplied in fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# A row of zeros is not divided by 0, and no scale is a subnormal number, which GPUs may round to 0.
SMALLEST = 2.0**-100


def round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3, with a scale of its own.

    A value is off by at most 1/16 of itself (half a step of a 3-bit mantissa), or by 2^-10 scales if it is smaller than
    2^-6 scales (half a step of the subnormal numbers). A row with nan or infinity gets a scale that is not finite, so
    its outputs are nan, and those of other rows are not.

    Args:
        values: Any floating-point type [rows, columns].

    Returns:
        The codes in e4m3 [rows, columns], and the scales in fp32 [rows, 1]: a value is about its code times the scale.
    """
    largest = values.abs().amax(dim=1, keepdim=True).float()  # exact in every type, and 16 bits need less memory
    scales = largest.clamp(min=SMALLEST) / LARGEST
    return (values / scales).to(E4M3), scales  # the quotient is in fp32, as the scales are


def multiply(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a bᵀ, both rounded by rows.

    Args:
        a: In e4m3 [rows, inner].
        a_scales: In fp32 [rows, 1].
        b: In e4m3 [columns, inner].
        b_scales: In fp32 [columns, 1].
        dtype: Of the result. A GPU's kernel always rounds to bf16 first.

    Returns:
        a bᵀ [rows, columns].
    """
    if a.is_cuda:
        # Fast accumulation sums in the tensor cores, which keep about 14 bits (DeepSeek-AI 2024, "DeepSeek-V3 Technical
        # Report", section 3.3.2): less than the rounding to e4m3 costs.
        product = torch._scaled_mm(
            a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product.to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float().t() * a_scales * b_scales.t()).to(dtype)


def round_gradient(gradient: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply a matrix's scales into the gradient of its outputs, and round the rows, for :func:`multiply_back`.

    Args:
        gradient: Any floating-point type [rows, outputs].
        scales: Of the matrix's rows in fp32 [outputs, 1].

    Returns:
        Codes [rows, outputs] and scales [rows, 1].
    """
    return round_rows(gradient * scales.t())  # in fp32, as the scales are


def multiply_back(rows: Tensor, row_scales: Tensor, matrix: Tensor, is_transposed: bool, dtype: torch.dtype) -> Tensor:
    """Compute the gradient of a matmul's inputs from that of its outputs.

    Args:
        rows: Of the gradient, rounded by :func:`round_gradient` [rows, outputs].
        row_scales: Of these rows [rows, 1].
        matrix: Codes of the matrix [outputs, inputs], or transposed and contiguous [inputs, outputs].
        is_transposed: Which of the two; the first is transposed here, because a GPU's kernel reads it that way.
        dtype: Of the result.

    Returns:
        The gradient [rows, inputs].
    """
    transposed = matrix if is_transposed else matrix.t().contiguous()
    ones = torch.ones(transposed.shape[0], 1, device=row_scales.device, dtype=torch.float32)
    return multiply(rows, row_scales, transposed, ones, dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ for a frozen W. Backward needs W and no activation, so forward saves no new tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, transposed: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes if transposed is None else transposed, scales)
        ctx.is_transposed = transposed is not None
        product = multiply(*round_rows(x.flatten(0, -2)), codes, scales, x.dtype)
        return product.view(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        matrix, scales = ctx.saved_tensors
        rounded = round_gradient(gradient.flatten(0, -2), scales)
        product = multiply_back(*rounded, matrix, ctx.is_transposed, gradient.dtype)
        return product.view(*gradient.shape[:-1], product.shape[1]), None, None, None


def multiply_frozen(x: Tensor, codes: Tensor, scales: Tensor, transposed: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ in fp8, and in backward the gradient of x.

    Args:
        x: Any floating-point type [..., inputs].
        codes: Of W in e4m3 [outputs, inputs].
        scales: Of its rows in fp32 [outputs, 1].
        transposed: The codes once more, contiguous [inputs, outputs], for backward; None transposes them there.

    Returns:
        x Wᵀ [..., outputs], in the type of ``x``.
    """
    return _Product.apply(x, codes, scales, transposed)


class Fp8Linear(nn.Linear):
    """A frozen ``nn.Linear`` with its weight in e4m3 and a scale per output; the bias keeps its type.

    PEFT treats it as an ``nn.Linear``, and puts LoRA on top. Codes and scales are parameters and buffers of
    integer types, with the bytes of e4m3 and of fp32: libraries that cast a module to another type (DeepSpeed, the
    ``half`` of PyTorch) leave integers as they are, and collectives of every backend can send them.

    Args:
        in_features: Columns of the weight; on a GPU, they and the rows must be multiples of 16.
        out_features: Rows of the weight.
        bias: Whether there is one.
        device: Where to make it.
        dtype: Of the bias.
    """

    scale_bits: Tensor
    transposed: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        codes = torch.zeros(out_features, in_features, device=device, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale_bits", torch.zeros(out_features, 1, device=device, dtype=torch.int32))

    @classmethod
    def rounded(cls, linear: nn.Linear) -> "Fp8Linear":
        """Round the weight of a layer.

        Args:
            linear: The layer; its bias is shared.

        Returns:
            The layer in fp8, on the same device.
        """
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        codes, layer.scale_bits = stored_rows(linear.weight.data)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        return layer

    @property
    def codes(self) -> Tensor:
        """The weight before scaling, in e4m3 [outputs, inputs]."""
        return self.weight.view(E4M3)

    @property
    def scales(self) -> Tensor:
        """One per output, in fp32 [outputs, 1]."""
        return self.scale_bits.view(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in fp8 and add the bias.

        Args:
            input: Activations in any floating-point type [..., inputs].

        Returns:
            x Wᵀ with the bias, in the type of ``input`` [..., outputs].
        """
        return self.with_bias(multiply_frozen(input, self.codes, self.scales, self.transposed))

    def keep_transposed(self) -> None:
        """Keep a transposed copy of the codes: as much memory again, and no transposing in backward."""
        self.transposed = self.codes.t().contiguous()

    def with_bias(self, output: Tensor) -> Tensor:
        """Add the bias, if there is one.

        Args:
            output: x Wᵀ [..., outputs].

        Returns:
            The sum, in its type.
        """
        return output if self.bias is None else output + self.bias.to(output.dtype)


def stored_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``weight``, and return codes and scales as :class:`Fp8Linear` stores them: uint8 and int32."""
    codes, scales = round_rows(weight)
    return codes.view(torch.uint8), scales.view(torch.int32)
