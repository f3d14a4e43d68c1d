"""Check the matmuls of ``speed: fp8`` on a GPU against their emulation on the CPU, and measure them beside bf16.

    python tests/benchmarks/fp8_matmul.py

Takes less than a minute. The layer is compiled, as in configs/lora_fp8.yaml: rounding the activations, transposing the
weight's bytes and multiplying all count. Fails if a product is further from the emulation's than fast accumulation
explains.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.errors import UserError, exit_with_one_line
from helpers.finetune.fp8 import obstacle
from helpers.quantization.fp8 import Fp8Linear

ROWS = 4096
# (inputs, outputs) of ChatGLM3-6B: q, k and v together, o_proj, gate_up_proj, down_proj.
SHAPES = ((4096, 4608), (4096, 4096), (4096, 27392), (13696, 4096))
# Row counts of a pack, of single tokens and of odd batches, and none. Compiling takes seconds: for the first only.
CHECKED_ROWS = (256, 1, 17, 255, 0)
# The products differ by the order and the precision of sums, and by rounding to bf16, which is 2^-9 at most.
MOST_DIFFERENCE = 2**-7
REPEATS, TRIES = 20, 5


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the expected one's."""
    expected = expected.float()
    return ((found.cpu().float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def products(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of the input."""
    x = x.clone().requires_grad_()
    output = layer(x)
    return output.detach(), torch.autograd.grad(output, x, gradient)[0]


def check(inputs: int, outputs: int) -> float:
    """Compare the layer, compiled and not, with its emulation; return the largest relative difference."""
    linear = nn.Linear(inputs, outputs, dtype=torch.bfloat16).requires_grad_(False)
    emulated, layer = Fp8Linear.rounded(linear), Fp8Linear.rounded(linear).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    largest = 0.0
    for rows in CHECKED_ROWS:
        x, gradient = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
        if rows > 16:
            x[3] = 0
            x[5, 7] = 1000
            gradient[4] = 0
        expected = products(emulated, x, gradient)
        for run in (layer, compiled) if rows == CHECKED_ROWS[0] else (layer,):
            for found, right in zip(products(run, x.cuda(), gradient.cuda()), expected, strict=True):
                assert found.shape == right.shape
                largest = max(largest, difference(found, right))
    for bad in (float("nan"), float("inf")):
        x, gradient = (torch.randn(CHECKED_ROWS[0], width, device="cuda").bfloat16() for width in (inputs, outputs))
        x[5, 7] = gradient[6, 7] = bad
        for run in (layer, compiled):
            for row, found in zip((5, 6), products(run, x, gradient), strict=True):
                wrong = found.isnan()
                assert wrong[row].all() and wrong.sum() == wrong[row].numel(), f"{bad}: {wrong.sum(dim=1).tolist()}"
    return largest


def seconds(run: Callable[[], object]) -> float:
    """Measure one call, on the GPU; the median of several tries."""
    for _ in range(3):
        run()
    found = []
    for _ in range(TRIES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / REPEATS)
    return sorted(found)[TRIES // 2]


def rates(layer: nn.Module, inputs: int, outputs: int) -> tuple[float, float]:
    """Return TFLOP/s of the layer, compiled: forward, and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    x = torch.randn(ROWS, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(ROWS, outputs, device="cuda", dtype=torch.bfloat16)
    forward = seconds(lambda: compiled(x))
    both = seconds(lambda: torch.autograd.grad(compiled(x), x, gradient))
    operations = 2 * ROWS * inputs * outputs / 1e12
    return operations / forward, operations / (both - forward)


def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("no GPU here; the CPU's emulation is tested by tests/test_fp8.py")
    reason = obstacle(torch.cuda.get_device_capability(), torch.__version__, torch.version.cuda)
    if reason:
        raise UserError(f"no fp8 on {torch.cuda.get_device_name()}: {reason}")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ROWS} rows")
    largest = max(check(inputs, outputs) for inputs, outputs in ((4096, 256), (4096, 4608)))
    print(f"GPU against emulation: relative difference {largest:.1e} at most")
    if largest > MOST_DIFFERENCE:
        raise UserError(f"products differ by {largest:.1e} from the emulation's, more than {MOST_DIFFERENCE:.1e}")
    print("TFLOP/s         bf16 forward  bf16 backward   fp8 forward   fp8 backward")
    for inputs, outputs in SHAPES:
        linear = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        found = [*rates(linear, inputs, outputs), *rates(Fp8Linear.rounded(linear), inputs, outputs)]
        print(f"{inputs:>5} -> {outputs:<5}" + "".join(f"{rate:15,.0f}" for rate in found), flush=True)


if __name__ == "__main__":
    exit_with_one_line(main)
