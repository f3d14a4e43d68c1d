"""LoRA on ChatGLM3-6B's full size, on every GPU of this machine: DDP, ZeRO-2 and ZeRO-3 through the ordinary command.

    python tests/benchmarks/finetune_6b.py CHECKPOINT [--results notebooks/results/finetune_6b.json]

CHECKPOINT is a folder in the published layout; if it does not exist, one with random weights is written there. The
examples are as long as AdvertiseGen's (about 140 tokens), made from the embedded data set. Needs a GPU with 40 GiB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from helpers.assets import TINY_DATA
from helpers.chatglm3.tokenizer import is_published_tokenizer
from helpers.config.deepspeed import bucket_bytes, zero_stage
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.finetune.recorder import read_metrics
from helpers.finetune.results import RESULTS
from helpers.finetune.torchrun import run_command, torchrun_command

ROOT = Path(__file__).resolve().parents[2]
STEPS, LOGGING_STEPS, WARM_UP_INTERVALS = 35, 5, 2
# transformers' defaults at the time of the published recipe: the logits of all tokens at once, and a padding mask.
PLAIN = {"loss_chunk": 0, "padding_mask": True}
RUNS = {
    "DDP": None,
    "ZeRO-2": ROOT / "configs" / "ds_zero_2.json",
    "ZeRO-2, published 5e8 buckets": ROOT / "tests" / "data" / "published_ds_zero_2.json",
    "ZeRO-3": ROOT / "configs" / "ds_zero_3.json",
}


def ensure_checkpoint(folder: Path) -> None:
    """Write a checkpoint with random weights if there is none."""
    if not folder.exists():
        # In its own process, so that nothing of it stays on the GPU that is measured.
        subprocess.run([sys.executable, "-m", "helpers.chatglm3.random_weights", str(folder)], check=True)
        os.sync()  # otherwise 12 GB are still being written to disk while the first run is measured


def write_rows(folder: Path) -> None:
    """Join every two examples of the embedded set into one, of AdvertiseGen's length."""
    rows = [json.loads(line) for line in (TINY_DATA / "train.json").read_text(encoding="utf-8").splitlines()]
    joined = [{key: a[key] + b[key] for key in a} for a, b in zip(rows[::2], rows[1::2], strict=False)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in joined)
    (folder / "train.json").write_text(text, encoding="utf-8")


def write_config(path: Path, base: str, training: dict[str, Any], speed: dict[str, Any]) -> Path:
    """Write the configuration named ``base`` to ``path``, without evaluation and with the changes in two blocks."""
    raw = yaml.safe_load((ROOT / "configs" / base).read_text(encoding="utf-8"))
    raw["data_config"].pop("val_file")
    raw["training_args"] |= {"eval_strategy": "no"} | training
    raw["speed"] = raw.get("speed", {}) | speed
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def summary(output_dir: Path) -> dict[str, Any]:
    """Summarise one run: peaks over the whole run; speeds as medians, without the warm-up."""
    records = [r for r in read_metrics(output_dir / "metrics.jsonl") if "tokens_per_second" in r]
    run = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    deepspeed = run["deepspeed"] or {}

    def steady(key: str) -> list[float]:
        return [r[key] for r in records[WARM_UP_INTERVALS:]]

    def peaks(key: str) -> list[float]:
        return [max(values) for values in zip(*(r[key] for r in records), strict=True)]

    speeds = [speed / run["world_size"] for speed in steady("tokens_per_second")]
    return {
        "ranks": run["world_size"],
        "zero_stage": zero_stage(deepspeed),
        "bucket_bytes": bucket_bytes(deepspeed, element_bytes=2) if deepspeed else 0,
        "trainable_parameters": run["trainable_parameters"],
        "frozen_parameters": run["frozen_parameters"],
        "tokens_per_second_per_gpu": statistics.median(speeds),
        "tokens_per_second_per_gpu_range": [min(speeds), max(speeds)],
        "samples_per_second": statistics.median(steady("samples_per_second")),
        "step_seconds": statistics.median(steady("step_seconds")),
        "nvml_before_gib": run["nvml_before_gib"],
        "nvml_peak_gib": run["nvml_peak_gib"],
        "torch_allocated_gib": peaks("torch_allocated_gib"),
        "torch_reserved_gib": peaks("torch_reserved_gib"),
        "loss": [r["loss"] for r in records],
        "started": run["started"],
        "machine": run["machine"],
    }


def mean_tokens(run: dict[str, Any]) -> float:
    """Return the tokens per example, without padding."""
    return run["tokens_per_second_per_gpu"] * run["ranks"] / run["samples_per_second"]


def write_results(path: Path, checkpoint: Path, runs: dict[str, dict[str, Any]], **facts: float) -> None:
    """Write the runs so far. A checkpoint without the published tokenizer counts as random weights."""
    machine = next(iter(runs.values()))["machine"]
    content = {
        "random_weights": not is_published_tokenizer(checkpoint / "tokenizer.model"),
        **facts,
        "machine": machine,
        "runs": {label: {key: run[key] for key in run if key != "machine"} for label, run in runs.items()},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    ensure_checkpoint(arguments.checkpoint)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        few = {"max_steps": STEPS, "logging_steps": LOGGING_STEPS, "save_steps": STEPS}
        config = write_config(folder / "lora.yaml", "lora.yaml", few, PLAIN)
        for label, deepspeed in RUNS.items():
            output_dir = folder / f"run-{len(runs)}"
            command = torchrun_command(folder, arguments.checkpoint, config, deepspeed, output_dir=output_dir)
            status = run_command(command)
            if status:
                sys.exit(status)
            runs[label] = summary(output_dir)
            write_results(arguments.results, arguments.checkpoint, runs, mean_tokens=mean_tokens(runs["DDP"]))
    for label, run in runs.items():
        print(f"{label:32} {run['tokens_per_second_per_gpu']:8,.0f} tokens/s per GPU, NVML {run['nvml_peak_gib']} GiB")


if __name__ == "__main__":
    exit_with_one_line(main)
