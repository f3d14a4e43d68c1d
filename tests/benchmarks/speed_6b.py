"""LoRA on ChatGLM3-6B's full size: the published recipe, each thing that makes it faster alone, and all of them.

    python tests/benchmarks/speed_6b.py CHECKPOINT [--only TEXT ...] [--profile] [--losses] [--results FILE]

Every run is the ordinary command on the same examples, of AdvertiseGen's length, one run after the other;
``python -m helpers.finetune.readme`` then draws the figure and writes the README's table. CHECKPOINT is a folder in
the published layout; if it does not exist, one with random weights is written there. Needs a GPU with 80 GiB for two
packs of 4,096 tokens at once. ``--only`` selects the runs whose names contain one of the texts. ``--profile`` makes
:data:`PROFILED` once more, under torch.profiler (``profiled_train.py``), and records where their steps' time goes.
``--losses`` makes :data:`LONG` instead, in two minutes: do bf16 and fp8 learn alike?
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from finetune_6b import (
    PLAIN,
    PUBLISHED_ZERO_2,
    commit,
    ensure_checkpoint,
    mean_tokens,
    summary,
    write_config,
    write_results,
    write_rows,
)

from helpers.errors import UserError, exit_with_one_line
from helpers.finetune.results import LOSS_RESULTS, SPEED_RESULTS
from helpers.finetune.torchrun import run_command, torchrun_command
from helpers.memory.predict import ModelShape

STEPS, LOGGING_STEPS = 30, 5
# The Trainer's defaults at the time of the published recipe.
WAITING = {"accelerator_config": {"non_blocking": False}, "logging_nan_inf_filter": True}
FAST, FP8 = "lora_fast.yaml", "lora_fp8.yaml"
PROFILED_TRAIN = Path(__file__).with_name("profiled_train.py")


@dataclass(frozen=True)
class Run:
    """One run: a configuration with changes.

    Attributes:
        name: Label in tables and figures.
        config: A file of configs/.
        speed: Changes in its ``speed`` block.
        training: Changes in its ``training_args``.
        deepspeed: DeepSpeed JSON, or None.
        ranks: Number of ranks; None uses every GPU.
        packs: Packs per step on all GPUs together, in fewer steps; None keeps the configuration's batch.
    """

    name: str
    config: str = "lora.yaml"
    speed: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    deepspeed: Path | None = None
    ranks: int | None = 1
    packs: int | None = None


# From the published recipe to everything together, one change at a time; then each alone; two GPUs; little memory.
RUNS = [
    Run("published recipe", speed=PLAIN, training=WAITING, deepspeed=PUBLISHED_ZERO_2),
    Run("no DeepSpeed, no waiting", speed={"loss_chunk": 0}),
    Run("lora.yaml: loss in chunks"),
    Run("packing", speed={"packing": 4096}, training={"per_device_train_batch_size": 1}),
    Run("lora_fast.yaml: packing, compiled layers", FAST),
    Run("two packs at once", FAST, training={"per_device_train_batch_size": 2}),
    Run("lora_fp8.yaml: frozen matrices in fp8", FP8),
    Run("bf16, one dropout for q, k, v", FAST, speed={"shared_dropout": True}),
    Run("fp8, weights also transposed", FP8, speed={"fp8_transposed": True}),
    Run("fp8, a dropout for each adapter", FP8, speed={"shared_dropout": False}),
    Run("fp8, adapters' inputs recomputed", FP8, speed={"recompute_inputs": True}),
    Run("fp8, loss in chunks of 512", FP8, speed={"loss_chunk": 512}),
    Run("fp8, two packs at once", FP8, training={"per_device_train_batch_size": 2}),
    Run("compiled layers", speed={"compile_layers": True}),
    Run("grouped by length", training={"train_sampling_strategy": "group_by_length"}),
    Run("8 packs a step, one GPU", FAST, packs=8),
    Run("8 packs a step, every GPU", FAST, packs=8, ranks=None),
    Run("fp8, 8 packs a step, one GPU", FP8, packs=8),
    Run("fp8, 8 packs a step, every GPU", FP8, packs=8, ranks=None),
    Run("lora_24gb.yaml", "lora_24gb.yaml"),
    Run("lora_16gb.yaml", "lora_16gb.yaml"),
    Run("lora_14gb.yaml", "lora_14gb.yaml"),
    Run("lora.yaml, checkpointing", training={"gradient_checkpointing": True}),
]

# The same packs in the same order; dropout drops others.
LONG_STEPS = {"max_steps": 200, "logging_steps": 10}
LONG = [Run("bf16", FAST, training=LONG_STEPS), Run("fp8", FP8, training=LONG_STEPS)]
PROFILED = ("lora_fast.yaml: packing, compiled layers", "lora_fp8.yaml: frozen matrices in fp8")


def write_run(folder: Path, run: Run) -> Path:
    """Write the run's configuration, limited to a few steps."""
    training = {"max_steps": STEPS, "logging_steps": LOGGING_STEPS, "save_strategy": "no"} | run.training
    if run.packs:
        ranks = run.ranks or torch.cuda.device_count()
        training |= {"max_steps": 24, "logging_steps": 4, "gradient_accumulation_steps": run.packs // ranks}
    path = folder / f"{run.name.replace(' ', '-').replace(',', '').replace(':', '')}.yaml"
    return write_config(path, run.config, training, run.speed)


def matmul_tflops() -> float:
    """Measure a bf16 matmul of 8192 x 8192 matrices on the first GPU, in its own process; return TFLOP/s."""
    code = """
import time, torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
rates = []
for _ in range(13):
    torch.cuda.synchronize(); begin = time.perf_counter()
    for _ in range(10): a @ b
    torch.cuda.synchronize(); rates.append(10 * 2 * 8192**3 / (time.perf_counter() - begin) / 1e12)
print(sorted(rates[3:])[5])
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(found.stdout)


def share_of(rate: float, run: dict[str, Any]) -> float:
    """Return a run's share of ``rate`` (TFLOP/s), the matmul's.

    With frozen weights, a token costs 4 operations per parameter in a matmul: 2 forward, and 2 backward for the
    gradient of the input. The embedding is looked up, not multiplied.
    """
    shape = ModelShape()
    return run["tokens_per_second_per_gpu"] * 4 * (shape.parameters - shape.embedding) / (rate * 1e12)


def profile_of(command: list[str], output_dir: Path) -> list[list[Any]]:
    """Make a run again under torch.profiler; return the operations of a step."""
    module = command.index("-m", 2)  # the first starts torchrun
    options = command[module + 2 : command.index("--output-dir")]
    script = [*command[:module], str(PROFILED_TRAIN), *options, "--output-dir", str(output_dir)]
    status = run_command(script)
    if status:
        sys.exit(status)
    return json.loads((output_dir / "profile.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="+", help="texts in the names of the runs to make")
    parser.add_argument("--profile", action="store_true", help="also profile some of them, in runs of their own")
    parser.add_argument("--losses", action="store_true", help="compare the losses of bf16 and fp8 over 200 steps")
    parser.add_argument("--results", type=Path, help="file to write; a default for speeds, one for losses")
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    results = arguments.results or (LOSS_RESULTS if arguments.losses else SPEED_RESULTS)
    runs_of = LONG if arguments.losses else RUNS
    chosen = [run for run in runs_of if not arguments.only or any(text in run.name for text in arguments.only)]
    ensure_checkpoint(arguments.checkpoint)
    rate = matmul_tflops()
    print(f"8192 x 8192 x 8192 in bf16: {rate:.0f} TFLOP/s", flush=True)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        for run in chosen:
            output_dir = folder / f"run-{len(runs)}"
            command = torchrun_command(
                folder,
                arguments.checkpoint,
                write_run(folder, run),
                run.deepspeed,
                output_dir=output_dir,
                nprocs=run.ranks,
            )
            status = run_command(command)
            if status:
                sys.exit(status)
            found = summary(output_dir)
            changes = {"speed": run.speed, "training": run.training}
            runs[run.name] = found | {"config": run.config} | changes | {"share_of_product_rate": share_of(rate, found)}
            if arguments.profile and run.name in PROFILED:
                runs[run.name]["profile"] = profile_of(command, output_dir.with_name(f"profile-{len(runs)}"))
            facts = {
                "commit": arguments.commit,
                "product_tflops": rate,
                "mean_tokens": mean_tokens(next(iter(runs.values()))),
            }
            write_results(results, arguments.checkpoint, runs, **facts)
    for name, run in runs.items():
        print(
            f"{name:32} {run['tokens_per_second_per_gpu']:8,.0f} tokens/s per GPU, "
            f"{run['share_of_product_rate']:.0%} of the matmul's rate, NVML {max(run['nvml_peak_gib']):.2f} GiB"
        )


if __name__ == "__main__":
    exit_with_one_line(main)
