"""Predict what a training job needs of each GPU, before anything is loaded.

python -m helpers.memory.predict --micro-batch-size 4 --sequence-length 768 --checkpointing
python -m helpers.memory.predict configs/lora.yaml configs/ds_zero_2.json --gpus 2 --gpu-memory 24 --data DATA
python -m helpers.memory.predict --full --gpus 2 --gpu-memory 24 --plan
python -m helpers.memory.predict --full --gpus 4 --strategy pp      or tp, fsdp2: each rank of a divided model
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

from helpers.errors import UserError, exit_with_one_line, positive_int
from helpers.memory.predict.configuration import (
    KINDS,
    PRECISIONS,
    Configuration,
    Lora,
    Strategy,
)
from helpers.memory.predict.divided import DIVIDED, divided_ranks, divided_table
from helpers.memory.predict.error_bar import error_bar
from helpers.memory.predict.lengths import StepLengths, step_lengths
from helpers.memory.predict.machine import calibrated
from helpers.memory.predict.model_shape import ModelShape, read_shape
from helpers.memory.predict.planner import Candidate, fits, label, sort_strategies
from helpers.memory.predict.prediction import Prediction, predict
from helpers.memory.units import GIB

# A job's own files decide these: an option that contradicts them would silently lose.
DECIDED_BY_FILES = (
    "full",
    "r",
    "targets",
    "dropout",
    "precision",
    "strategy",
    "micro_batch_size",
    "padded",
    "checkpointing",
    "quantization_bits",
    "fp8",
    "expandable_segments",
)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.memory.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", type=Path, nargs="?", help="a job's own configs/lora.yaml; otherwise the options below"
    )
    parser.add_argument("deepspeed", type=Path, nargs="?", help="and its DeepSpeed JSON")
    parser.add_argument("--model", type=Path, help="config.json or its folder; without it, ChatGLM3-6B")
    parser.add_argument("--gpus", type=positive_int, default=1, help="number of GPUs")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--length",
        "--sequence-length",
        dest="sequence_length",
        type=positive_int,
        help="tokens per sequence (768; with files, the longest they allow)",
    )
    length.add_argument("--data", type=Path, help="with files: the job's folder of data, to know its lengths")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory per GPU: print whether the job fits")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="simulate the allocator on the step's own allocations: more exact, and up to half a minute",
    )
    parser.add_argument("--plan", action="store_true", help="with --gpu-memory: sort the strategies for this job")
    parser.add_argument(
        "--expandable-segments",
        action="store_true",
        default=None,
        help="torch's allocator with expandable_segments:True",
    )
    parser.add_argument("--full", action="store_true", default=None, help="train all parameters, not LoRA")
    parser.add_argument("--r", type=positive_int, help="rank of the adapter (8)")
    parser.add_argument("--targets", nargs="+", help="matrices with an adapter (q_proj k_proj v_proj)")
    parser.add_argument("--dropout", type=float, help="on the adapter's inputs (0.1)")
    parser.add_argument("--precision", choices=PRECISIONS, help="(autocast; bf16 under DeepSpeed)")
    parser.add_argument("--strategy", choices=(*KINDS, *DIVIDED), help="(single; ddp with several GPUs)")
    parser.add_argument("--micro-batch-size", type=positive_int, help="sequences that run at once on a GPU (4)")
    parser.add_argument("--padded", action="store_true", default=None, help="sequences differ in length")
    parser.add_argument("--checkpointing", action="store_true", default=None, help="recompute activations in backward")
    parser.add_argument("--quantization-bits", type=int, choices=(8, 4), help="quantise the frozen matrices")
    parser.add_argument("--fp8", action="store_true", default=None, help="or round them to fp8, in compiled layers")
    return parser.parse_args(argv)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would only fail after a trace, or be ignored."""
    memory = arguments.gpu_memory
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"--gpu-memory: a GPU cannot have {memory:g} GiB; give its memory in GiB, for example 24")
    if arguments.plan and memory is None:
        raise UserError("--plan needs the memory per GPU; add --gpu-memory 24 for GPUs of 24 GiB")
    if arguments.plan and arguments.trace:
        raise UserError("--plan compares strategies by the formulas; drop --trace, and trace the one you choose")


def _lengths(arguments: argparse.Namespace, configuration: Configuration) -> StepLengths | None:
    """Read how long the rows of a typical and of the worst step are; None if they are always of one length."""
    if arguments.data is None:
        return None
    if arguments.config is None:
        raise UserError("--data belongs to a job's own files; name its lora.yaml as well, or give --length")
    if not configuration.padded:
        print(f"{arguments.config} packs its rows: every step has {configuration.sequence_length} tokens per pack")
        return None
    # A command is above all layers (tests/test_layers.py): the tokenizer and the data belong to the job.
    from helpers.finetune.row_lengths import read_row_lengths

    folder = arguments.model if arguments.model and arguments.model.is_dir() else None
    lengths, note = read_row_lengths(arguments.data, arguments.config, folder)
    found = step_lengths(lengths, configuration.micro_batch_size)
    print(f"{len(lengths):,} rows: a typical micro-batch is {found.typical} tokens long, the worst {found.worst}")
    if note:
        print(note)
    return found


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _configuration(arguments: argparse.Namespace) -> Configuration:
    shape = read_shape(arguments.model) if arguments.model else ModelShape()
    if arguments.config:
        for name in DECIDED_BY_FILES:
            if getattr(arguments, name) is not None:
                raise UserError(f"{_option(name)} contradicts {arguments.config}, which decides it; drop one of them")
        from helpers.memory.predict.jobs import read_job  # imports transformers, which takes seconds

        return read_job(
            arguments.config,
            arguments.deepspeed,
            shape=shape,
            world_size=arguments.gpus,
            sequence_length=arguments.sequence_length,
        )
    if arguments.full:
        for name in ("r", "targets", "dropout", "quantization_bits", "fp8"):
            if getattr(arguments, name) is not None:
                raise UserError(f"{_option(name)} belongs to LoRA, but --full trains without it; drop one of them")
    kind = arguments.strategy or ("single" if arguments.gpus == 1 else "ddp")
    strategy = Strategy(kind, arguments.gpus)
    lora = Lora()
    dropout = lora.dropout if arguments.dropout is None else arguments.dropout
    return Configuration(
        shape=shape,
        lora=None if arguments.full else Lora(arguments.r or lora.r, tuple(arguments.targets or lora.targets), dropout),
        precision=arguments.precision or ("bf16" if strategy.zero_stage else "autocast"),
        strategy=strategy,
        micro_batch_size=arguments.micro_batch_size or 4,
        sequence_length=arguments.sequence_length or 768,
        padded=bool(arguments.padded),
        checkpointing=bool(arguments.checkpointing),
        quantization_bits=arguments.quantization_bits or 16,
        fp8=bool(arguments.fp8),
        expandable_segments=bool(arguments.expandable_segments),
    )


