"""Runs of the ordinary fine-tuning command on ChatGLM3-6B's full size, as the benchmarks of the job make them.

Runs on one GPU are made side by side, one per GPU. What every benchmark needs is here: a checkpoint, rows as long as
AdvertiseGen's, a configuration limited to a few steps, and the summary of a run for the results file.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from helpers.assets import TINY_DATA
from helpers.chatglm3.tokenizer import is_published_tokenizer
from helpers.config.deepspeed import bucket_bytes, zero_stage
from helpers.errors import UserError
from helpers.files import atomic_write
from helpers.finetune.recorder import read_metrics
from helpers.finetune.results import read_results
from helpers.finetune.torchrun import format_command, torchrun_command
from helpers.hardware import describe_machine

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_INTERVALS = 2
LIMIT = 240  # seconds per run
# transformers' defaults at the time of the published recipe: the logits of all tokens at once, and a padding mask.
PLAIN = {"loss_chunk": 0, "padding_mask": True}
PUBLISHED_ZERO_2 = ROOT / "tests" / "data" / "published_ds_zero_2.json"
RUNNING: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Run:
    """One way to fine-tune: a configuration with changes.

    Attributes:
        name: Label in tables and figures.
        config: A file of configs/.
        deepspeed: DeepSpeed JSON; None for one process or DDP.
        speed: Changes in its ``speed`` block.
        training: Changes in its ``training_args``.
        ranks: Number of ranks.
        script: Started in place of the command, with its arguments; None for the command itself.
    """

    name: str
    config: str = "lora.yaml"
    deepspeed: Path | None = None
    speed: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    script: Path | None = None


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


def kept_runs(path: Path, commit: str | None) -> dict[str, dict[str, Any]]:
    """Read the runs that a benchmark was interrupted after; none if there is no file.

    Raises:
        UserError: They are of another commit.
    """
    if not path.exists():
        return {}
    kept = read_results(path)
    if kept["commit"] != commit:
        raise UserError(f"{path} is of commit {kept['commit']}; start again without --resume")
    return {label: run | {"machine": kept["machine"]} for label, run in kept["runs"].items()}


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


def choose(runs: dict[str, Run], texts: Sequence[str] | None) -> dict[str, Run]:
    """Return the runs, by label, whose label contains one of the texts of ``--only``; all if there is no text.

    Raises:
        UserError: A text is in no label.
    """
    for text in texts or []:
        if not any(text in label for label in runs):
            raise UserError(f"--only {text!r} is in no label of a run; the labels are: {'; '.join(runs)}")
    return {label: run for label, run in runs.items() if not texts or any(text in label for text in texts)}


def side_by_side(runs: Sequence[Run], gpus: int) -> list[list[Run]]:
    """Group runs that can be made at once on ``gpus`` GPUs, each of which one run uses; the widest runs come first."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: -run.ranks):
        free = (group for group in groups if sum(other.ranks for other in group) + run.ranks <= gpus)
        group = next(free, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def execute(groups: Sequence[Sequence[Run]], data: Path, checkpoint: Path, folder: Path) -> Iterator[list[Path | str]]:
    """Make groups of runs, one group after the other.

    Args:
        groups: From :func:`side_by_side`; on a machine without a GPU, one run each.
        data: Folder with the rows.
        checkpoint: Of the model.
        folder: For the runs' configurations, logs and outputs.

    Returns:
        An iterator of lists. Each run of a group has the folder of its output, or one line that says why it failed;
        its log has been printed then.
    """
    folder.mkdir(exist_ok=True)
    for number, group in enumerate(groups):
        outputs = [folder / f"run-{number}-{place}" for place in range(len(group))]
        firsts = [sum(run.ranks for run in group[:place]) for place in range(len(group))]
        with ThreadPoolExecutor(len(group)) as pool:
            jobs = [
                pool.submit(_execute_one, run, first, data, checkpoint, output)
                for run, first, output in zip(group, firsts, outputs, strict=True)
            ]
            try:
                wait(jobs)
            except BaseException:  # Ctrl-C; the threads wait for their jobs
                kill_all()
                raise
            RUNNING.clear()
        yield [_failure(job.result(), out) if job.result() else out for job, out in zip(jobs, outputs, strict=True)]


def _execute_one(run: Run, first_gpu: int, data: Path, checkpoint: Path, output_dir: Path) -> int:
    """Fine-tune on ``run.ranks`` GPUs from the given one on; write the output beside the folder; return the status."""
    config = write_config(output_dir.with_suffix(".yaml"), run.config, run.training, run.speed)
    command = torchrun_command(data, checkpoint, config, run.deepspeed, output_dir=output_dir, nprocs=run.ranks)
    if run.script:
        module = command.index("-m", 2)  # the first -m starts torchrun
        command[module : module + 2] = [str(run.script)]
    environment = {"OMP_NUM_THREADS": "1"}
    if describe_machine().gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first_gpu, first_gpu + run.ranks)))
    print(f"{run.name}: {format_command(command)}", flush=True)
    with output_dir.with_suffix(".log").open("w", encoding="utf-8") as log:
        job = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.append(job)
        try:
            return job.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return job.wait()


def _failure(status: int, output_dir: Path) -> str:
    text = output_dir.with_suffix(".log").read_text(encoding="utf-8")
    print(text, file=sys.stderr, flush=True)
    lines = text.splitlines()
    return next((line for line in lines if "error:" in line), f"status {status}")


def kill_all() -> None:
    """Kill what still runs, torchrun's ranks included: on a GPU they would be measured with the next run."""
    for job in RUNNING:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    RUNNING.clear()
