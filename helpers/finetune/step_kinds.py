"""Sum up a step's profile by what the work is for: attention, matmuls, norms, adapters, loss and the rest.

``tests/benchmarks/profiled_train.py`` records a step's operations, which ``speed_6b.json`` keeps. What they are for
follows from their names and shapes. The compiler names a kernel after the operations that it fuses, so a kernel of
several kinds counts for the first that fits.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helpers.memory.predict import ModelShape

MATMULS, ATTENTION, ADAPTERS = "matmuls of frozen weights", "attention", "adapters"
SWIGLU, NORMS, ROUNDING = "SwiGLU", "norms and dropout", "rounding to fp8"
TRANSPOSED, ELEMENTWISE = "weights transposed", "rotation, residuals"
LOSS, OPTIMIZER, REST = "output layer and loss", "optimizer", "rest"
KINDS = (MATMULS, ATTENTION, SWIGLU, NORMS, ROUNDING, TRANSPOSED, ELEMENTWISE, ADAPTERS, LOSS, OPTIMIZER, REST)

LARGEST_RANK = 64  # of an adapter: no other matmul of a layer has so short a side
_MATMUL = re.compile(r"aten::(mm|bmm|addmm|matmul|linear)_?$")
_FUSED = re.compile(r"triton_\w+?_fused_")
# Of the compiler's kernels, in this order: SwiGLU's and the norms' also round what they return.
_FUSED_KINDS = (
    (SWIGLU, re.compile("silu|sigmoid")),
    (NORMS, re.compile("rsqrt|mean|pow|dropout|rand|bernoulli")),
    (ROUNDING, re.compile("abs|amax")),
)
_MOVING = {"clone", "t", "transpose", "permute", "view", "scaled", "mm", "contiguous", "copy", "to"}


def kind_of(name: str, shapes: Sequence[Any], vocab: int) -> str:
    """Classify one operation.

    Args:
        name: Of the operation, or of the compiler's kernel.
        shapes: Of its inputs.
        vocab: Outputs of the output layer.

    Returns:
        One of ``KINDS``.
    """
    sides = list(_numbers(shapes))
    if re.search("attn|attention", name):
        return ATTENTION
    if "embedding" in name:
        return REST
    if vocab in sides or re.search("softmax|nll_loss|cross_entropy", name):
        return LOSS
    if name == "aten::_scaled_mm":  # in fp8; its scales have sides of 1
        return MATMULS
    if _MATMUL.match(name):
        return ADAPTERS if sides and min(sides) <= LARGEST_RANK else MATMULS
    if re.search("adam|_foreach|optimizer", name, re.IGNORECASE):
        return OPTIMIZER
    if "swiglu" in name:  # helpers.quantization.fp8_swiglu_kernels
        return SWIGLU
    if not _FUSED.match(name):
        return REST
    fused = _FUSED.sub("", name)
    for kind, pattern in _FUSED_KINDS:
        if pattern.search(fused):
            return kind
    words = {word for word in fused.split("_") if word and not word.isdecimal()}
    return TRANSPOSED if words <= _MOVING else ELEMENTWISE


def _numbers(shapes: Any) -> Iterator[int]:
    """Yield the sizes of all tensors, also of those in lists; scalars have none."""
    for item in shapes:
        if isinstance(item, list | tuple):
            yield from _numbers(item)
        elif isinstance(item, int):
            yield item


def step_parts(profile: Sequence[Sequence[Any]], vocab: int = ModelShape.vocab) -> dict[str, float]:
    """Sum up the seconds of a step by kind.

    Args:
        profile: Name, shapes of the inputs, seconds and calls of each operation.
        vocab: Outputs of the output layer.

    Returns:
        Kind -> seconds, in the order of ``KINDS``, without those that take none.
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    for name, shapes, took, _ in profile:
        seconds[kind_of(name, shapes, vocab)] += took
    return {kind: took for kind, took in seconds.items() if took}


def profiled_steps(speed: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Collect the steps that were profiled.

    Args:
        speed: Contents of ``speed_6b.json``; a file of before has no profiles.

    Returns:
        Run -> its parts, and run -> the seconds of a step that was not profiled: what they have more than the parts
        together, the GPU was idle.
    """
    runs = {name: run for name, run in speed["runs"].items() if "profile" in run}
    parts = {name: step_parts(run["profile"]) for name, run in runs.items()}
    return parts, {name: run["step_seconds"] for name, run in runs.items()}
