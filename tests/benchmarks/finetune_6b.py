"""LoRA on ChatGLM3-6B's full size, each way on one GPU and on every GPU of this machine, through the ordinary command.

    python tests/benchmarks/finetune_6b.py CHECKPOINT [--only TEXT ...] [--resume] [--results FILE]

CHECKPOINT is a folder in the published layout; if it does not exist, one with random weights is written there. The
examples are as long as AdvertiseGen's (about 140 tokens), made from the embedded data set. Runs on one GPU are made
side by side, one per GPU. The last run on all GPUs evaluates and saves as well; its memory over time goes to a second
file. Needs GPUs with 40 GiB. ``--resume`` keeps the runs that are in the results file already.
"""

import argparse
import json
import signal
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jobs_6b import (
    PLAIN,
    PUBLISHED_ZERO_2,
    ROOT,
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

from helpers.chatglm3.tokenizer import is_published_tokenizer
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.finetune.results import RESULTS
from helpers.memory.phases import across_ranks, read_phases

STEPS, LOGGING_STEPS = 20, 4
FEW_STEPS = {"max_steps": STEPS, "logging_steps": LOGGING_STEPS, "save_steps": STEPS}
ZERO_2, ZERO_3 = ROOT / "configs" / "ds_zero_2.json", ROOT / "configs" / "ds_zero_3.json"
LOW_MEMORY_ZERO_3 = ROOT / "configs" / "ds_zero_3_low_memory.json"
FSDP2_TRAIN = Path(__file__).with_name("fsdp2_train.py")
RECORDED = "lora.yaml, evaluated and saved"

WAYS = [
    Run("DDP", speed=PLAIN),
    Run("ZeRO-2", deepspeed=ZERO_2, speed=PLAIN),
    Run("ZeRO-2, published 5e8 buckets", deepspeed=PUBLISHED_ZERO_2, speed=PLAIN),
    Run("ZeRO-3", deepspeed=ZERO_3, speed=PLAIN),
    Run("lora_fast.yaml", "lora_fast.yaml"),
    Run("lora_fast.yaml, ZeRO-3", "lora_fast.yaml", ZERO_3),
    Run("lora_fast.yaml, not compiled, ZeRO-3", "lora_fast.yaml", ZERO_3, {"compile_layers": False}),
    Run("lora_fp8.yaml", "lora_fp8.yaml"),
    Run("lora_14gb.yaml", "lora_14gb.yaml"),
    Run("qlora.yaml", "qlora.yaml"),
    Run("lora_24gb.yaml", "lora_24gb.yaml"),
    Run("lora_16gb.yaml", "lora_16gb.yaml"),
    Run("lora.yaml, checkpointing, ZeRO-3", deepspeed=ZERO_3, training={"gradient_checkpointing": True}),
    Run(
        "lora.yaml, checkpointing, ds_zero_3_low_memory.json",
        deepspeed=LOW_MEMORY_ZERO_3,
        speed={"loss_chunk": 128},
        training={"gradient_checkpointing": True},
    ),
]
# Random weights never end an answer, so its length is limited.
EVALUATION = {"eval_strategy": "steps", "eval_steps": STEPS // 2, "save_steps": STEPS // 2}
ON_ALL_GPUS = [
    Run("lora_fast.yaml, FSDP2", "lora_fast.yaml", training={"save_strategy": "no"}, script=FSDP2_TRAIN),
    Run(RECORDED, training=EVALUATION | {"generation_config": {"max_new_tokens": 48}}),
]


def timeline_of(results: Path) -> Path:
    """Return the file beside the results that gets the recorded run's memory; TIMELINE beside RESULTS."""
    return results.with_name(f"{results.stem}_timeline.json")


def save_timeline(output_dir: Path, checkpoint: Path, path: Path) -> None:
    """Write the memory of the run over time and its phases into one file."""
    facts = {"random_weights": not is_published_tokenizer(checkpoint / "tokenizer.model")}
    timeline = json.loads((output_dir / "memory_timeline.json").read_text(encoding="utf-8"))
    phases = [asdict(p) for p in across_ranks(read_phases(sorted(output_dir.glob("phases-*.jsonl"))))]
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(facts | timeline | {"phases": phases}, separators=(",", ":")) + "\n", encoding="utf-8"
        )


def label_of(run: Run) -> str:
    """Return the run's key in the results file."""
    return f"{run.name}, {run.ranks} GPU{'s' if run.ranks > 1 else ''}"


def planned_runs(gpus: int) -> list[Run]:
    """List every way on all GPUs, what is made on all GPUs only, and every way on one GPU."""
    together = [replace(run, ranks=gpus) for run in (*WAYS, *ON_ALL_GPUS)] if gpus > 1 else []
    return [replace(run, training=FEW_STEPS | run.training) for run in (*together, *WAYS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="+", help="texts in the labels of the runs to make, as: 'DDP, 2 GPUs'")
    parser.add_argument("--resume", action="store_true", help="keep the runs in the results file, make the others")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    chosen = choose({label_of(run): run for run in planned_runs(gpus)}, arguments.only)
    ensure_checkpoint(arguments.checkpoint)
    runs = kept_runs(arguments.results, arguments.commit) if arguments.resume else {}
    groups = side_by_side([run for label, run in chosen.items() if label not in runs], gpus)
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        for group, outcomes in zip(groups, execute(groups, folder, arguments.checkpoint, folder), strict=True):
            for run, outcome in zip(group, outcomes, strict=True):
                label = label_of(run)
                if isinstance(outcome, str):
                    failed.append(f"{label} ({outcome})")
                    continue
                runs[label] = {"name": run.name, "config": run.config, "side_by_side": len(group)} | summary(outcome)
                if run.name == RECORDED:
                    save_timeline(outcome, arguments.checkpoint, timeline_of(arguments.results))
                facts = {"commit": arguments.commit, "mean_tokens": mean_tokens(next(iter(runs.values())))}
                write_results(arguments.results, arguments.checkpoint, runs, **facts)
    for label, found in runs.items():
        peaks = " / ".join(f"{peak:.2f}" for peak in found["nvml_peak_gib"])
        print(f"{label:45} {found['tokens_per_second_per_gpu']:8,.0f} tokens/s per GPU, NVML {peaks} GiB")
    if failed:
        raise UserError(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    exit_with_one_line(main)
