"""LoRA on ChatGLM3-6B's full size: the published recipe, each thing that makes it faster alone, and all of them.

    python tests/benchmarks/speed_6b.py CHECKPOINT [--only TEXT ...] [--results notebooks/results/speed_6b.json]

Every run is the ordinary command on the same rows, of AdvertiseGen's length, and is measured in the same way, in one
go. CHECKPOINT is a folder in the published layout; where it does not exist, one with random weights is written there.
Needs a GPU of 80 GiB for packs of 4,096 tokens. ``--only`` runs those whose names contain one of the texts.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from finetune_6b import ROOT, ensure_checkpoint, summary, write_results, write_rows

from helpers.errors import UserError, exit_with_one_line
from helpers.finetune.launch import run_command, torchrun_command
from helpers.memory.predict import ModelShape

RESULTS = ROOT / "notebooks" / "results" / "speed_6b.json"
PUBLISHED_ZERO_2 = ROOT / "tests" / "data" / "published_ds_zero_2.json"
STEPS, LOGGING_STEPS = 40, 5
PACKS = {"packing": 4096}
CHUNKS = {"loss_chunk": 2048}
COMPILED = {"compile_layers": True}
ONE_PACK = {"per_device_train_batch_size": 1}


@dataclass(frozen=True)
class Run:
    """``speed`` and ``training`` are what is changed in ``configs/lora.yaml``; ``ranks`` None is every GPU."""

    name: str
    speed: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    deepspeed: Path | None = None
    ranks: int | None = 1


RUNS = [
    Run("published recipe", deepspeed=PUBLISHED_ZERO_2),
    Run("without DeepSpeed"),
    Run("chunked loss", CHUNKS),
    Run("compiled layers", COMPILED),
    Run("grouped by length", training={"train_sampling_strategy": "group_by_length"}),
    Run("packing", PACKS, ONE_PACK),
    Run("packing, chunked loss", PACKS | CHUNKS, ONE_PACK),
    Run("packing, compiled layers", PACKS | COMPILED, ONE_PACK),
    Run("all", PACKS | CHUNKS | COMPILED, ONE_PACK),
    # The same rows a step on one GPU and on all.
    Run("all, one GPU", PACKS | CHUNKS | COMPILED, ONE_PACK | {"gradient_accumulation_steps": 0}),
    Run("all, every GPU", PACKS | CHUNKS | COMPILED, ONE_PACK, ranks=None),
    Run("within 24 GiB", {"packing": 2048, "loss_chunk": 512} | COMPILED, ONE_PACK),
    Run(
        "least memory",
        {"packing": 2048, "loss_chunk": 256} | COMPILED,
        ONE_PACK | {"gradient_checkpointing": True},
    ),
    Run(
        "least memory, published lengths",
        {"loss_chunk": 256},
        {"gradient_checkpointing": True},
    ),
]


def write_config(folder: Path, run: Run) -> Path:
    """configs/lora.yaml with the run's changes, cut to a few steps and without evaluation."""
    raw = yaml.safe_load((ROOT / "configs" / "lora.yaml").read_text(encoding="utf-8"))
    raw["data_config"].pop("val_file")
    raw["training_args"] |= {"max_steps": STEPS, "logging_steps": LOGGING_STEPS, "save_strategy": "no"}
    raw["training_args"] |= {"eval_strategy": "no"} | run.training
    if raw["training_args"].get("gradient_accumulation_steps") == 0:  # as many packs as all GPUs have together
        raw["training_args"]["gradient_accumulation_steps"] = torch.cuda.device_count()
    raw["speed"] = run.speed
    path = folder / f"{run.name.replace(' ', '-')}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def product_rate() -> float:
    """TFLOP/s of the 8192 x 8192 x 8192 product of bf16 matrices, measured on the first GPU in a process of its own."""
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
    """Operations of a run by those of the product. A token costs 4 for each frozen parameter that is multiplied with,
    which are all but the embedding's.
    """
    shape = ModelShape()
    return run["tokens_per_second_per_gpu"] * 4 * (shape.parameters - shape.embedding) / (rate * 1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="+", help="texts in the names of the runs to make")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    wanted = [run for run in RUNS if not arguments.only or any(text in run.name for text in arguments.only)]
    ensure_checkpoint(arguments.checkpoint)
    rate = product_rate()
    print(f"8192 x 8192 x 8192 in bf16: {rate:.0f} TFLOP/s", flush=True)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        for run in wanted:
            output_dir = folder / f"run-{len(runs)}"
            command = torchrun_command(
                folder,
                arguments.checkpoint,
                write_config(folder, run),
                run.deepspeed,
                output_dir=output_dir,
                nprocs=run.ranks,
            )
            status = run_command(command)
            if status:
                sys.exit(status)
            found = summary(output_dir)
            changes = {"speed": run.speed, "training": run.training}
            runs[run.name] = found | changes | {"share_of_product_rate": share_of(rate, found)}
            write_results(arguments.results, arguments.checkpoint, runs, product_tflops=rate)
    for name, run in runs.items():
        print(
            f"{name:32} {run['tokens_per_second_per_gpu']:8,.0f} tokens/s per GPU, "
            f"{run['share_of_product_rate']:.0%} of the product's rate, NVML {max(run['nvml_peak_gib']):.2f} GiB"
        )


if __name__ == "__main__":
    exit_with_one_line(main)
