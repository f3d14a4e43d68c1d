"""Faults to inject into a fine-tune, drawn by a random generator: what is broken, and how a run is judged."""

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from helpers.config.values import annotations, wants_number
from helpers.finetune.checkpoints import MANIFEST, file_hash, find_damage, numbered_checkpoints
from helpers.finetune.recorder import read_metrics

STEPS, SAVE_STEPS = 12, 2
# A signal at this step stops the job before its end: ranks agree a step or two later.
LATEST_KILL = STEPS - 4
GOOD = ("identical", "refused", "valid")  # verdicts
# Under these values a run would only be long, or wait for what this machine does not have.
LONG = ("max_steps", "num_train_epochs", "gradient_accumulation_steps", "per_device_train_batch_size", "ddp_timeout")
VALUES = (
    *("two", "", "1", "\u0000", "路径", "null", "[]", -1, 0, 1, 2**70, 0.5, -0.5, math.nan, math.inf),
    *(True, False, None, [], [1], ["q_proj", 1], {}, {"a": 1}, [[]]),
)
ROWS = (
    *(b"{", b"}", b"[]", b"null", b"3", b'"text"', b"\xff\xfe{}", b"\x00", b"{'content': 'x'}", b"[" * 50_000),
    *(b'{"content": "a"}', b'{"summary": "a"}', b'{"content": 1, "summary": "a"}', b'{"content": "a", "summary": {}}'),
    *(b'{"content": ["a"], "summary": "a"}', b'{"content": "a", "summary": ""}', b'{"conversations": []}'),
    *(b'{"conversations": {}}', b'{"conversations": [{"role": "assistant", "content": "a"}]}', b"{}"),
    *(b'{"conversations": [{"role": "nobody", "content": "a"}]}', b'{"conversations": [{"role": "user"}]}'),
    *(b'{"messages": [{"role": "user", "content": "a"}]}', b'{"content": "\\ud800", "summary": "a"}'),
    *(b'{"content": "a", "summary": "b"', b'{"content": "a", "summary": NaN}', b'{"content": "a", "content": 2}'),
)
REFUSED_CHANGES = (
    *(
        {"training_args": {key: value}}
        for key, value in (("lr_scheduler_type", "reduce_lr_on_plateau"), ("optim", "sgd"))
    ),
    *({"peft_config": {key: value}} for key, value in (("r", 8), ("lora_alpha", 4), ("use_rslora", True))),
    *({"peft_config": {"target_modules": names}} for names in (["q_proj"], ["q_proj", "k_proj", "o_proj"])),
)
FREE_CHANGES = (
    *({"training_args": {key: value}} for key, value in (("save_steps", 3), ("save_total_limit", 1))),
    *({"training_args": {key: value}} for key, value in (("report_to", "none"), ("dataloader_num_workers", 1))),
)


@dataclass
class Run:
    """How a launch ended: status, output, and the processes that it left behind."""

    status: int
    stdout: str
    stderr: str
    left: list[int]

    def fault(self) -> str:
        """What no run may do, whatever happened to it."""
        if self.left:
            return "orphan"
        return "traceback" if "Traceback (most recent" in self.stdout + self.stderr else ""

    def verdict_of_refusal(self) -> str:
        """Of a run that had to end with one clear line."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if fault := self.fault():
            return fault
        if self.status == 0:
            return "not refused"
        return "refused" if len(errors) == len(lines) == 1 else "no clear line" if not errors else "several lines"


def results(output: Path) -> tuple[Any, ...]:
    """What training has computed: loss, gradient norm and learning rate of each step, and the last adapter."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    steps = [tuple(record.get(key) for key in keys) for record in read_metrics(output / "metrics.jsonl")]
    return steps, file_hash(output / f"checkpoint-{STEPS}" / "adapter_model.safetensors")


def verdict_of_result(run: Run, output: Path, reference: Path) -> str:
    """Of a run that had to end as if nothing had happened."""
    if fault := run.fault():
        return fault
    if run.status:
        return "failed"
    try:
        return "identical" if results(output) == results(reference) else "different result"
    except (OSError, ValueError):
        return "no result"


def checkpoints_fault(output: Path, least: int) -> str:
    """Whether a finished checkpoint is damaged, or all up to step ``least`` are lost."""
    finished = [path for path in numbered_checkpoints(output) if (path / MANIFEST).exists()]
    if any(find_damage(path) for path in finished):
        return "mixed checkpoint"
    newest = int(finished[-1].name.removeprefix("checkpoint-")) if finished else 0
    return "lost checkpoint" if newest < least else ""


# --- what is broken -----------------------------------------------------------------------------------------------


def draw_kill(rng: random.Random, ranks: int) -> dict[str, Any]:
    """A signal to one rank, after the first checkpoint and before the last steps, or while saving."""
    during = rng.choice(("step", "save"))
    first, apart = (SAVE_STEPS + 1, 1) if during == "step" else (2 * SAVE_STEPS, SAVE_STEPS)
    steps = range(first, LATEST_KILL + 1, apart)
    return {
        "rank": rng.randrange(ranks),
        "signal": rng.choice(("KILL", "KILL", "TERM", "INT", "HUP", "STOP+KILL")),
        "during": during,
        "step": rng.choice(steps),
        "delay": rng.choice((0.0, round(rng.uniform(0, 0.1), 4))),
        "latest": LATEST_KILL,
    }


def damage(rng: random.Random, checkpoint: Path) -> str:
    """Damage a file of a checkpoint; returns what was done."""
    path = rng.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "README.md"))
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    how = rng.choice(("truncate", "empty", "flip", "zero", "extend", "delete", "folder"))
    if how in ("delete", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        if how == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif how == "zero":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        elif how == "extend":
            content += b"\x00"
        else:
            del content[0 if how == "empty" else at :]
        path.write_bytes(content)
    return f"{how} {path.relative_to(checkpoint).as_posix().replace(checkpoint.name, 'N')}"


def mutate_configuration(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A value drawn for a random key, or a key that is misspelt; and "valid" if the library takes that value."""
    block, options = rng.choice((("training_args", TrainingArguments), ("peft_config", LoraConfig)))
    known = annotations(options)
    key, value = rng.choice(sorted(known)), rng.choice(VALUES)
    if rng.random() < 0.2:
        at = rng.randrange(len(key))
        return {block: {key[:at] + key[at + 1 :] + rng.choice("xyz"): value}}, ""
    if key in LONG and isinstance(value, int) and value > 1:
        value = -1
    if block == "training_args" and isinstance(value, str) and value.isdecimal() and wants_number(known[key]):
        return {block: {key: value}}, "valid"  # a number in quotes is read as one: YAML takes 5e-5 for text
    try:
        adapter = TypeAdapter(known[key], config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return {block: {key: value}}, ""
    except Exception:  # an annotation that pydantic does not know says nothing about the value
        return {block: {key: value}}, "valid"
    return {block: {key: value}}, "valid"


def break_rows(rng: random.Random, source: Path, target: Path) -> str:
    """Copy the data with a row that is none; returns the row."""
    shutil.copytree(source, target)
    path = target / "train.json"
    lines = path.read_bytes().splitlines()
    row = rng.choice(ROWS)
    lines[rng.randrange(len(lines))] = row
    path.write_bytes(b"\n".join(lines) + b"\n")
    return row[:60].decode("utf-8", "backslashreplace")


def run_file_status(output: Path) -> str | None:
    """The status in ``run.json``; None without one."""
    try:
        return json.loads((output / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError):
        return None
