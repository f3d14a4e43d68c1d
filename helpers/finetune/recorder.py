"""Record a run while it trains: ``metrics.jsonl``, and a progress line on the terminal."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.errors import UserError
from helpers.files import atomic_write
from helpers.finetune.ranks import Ranks
from helpers.memory.nvml import open_nvml
from helpers.memory.phases import phase
from helpers.memory.units import GIB


class WorkCounter:
    """Count the tokens and examples this rank has trained on since the last reading; padding does not count."""

    def __init__(self) -> None:
        self.tokens = 0
        self.rows = 0

    def add(self, tokens: int, rows: int) -> None:
        self.tokens += tokens
        self.rows += rows

    def read_and_reset(self) -> tuple[int, int]:
        """Return tokens and examples, and start again at zero."""
        counted = self.tokens, self.rows
        self.tokens = self.rows = 0
        return counted


def read_memory(device: torch.device) -> dict[str, float | None]:
    """Read this rank's memory, in GiB; None without a GPU or without an NVIDIA driver.

    NVML's reading of its GPU, the peaks of torch's allocator since the last call, and the process's resident memory on
    the host.
    """
    on_gpu = device.type == "cuda"
    used = open_nvml().used_bytes(device.index) if on_gpu else None
    memory = {
        "nvml_used_gib": None if used is None else used / GIB,
        "torch_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None,
        "torch_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB if on_gpu else None,
        "resident_gib": psutil.Process().memory_info().rss / GIB,
    }
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    return memory


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's ``value``, in order of rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``.

    Args:
        path: The file.

    Returns:
        One record per logged step or evaluation; an empty list if the file does not exist. A last line that was only
        half written does not count.

    Raises:
        UserError: Another line is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not a record of a step; delete the line") from error
        records.append(record)
    return records


def format_time_left(seconds: float) -> str:
    """Return "1:02:05 left", or "2:05 left" below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def progress_line(record: dict[str, Any], max_steps: int, seconds_left: float | None) -> str:
    """Format a record of ``metrics.jsonl`` as one line."""
    parts = [f"step {record['step']}/{max_steps}"]
    shown = {"loss": ".3f", "eval_loss": ".3f", "eval_rouge_l": ".1f", "learning_rate": ".1e", "grad_norm": ".2f"}
    parts += [f"{key.replace('_', ' ')} {record[key]:{form}}" for key, form in shown.items() if key in record]
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    nvml = [used for used in record["nvml_used_gib"] if used is not None]
    name, used = ("NVML", nvml) if nvml else ("resident", record["resident_gib"])
    parts.append(f"{name} {' / '.join(f'{gib:.1f}' for gib in used)} GiB")
    if seconds_left is not None:
        parts.append(format_time_left(seconds_left))
    return "  ".join(parts)


class FirstStepMarker(TrainerCallback):
    """Mark the first optimizer step as a phase: it allocates what the later ones reuse, and compiles what they run."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._seen = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self._seen:
            self._seen = True
            self._open.enter_context(phase("first step"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._open.close()


class Recorder(TrainerCallback):
    """Append a record to ``metrics.jsonl`` at each logging step, and print it.

    Speeds are totals over all ranks, and count only the time spent training, not evaluation and saving.
    """

    def __init__(self, path: Path, ranks: Ranks, counter: WorkCounter) -> None:
        self.path = path
        self.ranks = ranks
        self.counter = counter
        self._training_seconds = 0.0
        self._resumed = time.perf_counter()  # when training last started, or continued after a pause
        self._interval_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._resumed = time.perf_counter()
        self._first_step = self._last_step = state.global_step
        if self.ranks.is_first:
            # A resumed run repeats the steps after its checkpoint, so drop the records of their first try.
            kept = [r for r in read_metrics(self.path) if r["step"] <= state.global_step]
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        now = time.perf_counter()
        self._interval_seconds += now - self._resumed
        self._resumed = now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._resumed = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._resumed = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        training_keys = ("loss", "grad_norm", "learning_rate", "epoch")
        record: dict[str, Any] = {"step": state.global_step, "time": time.time()}
        record |= {key: logs[key] for key in logs if key in training_keys or key.startswith("eval_")}
        if not {"loss", "eval_loss", "eval_rouge_l"} & record.keys():
            return
        tokens, rows = self.counter.read_and_reset() if "loss" in record else (0, 0)
        by_rank = gather_objects((tokens, rows, read_memory(args.device)))
        if "loss" in record:
            seconds, self._interval_seconds = self._interval_seconds, 0.0
            self._training_seconds += seconds
            if seconds > 0:
                record["tokens_per_second"] = sum(tokens for tokens, _, _ in by_rank) / seconds
                record["samples_per_second"] = sum(rows for _, rows, _ in by_rank) / seconds
                record["step_seconds"] = seconds / max(1, state.global_step - self._last_step)
            self._last_step = state.global_step
        record |= {key: [memory[key] for _, _, memory in by_rank] for key in by_rank[0][2]}
        if self.ranks.is_first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            done = self._last_step - self._first_step
            left = self._training_seconds / done * (state.max_steps - state.global_step) if done else None
            print(progress_line(record, state.max_steps, left), flush=True)
