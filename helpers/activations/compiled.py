"""Compile so that backward recomputes what is cheap to recompute."""

from collections.abc import Sequence
from typing import Any

from torch._functorch import config
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule


def recompute_inputs(graph: GraphModule, inputs: Sequence[Any]) -> Any:
    """Compile a graph as ``torch.compile`` does, but keep no input of a matmul that elementwise operations made.

    By default, what a matmul reads in backward is kept, because it has to be in memory there anyway. An adapter with
    dropout has such an input for each of its matrices: the norm's output with other elements dropped. This keeps the
    masks, a byte per element instead of two more, and multiplies again.

    Args:
        graph: The captured forward pass; this function is a ``backend`` of ``torch.compile``.
        inputs: Its example inputs.

    Returns:
        The compiled function.
    """
    with config.patch(ban_recompute_used_far_apart=False, ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)
