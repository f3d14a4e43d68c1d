"""Triton kernels that round SiLU(gate) * up, and its gradient, to e4m3: one program per row, which it reads once.

They compute what ``fp8_swiglu`` computes on a CPU. Only torch builds for GPUs bring Triton.
"""

# ruff: noqa: ANN001, ANN202 (Triton reads a kernel's annotations as types of its own)
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from helpers.quantization.fp8 import E4M3, LARGEST, SMALLEST

# Of 32 threads each. A row of ChatGLM3's 13,696 columns leaves no room for a second one on the same multiprocessor, so
# as many threads as it has wait for memory together: on an H100, faster than 4, 8 or 16 warps.
WARPS = 32
_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(largest):
    return tl.maximum(largest, _SMALLEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _swiglu_rows(gate_up, codes, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_up += row * (2 * WIDTH) + columns
    gate = tl.load(gate_up, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + WIDTH, inside, 0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    largest = _clamp(tl.reduce(tl.abs(product), 0, _larger))
    # One division per row: a factor for its numbers, which differs from dividing each by at most its last digit.
    tl.store(codes + row * WIDTH + columns, (product * (_LARGEST / largest)).to(codes.dtype.element_ty), inside)
    tl.store(scales + row, largest / _LARGEST)


@triton.jit
def _swiglu_gradient_rows(gradient, gate_up, weights, codes, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_up += row * (2 * WIDTH) + columns
    # What is read once leaves the cache first, so that it keeps the weights' scales, which every row reads.
    gate = tl.load(gate_up, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_up + WIDTH, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
    gradient += row * WIDTH + columns
    of_product = tl.load(gradient, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = of_product * up * sigmoid * (1 + gate * (1 - sigmoid))
    for_up = of_product * gate * sigmoid
    for_gate *= tl.load(weights + columns, inside, 0.0, eviction_policy="evict_last")
    for_up *= tl.load(weights + WIDTH + columns, inside, 0.0, eviction_policy="evict_last")
    largest = _clamp(tl.reduce(_larger(tl.abs(for_gate), tl.abs(for_up)), 0, _larger))
    factor = _LARGEST / largest
    codes += row * (2 * WIDTH) + columns
    tl.store(codes, (for_gate * factor).to(codes.dtype.element_ty), inside)
    tl.store(codes + WIDTH, (for_up * factor).to(codes.dtype.element_ty), inside)
    tl.store(scales + row, largest / _LARGEST)


@triton_op("course::round_swiglu", mutates_args=())
def round_swiglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute SiLU(gate) * up in fp32, and round its rows; see :func:`helpers.quantization.fp8_swiglu.round_swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty(rows, width, device=gate_up.device, dtype=E4M3)
    scales = torch.empty(rows, 1, device=gate_up.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    wrap_triton(_swiglu_rows)[(rows,)](gate_up, codes, scales, WIDTH=width, BLOCK=block, num_warps=WARPS)
    return codes, scales


@triton_op("course::round_swiglu_gradient", mutates_args=())
def round_swiglu_gradient(gradient: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Round the gradient of ``gate_up``; see :func:`helpers.quantization.fp8_swiglu.round_swiglu_gradient`."""
    rows, width = gradient.shape
    codes = torch.empty(rows, 2 * width, device=gradient.device, dtype=E4M3)
    scales = torch.empty(rows, 1, device=gradient.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    wrap_triton(_swiglu_gradient_rows)[(rows,)](
        gradient, gate_up, weights, codes, scales, WIDTH=width, BLOCK=block, num_warps=WARPS
    )
    return codes, scales
