"""LoRA on ChatGLM3-6B's full size: the published recipe, each thing that makes it faster alone, and all of them.

    python tests/benchmarks/speed_6b.py CHECKPOINT [--only TEXT ...] [--profile] [--losses] [--resume] [--results FILE]

Every run is the ordinary command on the same examples, of AdvertiseGen's length; runs on one GPU are made side by side,
one per GPU. ``python -m helpers.finetune.readme`` then draws the figure and writes the README's table. CHECKPOINT is a
folder in the published layout; if it does not exist, one with random weights is written there. Needs a GPU with 80 GiB
for two packs of 4,096 tokens at once. ``--only`` selects the runs whose names contain one of the texts. ``--profile``
makes :data:`PROFILED` once more, under torch.profiler (``profiled_train.py``), and records where their steps' time
goes. ``--losses`` makes :data:`LONG` instead, in three minutes: do bf16 and fp8 learn alike? ``--resume`` keeps the
runs that are in the results file already; continue on the same machine, because speeds are compared.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jobs_6b import (
    PLAIN,
    PUBLISHED_ZERO_2,
    Run,
    choose,
    commit,
    ensure_checkpoint,
    execute,
    kept_runs,
    mean_tokens,
    side_by_side,
    summary,
    write_results,
    write_rows,
)

from helpers.errors import UserError, exit_with_one_line
from helpers.finetune.results import LOSS_RESULTS, SPEED_RESULTS
from helpers.memory.predict import ModelShape

FEW_STEPS = {"max_steps": 30, "logging_steps": 5, "save_strategy": "no"}
PACKS = 8  # per step, on one GPU or divided between all
FEWER_STEPS = {"max_steps": 24, "logging_steps": 4}
# The Trainer's defaults at the time of the published recipe.
WAITING = {"accelerator_config": {"non_blocking": False}, "logging_nan_inf_filter": True}
FAST, FP8 = "lora_fast.yaml", "lora_fp8.yaml"
PROFILED_TRAIN = Path(__file__).with_name("profiled_train.py")

# From the published recipe to everything together, one change at a time; then each alone; little memory.
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
    Run("fp8, two packs at once", FP8, training={"per_device_train_batch_size": 2}),
    Run("compiled layers", speed={"compile_layers": True}),
    Run("grouped by length", training={"train_sampling_strategy": "group_by_length"}),
    Run("lora_24gb.yaml", "lora_24gb.yaml"),
    Run("lora_16gb.yaml", "lora_16gb.yaml"),
    Run("lora_14gb.yaml", "lora_14gb.yaml"),
    Run("lora.yaml, checkpointing", training={"gradient_checkpointing": True}),
]

# The same packs in the same order; dropout drops others.
LONG_STEPS = {"max_steps": 200, "logging_steps": 10, "save_strategy": "no"}
LONG = [Run("bf16", FAST, training=LONG_STEPS), Run("fp8", FP8, training=LONG_STEPS)]
PROFILED = ("lora_fast.yaml: packing, compiled layers", "lora_fp8.yaml: frozen matrices in fp8")


def planned_runs(gpus: int) -> list[Run]:
    """List all runs, each limited to a few steps; those of 8 packs a step also on every GPU."""
    several = []
    for prefix, config in (("", FAST), ("fp8, ", FP8)):
        for where, ranks in (("one GPU", 1), ("every GPU", gpus)):
            training = FEWER_STEPS | {"gradient_accumulation_steps": PACKS // ranks}
            several.append(Run(f"{prefix}8 packs a step, {where}", config, training=training, ranks=ranks))
    return [replace(run, training=FEW_STEPS | run.training) for run in (*RUNS, *several)]


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


def add_profiles(runs: dict[str, dict[str, Any]], gpus: int, data: Path, checkpoint: Path) -> None:
    """Make the runs of :data:`PROFILED` again under torch.profiler; add the operations of a step to their entries."""
    again = [
        replace(run, script=PROFILED_TRAIN)
        for run in planned_runs(gpus)
        if run.name in PROFILED and "profile" not in runs.get(run.name, {"profile": "not measured"})
    ]
    groups = side_by_side(again, gpus)
    for group, outcomes in zip(groups, execute(groups, data, checkpoint, data / "profiles"), strict=True):
        for run, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, str):
                raise UserError(
                    f"the profile of {run.name} failed: {outcome}; mend it and go on with --resume --profile"
                )
            runs[run.name]["profile"] = json.loads((outcome / "profile.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="+", help="texts in the names of the runs to make")
    parser.add_argument("--profile", action="store_true", help="also profile some of them, in runs of their own")
    parser.add_argument("--losses", action="store_true", help="compare the losses of bf16 and fp8 over 200 steps")
    parser.add_argument("--resume", action="store_true", help="keep the runs in the results file, make the others")
    parser.add_argument("--results", type=Path, help="file to write; a default for speeds, one for losses")
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    results = arguments.results or (LOSS_RESULTS if arguments.losses else SPEED_RESULTS)
    chosen = choose({run.name: run for run in (LONG if arguments.losses else planned_runs(gpus))}, arguments.only)
    ensure_checkpoint(arguments.checkpoint)
    runs = kept_runs(results, arguments.commit) if arguments.resume else {}
    rate = json.loads(results.read_text(encoding="utf-8"))["product_tflops"] if runs else matmul_tflops()
    print(f"8192 x 8192 x 8192 in bf16: {rate:.0f} TFLOP/s", flush=True)

    def save() -> None:
        facts = {"product_tflops": rate, "mean_tokens": mean_tokens(next(iter(runs.values())))}
        write_results(results, arguments.checkpoint, runs, commit=arguments.commit, **facts)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        groups = side_by_side([run for label, run in chosen.items() if label not in runs], gpus)
        for group, outcomes in zip(groups, execute(groups, folder, arguments.checkpoint, folder), strict=True):
            for run, outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, str):
                    raise UserError(f"{run.name} failed: {outcome}; mend it and go on with --resume")
                found = {"config": run.config, "side_by_side": len(group)} | summary(outcome)
                training = {key: value for key, value in run.training.items() if key not in FEW_STEPS}
                changes = {"speed": run.speed, "training": training}
                runs[run.name] = found | changes | {"share_of_product_rate": share_of(rate, found)}
                save()
        if arguments.profile:
            add_profiles(runs, gpus, folder, arguments.checkpoint)
            save()
    for name, run in runs.items():
        print(
            f"{name:42} {run['tokens_per_second_per_gpu']:8,.0f} tokens/s per GPU, "
            f"{run['share_of_product_rate']:.0%} of the matmul's rate, NVML {max(run['nvml_peak_gib']):.2f} GiB"
        )


if __name__ == "__main__":
    exit_with_one_line(main)
