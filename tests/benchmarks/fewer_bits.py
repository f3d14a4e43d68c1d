"""What fewer bits for the frozen matrices cost: the same fine-tune on a base in 32 bit, in fp8, in 8 bits and in 4.

    python tests/benchmarks/fewer_bits.py [--seeds 42 43] [--results notebooks/results/fewer_bits.json]

Trains the embedded model on the embedded data with the ordinary command, lora_tiny.yaml with one option more: equally
many examples in the same order, and the same dropout. Records the dev loss and the scores of all dev answers. fp8 is
emulated on a CPU, with the rounding of a GPU; 8 and 4 bits are bitsandbytes', whose kernels differ between devices.
About twenty minutes on two idle CPU cores for two seeds.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import yaml
from jobs_6b import ROOT, commit
from same_finetune import run_job

from helpers.files import atomic_write
from helpers.finetune.recorder import read_metrics
from helpers.finetune.results import FEWER_BITS
from helpers.hardware import describe_machine

FORMATS: dict[str, dict[str, Any]] = {
    "not rounded": {},
    "fp8": {"speed": {"fp8": True}},
    "8 bits": {"quantization_bit": 8},
    "4 bits": {"quantization_bit": 4},
}


def write_config(path: Path, changes: dict[str, Any], seed: int) -> Path:
    """Write lora_tiny.yaml with ``changes``; it evaluates once in the middle, and answers at the end only."""
    raw = yaml.safe_load((ROOT / "configs" / "lora_tiny.yaml").read_text(encoding="utf-8")) | changes
    raw["training_args"] |= {"seed": seed, "save_strategy": "no", "predict_with_generate": False}
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def fine_tune(folder: Path, config: Path) -> dict[str, Any]:
    """Run the job; return the losses and the scores."""
    output = run_job(folder, config)
    records = read_metrics(output / "metrics.jsonl")
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {
        "train_loss": [record["loss"] for record in records if "loss" in record],
        "dev_loss": [record["eval_loss"] for record in records if "eval_loss" in record],
        "base_scores": run["scores"]["base"],
        "scores": run["scores"]["tuned"],
        "answers": run["scores"]["rows"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--results", type=Path, default=FEWER_BITS)
    arguments = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in arguments.seeds:
            for place, (label, changes) in enumerate(FORMATS.items()):
                config = write_config(folder / f"{seed}-{place}.yaml", changes, seed)
                runs[f"{label}, seed {seed}"] = {"format": label, "seed": seed, **fine_tune(folder, config)}
                content = {
                    "commit": commit(),
                    "machine": dataclasses.asdict(describe_machine()),
                    "bitsandbytes": bitsandbytes.__version__,
                    "runs": runs,
                }
                with atomic_write(arguments.results) as temporary:
                    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
