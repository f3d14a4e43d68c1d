"""Lay out what each rank of a divided model holds: FSDP2, tensor parallelism, or pipeline stages, for the command."""

from collections import Counter
from collections.abc import Callable, Sequence

from helpers.errors import UserError
from helpers.memory.categories import ITEMS
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.model_parallel import fsdp_rank, pipeline_ranks, tensor_rank
from helpers.memory.units import GIB

DIVIDED = {"fsdp2": "FSDP2", "tp": "tensor parallelism", "pp": "pipeline stages"}
MOST_COLUMNS = 8


def divided_ranks(
    configuration: Configuration, kind: str, gpus: int, partition: Callable[[Configuration, int], Sequence[range]]
) -> list[Counter[str]]:
    """Predict every rank's tensors at the end of forward, and what CUDA and NCCL take.

    Args:
        configuration: One rank's batch and the whole model, trained without an adapter; for "pp" one micro-batch.
        kind: A key of :data:`DIVIDED`.
        gpus: Number of ranks, at least 2.
        partition: Gives the layers of each stage (helpers.parallel.pipeline.partition_layers, which needs torch).

    Returns:
        Bytes by item for each rank; a single one if all ranks are alike.

    Raises:
        UserError: The configuration is another one, or there is a single GPU.
    """
    if gpus < 2:
        raise UserError(f"--strategy {kind} divides the model; name the number of GPUs with --gpus, 2 or more")
    if kind == "fsdp2":
        ranks = [fsdp_rank(configuration, gpus)]
    elif kind == "tp":
        ranks = [tensor_rank(configuration, gpus)]
    else:
        # A stage keeps as many micro-batches as there are stages from it on: more of them change nothing.
        ranks = pipeline_ranks(configuration, partition(configuration, gpus), micro_batches=gpus)
    machine = configuration.machine
    outside = Counter({"CUDA context": machine.cuda_context, "NCCL": machine.nccl_several_ranks})
    return [rank + outside for rank in ranks]


def divided_table(configuration: Configuration, kind: str, gpus: int, ranks: Sequence[Counter[str]]) -> str:
    """Lay out the ranks' items in GiB, a column per rank; of many ranks, the fullest and the emptiest.

    Args:
        configuration: The job.
        kind: A key of :data:`DIVIDED`.
        gpus: Number of ranks.
        ranks: What :func:`divided_ranks` returned.

    Returns:
        The table, and what it leaves out.
    """
    c = configuration
    columns = {f"rank {number}": rank for number, rank in enumerate(ranks)} if len(ranks) > 1 else {"each": ranks[0]}
    if len(columns) > MOST_COLUMNS:
        ordered = sorted(columns, key=lambda name: -columns[name].total())
        columns = {name: columns[name] for name in (ordered[0], ordered[-1])}

    def row(name: str, cells: Sequence[str]) -> str:
        return f"  {name:<24}" + "".join(f"{cell:>10}" for cell in cells)

    named = [item for item in ITEMS if any(rank[item] for rank in columns.values())]
    return "\n".join(
        [
            f"all {c.shape.parameters:,} parameters, {DIVIDED[kind]} on {gpus} GPUs, {c.precision}, "
            f"{c.micro_batch_size} sequences x {c.sequence_length} tokens",
            row("end of forward, GiB", list(columns)),
            *(row(item, [f"{rank[item] / GIB:.2f}" for rank in columns.values()]) for item in named),
            row("total", [f"{rank.total() / GIB:.2f}" for rank in columns.values()]),
            row("end of backward, GiB", [f"{_after_backward(rank) / GIB:.2f}" for rank in columns.values()]),
            "temporaries and the allocator's free blocks come on top: nothing here was measured on GPUs",
        ]
    )


def _after_backward(rank: Counter[str]) -> int:
    """Sum a rank when its activations are gone and all gradients, as large as its parameters, exist."""
    gone = ("activations", "logits and loss", "communication buffers", "gradients")
    return rank.total() - sum(rank[item] for item in gone) + rank["parameters"]
