"""All parameters of ChatGLM3-6B's full size trained by the ordinary command, with Adam's states in host memory.

    python tests/benchmarks/full_6b.py CHECKPOINT [--only TEXT ...] [--results FILE]

Within 24 GiB of each GPU, and in as little GPU memory as possible. CHECKPOINT is a folder in the published layout; if
it does not exist, one with random weights is written there. On two GPUs it needs about 180 GiB of host memory, and a
minute more if DeepSpeed's CPU Adam has not been built yet.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from jobs_6b import ROOT, commit, ensure_checkpoint, mean_tokens, summary, write_config, write_results, write_rows

from helpers.errors import UserError, exit_with_one_line
from helpers.finetune.full_results import FULL_RESULTS
from helpers.finetune.torchrun import run_command, torchrun_command

# Configuration and DeepSpeed file of each run.
RUNS = {
    "24 GiB budget": ("sft_24gb.yaml", "ds_zero_3_offload_full.json"),
    "least memory": ("sft_4gb.yaml", "ds_zero_3_offload_least_memory.json"),
}
# The first two steps, which warm up, do not count. A checkpoint would take 14 bytes per parameter.
FEW_STEPS = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no"}
REPEATED = 8  # the rows, for a step on several GPUs to have enough


def measure(name: str, data: Path, checkpoint: Path, output_dir: Path) -> dict[str, Any]:
    """Train a few steps on all GPUs; return the run's entry in the results file."""
    file, deepspeed = RUNS[name]
    config = write_config(output_dir.with_suffix(".yaml"), file, FEW_STEPS, {})
    command = torchrun_command(data, checkpoint, config, ROOT / "configs" / deepspeed, output_dir=output_dir)
    if status := run_command(command):
        raise UserError(f"{name} failed with status {status}; its output is above")
    run = summary(output_dir)
    tokens = run["tokens_per_second_per_gpu"] * run["step_seconds"]
    return {"name": name, "config": file, "deepspeed": deepspeed, "tokens_per_gpu_and_step": tokens, **run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="+", help="texts in the names of the runs to make")
    parser.add_argument("--results", type=Path, default=FULL_RESULTS)
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    ensure_checkpoint(arguments.checkpoint)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder)
        rows = (folder / "train.json").read_text(encoding="utf-8")
        (folder / "train.json").write_text(REPEATED * rows, encoding="utf-8")
        for number, name in enumerate(RUNS):
            if arguments.only and not any(text in name for text in arguments.only):
                continue
            runs[name] = measure(name, folder, arguments.checkpoint, folder / f"run-{number}")
            facts = {"commit": arguments.commit, "mean_tokens": mean_tokens(next(iter(runs.values())))}
            write_results(arguments.results, arguments.checkpoint, runs, **facts)
            print(f"{name}: {runs[name]['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU", flush=True)


if __name__ == "__main__":
    exit_with_one_line(main)
