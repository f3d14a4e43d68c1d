"""Predict what a training job needs of each GPU, before anything is loaded.

python -m helpers.memory.predict --micro-batch-size 4 --sequence-length 768 --checkpointing
python -m helpers.memory.predict configs/lora.yaml configs/ds_zero_2.json --gpus 2 --gpu-memory 24
python -m helpers.memory.predict --full --gpus 2 --gpu-memory 24 --plan
"""

import argparse
from pathlib import Path

from helpers.errors import UserError, exit_with_one_line, positive_int
from helpers.memory.predict.configuration import (
    KINDS,
    PRECISIONS,
    Configuration,
    Lora,
    Strategy,
)
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
    parser.add_argument(
        "--sequence-length", type=positive_int, help="tokens per sequence (768; with files, the longest they allow)"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory per GPU: print whether the job fits")
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
    parser.add_argument("--strategy", choices=KINDS, help="(single; ddp with several GPUs)")
    parser.add_argument("--micro-batch-size", type=positive_int, help="sequences that run at once on a GPU (4)")
    parser.add_argument("--padded", action="store_true", default=None, help="sequences differ in length")
    parser.add_argument("--checkpointing", action="store_true", default=None, help="recompute activations in backward")
    parser.add_argument("--quantization-bits", type=int, choices=(8, 4), help="quantise the frozen matrices")
    parser.add_argument("--fp8", action="store_true", default=None, help="or round them to fp8, in compiled layers")
    return parser.parse_args(argv)


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


def prediction_table(configuration: Configuration, prediction: Prediction) -> str:
    """Lay out the items at the peak, and the total of each phase, in GiB."""
    c = configuration
    trains = "all parameters" if c.lora is None else f"LoRA, r = {c.lora.r} on {', '.join(c.lora.targets)}"
    lines = [
        f"{trains} ({c.trainable_parameters:,} of {c.shape.parameters:,}), {label(c)}, {c.precision}, "
        f"{c.micro_batch_size} sequences x {c.sequence_length} tokens, {c.strategy.world_size} GPU(s)",
        f"peak: {prediction.peak_phase}, GiB per GPU",
    ]
    lines += [f"  {name:<24}{size / GIB:>8.2f}" for name, size in prediction.items.items()]
    lines += [f"  {'total':<24}{prediction.total / GIB:>8.2f}", "moments, GiB per GPU"]
    lines += [f"  {name:<32}{size / GIB:>8.2f}" for name, size in prediction.phases.items()]
    return "\n".join(lines)


def strategy_list(candidates: list[Candidate]) -> str:
    """List the sorted strategies, one line each."""
    return "\n".join(
        f"{number:>2}. {label(r.configuration)}: {r.reason}" for number, r in enumerate(candidates, start=1)
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = _arguments(argv)
    configuration = _configuration(arguments)
    if arguments.plan:
        if arguments.gpu_memory is None:
            raise UserError("--plan needs the memory per GPU; add --gpu-memory 24 for GPUs of 24 GiB")
        print(strategy_list(sort_strategies(configuration, arguments.gpus, int(arguments.gpu_memory * GIB))))
        return
    if arguments.gpu_memory is None:
        print(prediction_table(configuration, predict(configuration)))
        return
    fit = fits(configuration, int(arguments.gpu_memory * GIB))
    print(prediction_table(configuration, fit.prediction))
    print(f"a GPU of {arguments.gpu_memory:g} GiB: {fit}")
    if arguments.config and not arguments.sequence_length and configuration.padded:
        print(
            f"{configuration.sequence_length} tokens are the longest that {arguments.config} allows; if your sequences "
            "are shorter, name your longest with --sequence-length"
        )


if __name__ == "__main__":
    exit_with_one_line(main)
