"""Few examples per step, or packs of many: does the same number of examples teach the same?

    python tests/benchmarks/same_finetune.py [--results notebooks/results/same_finetune.json]

Trains the embedded model on the embedded data with the ordinary command: padded, four examples per step, as lora.yaml
does, and packed, as lora_fast.yaml does. The packed runs have a learning rate larger by the square root of the growth
in examples per step, as that file does, or in proportion to it. Records the dev loss over the examples seen. About six
minutes on two CPU cores.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from helpers.assets import TINY_DATA, TINY_MODEL
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.files import atomic_write
from helpers.finetune.dataset import Limits, read_split
from helpers.finetune.packing import best_fit_packing
from helpers.finetune.recorder import read_metrics
from helpers.finetune.results import SAME_FINETUNE
from helpers.finetune.torchrun import run_command, torchrun_command
from helpers.hardware import describe_machine

ROOT = Path(__file__).resolve().parents[2]
PACK = 1024  # tokens
EPOCHS, EVALUATIONS = 2, 16
PADDED_EXAMPLES = 4  # per step
# lora_tiny.yaml has 3e-3 for 32 examples per step; Adam's rate for a smaller batch goes with the square root.
LEARNING_RATE = 3e-3 * (PADDED_EXAMPLES / 32) ** 0.5


def write_config(path: Path, steps: int, learning_rate: float, batch: int, pack: int | None) -> Path:
    """Write lora_tiny.yaml with this many steps; the dev loss is computed sixteen times, no answers generated."""
    raw = yaml.safe_load((ROOT / "configs" / "lora_tiny.yaml").read_text(encoding="utf-8"))
    raw["training_args"] |= {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // EVALUATIONS),
        "predict_with_generate": False,
    }
    raw["training_args"].pop("num_train_epochs")
    if pack:
        raw["speed"] = {"packing": pack}
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def pack_count() -> int:
    """Count the packs of the embedded training set."""
    split = read_split(
        TINY_DATA / "train.json", ChatGLMTokenizer.from_pretrained(TINY_MODEL), Limits(64, 96), training=True
    )
    return len(best_fit_packing(split.rows["tokens"][:], capacity=PACK, seed=0))


def run_job(folder: Path, config: Path) -> Path:
    """Run the job on one rank; return its output folder, of the configuration's name."""
    output = folder / config.stem
    status = run_command(torchrun_command(TINY_DATA, TINY_MODEL, config, output_dir=output, nprocs=1))
    if status:
        sys.exit(status)
    return output


def fine_tune(folder: Path, config: Path) -> dict[str, Any]:
    """Run the job; return the examples seen and the dev loss at each evaluation."""
    records = read_metrics(run_job(folder, config) / "metrics.jsonl")
    seen, examples, losses = 0.0, [], []
    for record in records:
        if "samples_per_second" in record:
            seen += record["samples_per_second"] * record["step_seconds"]
        if "eval_loss" in record:
            examples.append(round(seen))
            losses.append(record["eval_loss"])
    return {"examples": examples, "dev_loss": losses, "steps": records[-1]["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=SAME_FINETUNE)
    arguments = parser.parse_args()
    rows = len((TINY_DATA / "train.json").read_text(encoding="utf-8").splitlines())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packs = pack_count()
        growth = rows / packs / PADDED_EXAMPLES
        ways = {
            "padded": (EPOCHS * rows // PADDED_EXAMPLES, LEARNING_RATE, PADDED_EXAMPLES, None),
            "packed, rate by the square root": (EPOCHS * packs, LEARNING_RATE * growth**0.5, 1, PACK),
            "packed, rate in proportion": (EPOCHS * packs, LEARNING_RATE * growth, 1, PACK),
        }
        runs = {
            name: fine_tune(folder, write_config(folder / f"{place}.yaml", *way)) | {"learning_rate": way[1]}
            for place, (name, way) in enumerate(ways.items())
        }
    content = {"machine": dataclasses.asdict(describe_machine()), "runs": runs}
    with atomic_write(arguments.results) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
