"""LoRA on ChatGLM3-6B's full size, each way on one GPU and on every GPU of this machine, through the ordinary command.

    python tests/benchmarks/finetune_6b.py CHECKPOINT [--only TEXT ...] [--resume] [--results FILE]

CHECKPOINT is a folder in the published layout; if it does not exist, one with random weights is written there. The
examples are as long as AdvertiseGen's (about 140 tokens), made from the embedded data set. Runs on one GPU are made
side by side, one per GPU. The last run evaluates and saves as well; its memory over time goes to a second file.
Needs GPUs with 40 GiB. ``--resume`` keeps the runs that are in the results file already.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
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
from helpers.finetune.results import RESULTS, TIMELINE, read_results
from helpers.finetune.torchrun import format_command, torchrun_command
from helpers.memory.phases import across_ranks, read_phases

ROOT = Path(__file__).resolve().parents[2]
STEPS, LOGGING_STEPS, WARM_UP_INTERVALS = 20, 4, 2
LIMIT = 240  # seconds per run
# transformers' defaults at the time of the published recipe: the logits of all tokens at once, and a padding mask.
PLAIN = {"loss_chunk": 0, "padding_mask": True}
ZERO_2, ZERO_3 = ROOT / "configs" / "ds_zero_2.json", ROOT / "configs" / "ds_zero_3.json"
LOW_MEMORY_ZERO_3 = ROOT / "configs" / "ds_zero_3_low_memory.json"
PUBLISHED_ZERO_2 = ROOT / "tests" / "data" / "published_ds_zero_2.json"
RUNNING: list[subprocess.Popen[bytes]] = []
RECORDED = "lora.yaml, evaluated and saved"


@dataclass(frozen=True)
class Run:
    """One way to fine-tune: a configuration with changes.

    Attributes:
        name: Label in tables and figures.
        config: A file of configs/.
        deepspeed: DeepSpeed JSON; None for one process or DDP.
        speed: Changes in its ``speed`` block.
        training: Changes in its ``training_args``.
        ranks: Number of ranks; None uses every GPU.
    """

    name: str
    config: str = "lora.yaml"
    deepspeed: Path | None = None
    speed: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ranks: int | None = None


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
RECORDED_RUN = Run(RECORDED, training=EVALUATION | {"generation_config": {"max_new_tokens": 48}})


def ensure_checkpoint(folder: Path) -> None:
    """Write a checkpoint with random weights if there is none."""
    if not folder.exists():
        # In its own process, so that nothing of it stays on the GPU that is measured.
        subprocess.run([sys.executable, "-m", "helpers.chatglm3.random_weights", str(folder)], check=True)
        os.sync()  # otherwise 12 GB are still being written to disk while the first run is measured


def write_rows(folder: Path) -> None:
    """Join every two examples of the embedded set into one, of AdvertiseGen's length; 16 of them to evaluate."""
    rows = [json.loads(line) for line in (TINY_DATA / "train.json").read_text(encoding="utf-8").splitlines()]
    joined = [{key: a[key] + b[key] for key in a} for a, b in zip(rows[::2], rows[1::2], strict=False)]
    for name, chosen in (("train.json", joined), ("dev.json", joined[:16])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (folder / name).write_text(text, encoding="utf-8")


def write_config(path: Path, base: str, training: dict[str, Any], speed: dict[str, Any]) -> Path:
    """Write the configuration named ``base`` to ``path`` with changes; without evaluation unless they ask for it."""
    raw = yaml.safe_load((ROOT / "configs" / base).read_text(encoding="utf-8"))
    if "eval_strategy" not in training:
        raw["data_config"].pop("val_file")
        training = {"eval_strategy": "no"} | training
    raw["training_args"] |= training
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

    def peaks(key: str) -> list[float | None]:  # None without a GPU
        each = zip(*(r[key] for r in records), strict=True)
        return [None if None in values else max(values) for values in each]

    speeds = [speed / run["world_size"] for speed in steady("tokens_per_second")]
    return {
        "ranks": run["world_size"],
        "zero_stage": zero_stage(deepspeed),
        "fp8": run["config"]["speed"]["fp8"],
        "bucket_bytes": bucket_bytes(deepspeed, element_bytes=2) if deepspeed else 0,
        "trainable_parameters": run["trainable_parameters"],
        "frozen_parameters": run["frozen_parameters"],
        "loaded_gib": run["loaded_gib"],
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


def commit() -> str | None:
    """Return the commit of this code, with a plus sign if files differ from it; None outside of a git checkout."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "helpers", "configs"], capture_output=True, text=True)
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write_results(path: Path, checkpoint: Path, runs: dict[str, dict[str, Any]], **facts: Any) -> None:
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


def label_of(run: Run, gpus: int) -> str:
    """Return the run's key in the results file."""
    ranks = run.ranks or gpus
    return f"{run.name}, {ranks} GPU{'s' if ranks > 1 else ''}"


def planned_runs(gpus: int) -> list[Run]:
    """List every way on all GPUs, the recorded run, and every way on one GPU."""
    together = [*WAYS, RECORDED_RUN] if gpus > 1 else []
    return [*together, *(Run(**(asdict(way) | {"ranks": 1})) for way in WAYS)]


def batches(runs: Sequence[Run], gpus: int) -> Iterator[Sequence[Run]]:
    """Yield the runs that are made at the same time: as many as there are GPUs if each needs one."""
    alone = [run for run in runs if run.ranks == 1]
    yield from ([run] for run in runs if run.ranks != 1)
    yield from (alone[start : start + gpus] for start in range(0, len(alone), gpus))


def execute(run: Run, gpu: int | str | None, data: Path, checkpoint: Path, output_dir: Path) -> int:
    """Fine-tune on ``gpu``, 2 or "2,3" (None: on all); write the output beside ``output_dir``; return the status."""
    few = {"max_steps": STEPS, "logging_steps": LOGGING_STEPS, "save_steps": STEPS}
    config = write_config(output_dir.with_suffix(".yaml"), run.config, few | run.training, run.speed)
    command = torchrun_command(data, checkpoint, config, run.deepspeed, output_dir=output_dir, nprocs=run.ranks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    print(f"{run.name}{'' if gpu is None else f' on GPU {gpu}'}: {format_command(command)}", flush=True)
    with output_dir.with_suffix(".log").open("w", encoding="utf-8") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        RUNNING.append(job)
        try:
            return job.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return job.wait()


def kill_all() -> None:
    """Kill what still runs, torchrun's ranks included: on a GPU they would be measured with the next run."""
    for job in RUNNING:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    RUNNING.clear()


def save_timeline(output_dir: Path, checkpoint: Path, path: Path) -> None:
    """Write the memory of the run over time and its phases into one file."""
    facts = {"random_weights": not is_published_tokenizer(checkpoint / "tokenizer.model")}
    timeline = json.loads((output_dir / "memory_timeline.json").read_text(encoding="utf-8"))
    phases = [asdict(p) for p in across_ranks(read_phases(sorted(output_dir.glob("phases-*.jsonl"))))]
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(facts | timeline | {"phases": phases}, separators=(",", ":")) + "\n", encoding="utf-8"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="+", help="texts in the names of the runs to make")
    parser.add_argument("--resume", action="store_true", help="keep the runs in the results file, make the others")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError("no GPU here; this measures the 6B model on GPUs")
    ensure_checkpoint(arguments.checkpoint)
    runs: dict[str, dict[str, Any]] = {}
    if arguments.resume and arguments.results.exists():
        kept = read_results(arguments.results)
        if kept["commit"] != arguments.commit:
            raise UserError(f"{arguments.results} is of commit {kept['commit']}; start again without --resume")
        runs = {label: run | {"machine": kept["machine"]} for label, run in kept["runs"].items()}
    wanted = [run for run in planned_runs(gpus) if not arguments.only or any(t in run.name for t in arguments.only)]
    todo = [run for run in wanted if label_of(run, gpus) not in runs]
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        for number, batch in enumerate(batches(todo, gpus)):
            outputs = [folder / f"run-{number}-{place}" for place in range(len(batch))]
            places = range(len(batch)) if batch[0].ranks == 1 else [None]
            with ThreadPoolExecutor(len(batch)) as pool:
                jobs = [
                    pool.submit(execute, run, place, folder, arguments.checkpoint, output)
                    for run, place, output in zip(batch, places, outputs, strict=True)
                ]
                try:
                    wait(jobs)
                except BaseException:  # Ctrl-C; the threads wait for their jobs
                    kill_all()
                    raise
                RUNNING.clear()
            for run, job, output in zip(batch, jobs, outputs, strict=True):
                label = label_of(run, gpus)
                if job.result():
                    print(output.with_suffix(".log").read_text(encoding="utf-8"), file=sys.stderr)
                    failed.append(f"{label} (status {job.result()})")
                    continue
                runs[label] = {"name": run.name, "config": run.config, "side_by_side": len(batch)} | summary(output)
                if run is RECORDED_RUN and arguments.results == RESULTS:
                    save_timeline(output, arguments.checkpoint, TIMELINE)
                facts = {"commit": arguments.commit, "mean_tokens": mean_tokens(next(iter(runs.values())))}
                write_results(arguments.results, arguments.checkpoint, runs, **facts)
    for label, found in runs.items():
        peaks = " / ".join(f"{peak:.2f}" for peak in found["nvml_peak_gib"])
        print(f"{label:45} {found['tokens_per_second_per_gpu']:8,.0f} tokens/s per GPU, NVML {peaks} GiB")
    if failed:
        raise UserError(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    exit_with_one_line(main)
