"""Predict what each rank holds when a model that is trained whole is divided by layers, by matrices or by FSDP2.

Pipeline stages and tensor parallelism are the course's own (helpers/parallel). FSDP2 is torch's, with a unit per layer.
All at the end of forward, from the second step on, when Adam's states exist: tensors only, without temporaries.
tests/test_model_parallel_memory.py counts the same in models.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from helpers.errors import UserError
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.saved_tensors import FP32, SavedTensor, saved_by_layer, saved_outside_layers, total_bytes
from helpers.memory.predict.states import ADAM

IDS = "ids and labels"


def _check(c: Configuration, ranks: int) -> None:
    if c.lora or c.checkpointing or c.strategy.kind != "single":
        raise UserError(
            "model_parallel predicts training of all parameters, without checkpointing and ZeRO; "
            "give a Configuration with lora=None, checkpointing=False and the strategy single"
        )
    if ranks < 1:
        raise UserError(f"{ranks} ranks cannot train; give 1 or more")


def _states(c: Configuration, parameters: int) -> Counter[str]:
    size = parameters * c.trainable_bytes
    return Counter({"parameters": size, "optimizer states": ADAM * size})


def pipeline_ranks(configuration: Configuration, stages: Sequence[range], micro_batches: int) -> list[Counter[str]]:
    """Predict each rank of a pipeline under 1F1B, at its largest number of micro-batches alive.

    A stage s of p keeps min(m, p - s) of m micro-batches (Narayanan et al. 2021, section 2.2). The last one has the
    output layer and the loss, the first one the embedding. Gradients are there from the first backward on.

    Args:
        configuration: One micro-batch of the whole model.
        stages: The layers of each stage, as helpers.parallel.pipeline.partition_layers gives them.
        micro_batches: Micro-batches per step.

    Returns:
        Bytes by item for each rank.

    Raises:
        UserError: The configuration is another one, or the stages are not the model's layers.
    """
    c = configuration
    _check(c, len(stages))
    if [layer for stage in stages for layer in stage] != list(range(c.shape.layers)):
        raise UserError(f"stages {list(stages)} are not the {c.shape.layers} layers of the model, each once, in order")
    ranks = []
    for number, layers in enumerate(stages):
        first, last = number == 0, number == len(stages) - 1
        parameters = len(layers) * c.shape.layer_parameters + first * c.shape.embedding
        parameters += last * (c.shape.embedding + c.shape.hidden)
        kept = len(layers) * total_bytes(saved_by_layer(c))
        if last:
            kept += total_bytes([t for t in saved_outside_layers(c) if t.name != IDS])
        held = _states(c, parameters)
        held["gradients"] = parameters * c.trainable_bytes
        held["activations"] = kept * min(micro_batches, len(stages) - number)
        held["logits and loss"] = last * FP32 * c.tokens * c.shape.vocab
        ranks.append(held)
    return ranks


def tensor_rank(
    configuration: Configuration,
    ranks: int,
    *,
    sequence_parallel: bool = False,
    recompute_all_gather: bool = False,
) -> Counter[str]:
    """Predict a rank of tensor parallelism (helpers.parallel.tensor.parallelize, with the same options); all are alike.

    Matrices and what they keep are divided. Norms' weights are complete. Sequence parallelism divides what norms keep.
    Gathering again also divides what blocks and output layer get (Korthikanti et al. 2022, section 4.2).

    Args:
        configuration: One batch of the whole model.
        ranks: Tensor-parallel ranks.
        sequence_parallel: Whether tokens are divided between the blocks.
        recompute_all_gather: Whether backward gathers the blocks' inputs again.

    Returns:
        Bytes by item.

    Raises:
        UserError: The configuration is another one.
    """
    c = configuration
    _check(c, ranks)
    norms = (2 * c.shape.layers + 1) * c.shape.hidden
    held = _states(c, (c.shape.parameters - norms) // ranks + norms)

    def kept(saved: Iterable[SavedTensor]) -> int:
        size = 0
        for tensor in saved:
            norm = tensor.name.startswith("norm")
            complete = tensor.name == IDS or tensor.name.startswith("rotary")
            complete |= (norm and not sequence_parallel) or (tensor.name == "matrix input" and not recompute_all_gather)
            size += tensor.total if complete else tensor.total // ranks
        return size

    held["activations"] = c.shape.layers * kept(saved_by_layer(c)) + kept(saved_outside_layers(c))
    held["logits and loss"] = FP32 * c.tokens * c.shape.vocab // ranks
    return held


def fsdp_rank(configuration: Configuration, ranks: int) -> Counter[str]:
    """Predict a rank of FSDP2 with one unit per layer, all others in the root, and the weights' own precision.

    Each parameter is divided by its first dimension. The root's are not given back after forward: embedding, last norm
    and output layer are whole then, because backward begins with them.

    Args:
        configuration: One rank's batch.
        ranks: Number of ranks.

    Returns:
        Bytes by item, gathered parameters as communication buffers.

    Raises:
        UserError: The configuration is another one.
    """
    c = configuration
    _check(c, ranks)
    root = c.shape.parameters - c.shape.layers * c.shape.layer_parameters
    held = _states(c, -(-c.shape.parameters // ranks))
    held["activations"] = c.shape.layers * total_bytes(saved_by_layer(c)) + total_bytes(saved_outside_layers(c))
    held["logits and loss"] = FP32 * c.tokens * c.shape.vocab
    held["communication buffers"] = root * c.trainable_bytes
    return held