def _divided(arguments: argparse.Namespace) -> str:
    """Predict each rank of a model that --strategy divides."""
    kind = arguments.strategy
    for name in ("data", "gpu_memory", "plan", "trace", "checkpointing"):
        if getattr(arguments, name):
            raise UserError(f"{_option(name)} does not go with --strategy {kind}; drop it")
    if not arguments.full or arguments.precision == "autocast":
        raise UserError(
            f"--strategy {kind} is predicted if all parameters are trained in their own precision: add --full, and "
            "--precision bf16 or fp32 if you name one"
        )
    whole = argparse.Namespace(**vars(arguments) | {"strategy": "single", "precision": arguments.precision or "bf16"})
    whole.gpus = 1
    configuration = replace(_configuration(whole), machine=calibrated())

    def partition(c: Configuration, stages: int) -> list[range]:
        from helpers.parallel.pipeline import partition_layers  # imports torch, which takes seconds

        return partition_layers(c.shape, stages, c.sequence_length)

    ranks = divided_ranks(configuration, kind, arguments.gpus, partition)
    return divided_table(configuration, kind, arguments.gpus, ranks)


def prediction_table(
    configuration: Configuration, prediction: Prediction, typical: Prediction | None = None, *, traced: bool = False
) -> str:
    """Lay out the items at the peak, and the total of each phase, in GiB.

    Args:
        configuration: The job in its worst step.
        prediction: Its memory.
        typical: The memory of a typical step, for a second column; None if all steps are alike.
        traced: Whether the allocator was simulated.

    Returns:
        The table.
    """
    c = configuration
    trains = "all parameters" if c.lora is None else f"LoRA, r = {c.lora.r} on {', '.join(c.lora.targets)}"
    columns = [prediction] if typical is None else [prediction, typical]

    def row(name: str, width: int, sizes: list[int]) -> str:
        return f"  {name:<{width}}" + "".join(f"{size / GIB:>{8 if i == 0 else 14}.2f}" for i, size in enumerate(sizes))

    bar = error_bar(c, traced=traced)
    lines = [
        f"{trains} ({c.trainable_parameters:,} of {c.shape.parameters:,}), {label(c)}, {c.precision}, "
        f"{c.micro_batch_size} sequences x {c.sequence_length} tokens, {c.strategy.world_size} GPU(s)",
        f"peak: {prediction.peak_phase}, GiB per GPU" + ("" if typical is None else ": worst step, typical step"),
        *(row(name, 24, [column.items[name] for column in columns]) for name in prediction.items),
        row("total", 24, [column.total for column in columns]),
        f"  by the errors of measured runs, {bar.least(prediction.total) / GIB:.2f} to "
        f"{bar.most(prediction.total) / GIB:.2f}",
        "moments, GiB per GPU",
        *(row(name, 32, [column.phases.get(name, 0) for column in columns]) for name in prediction.phases),
    ]
    return "\n".join(lines)


def strategy_list(candidates: list[Candidate]) -> str:
    """List the sorted strategies, one line each."""
    return "\n".join(
        f"{number:>2}. {label(r.configuration)}: {r.reason}" for number, r in enumerate(candidates, start=1)
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = _arguments(argv)
    _check(arguments)
    if arguments.strategy in DIVIDED and not arguments.config:
        print(_divided(arguments))
        return
    configuration = replace(_configuration(arguments), machine=calibrated())
    lengths = _lengths(arguments, configuration)
    typical = None
    if lengths is not None:
        typical = predict(replace(configuration, sequence_length=lengths.typical))
        configuration = replace(configuration, sequence_length=lengths.worst)
    if arguments.plan:
        print(strategy_list(sort_strategies(configuration, arguments.gpus, int(arguments.gpu_memory * GIB))))
        return
    prediction = predict(configuration)
    if arguments.trace:
        print("tracing a few steps; this may take a minute", file=sys.stderr)
        from helpers.memory.predict.traced import trace  # imports torch

        prediction = predict(configuration, trace(configuration).reserved)
    print(prediction_table(configuration, prediction, typical, traced=arguments.trace))
    if arguments.gpu_memory is not None:
        print(
            f"a GPU of {arguments.gpu_memory:g} GiB: {fits(configuration, int(arguments.gpu_memory * GIB), prediction)}"
        )
    if arguments.config and lengths is None and not arguments.sequence_length and configuration.padded:
        print(
            f"{configuration.sequence_length} tokens are the longest that {arguments.config} allows; if your sequences "
            "are shorter, name your data with --data or your longest sequence with --length"
        )


if __name__ == "__main__":
    exit_with_one_line(main)
