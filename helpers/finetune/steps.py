"""Count the optimizer steps before training, and compare them with what was done."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from helpers.config.blocks import training_setting
from helpers.errors import UserError
from helpers.files import read_json_object


def planned_steps(training: Mapping[str, Any], rows: int, world_size: int) -> int:
    """Count the optimizer steps that the Trainer will make.

    Args:
        training: Keyword arguments of ``TrainingArguments``.
        rows: Training rows, or packs.
        world_size: Number of ranks.

    Returns:
        The steps; 0 if ``dataloader_drop_last`` drops everything.
    """
    setting = partial(training_setting, training)
    # As accelerate divides batches among ranks: drop the rest, or give each rank equally many.
    whole = math.floor if setting("dataloader_drop_last") else math.ceil
    batches = whole(whole(rows / setting("per_device_train_batch_size")) / world_size)
    if batches == 0:
        return 0
    if setting("max_steps") > 0:
        return setting("max_steps")
    return math.ceil(setting("num_train_epochs") * math.ceil(batches / setting("gradient_accumulation_steps")))


def check_rows_fill_a_batch(planned: int, training: Mapping[str, Any], rows: int, world_size: int) -> None:
    """Raise UserError if no step would be made, which the Trainer takes for a finished training."""
    if planned == 0:
        batch = training_setting(training, "per_device_train_batch_size")
        raise UserError(
            f"training_args: dataloader_drop_last drops everything: {rows} rows fill no batch of {batch} on "
            f"each of {world_size} rank(s); remove it, or lower per_device_train_batch_size"
        )


def check_completed(step: int, planned: int) -> None:
    """Raise UserError if training ended early without having been stopped."""
    if step < planned:
        raise UserError(f"training ended after step {step} of {planned}; the output above may say why")


def finished_line(resume_from: Path | None, training: Mapping[str, Any], planned: int) -> str | None:
    """Say that a run to resume has nothing left to do; None if it has, or if the job starts fresh.

    Args:
        resume_from: The checkpoint to continue from.
        training: Keyword arguments of ``TrainingArguments``.
        planned: The steps of the whole training.

    Returns:
        One line with what to do to train longer.
    """
    if resume_from is None or int(resume_from.name.rpartition("-")[2]) < planned:
        return None
    option = "max_steps" if training.get("max_steps", -1) > 0 else "num_train_epochs"
    return (
        f"finished: {resume_from} is the last of {planned:,} steps, so there is nothing to do; raise {option} to go on"
    )


def check_scored(checkpoint: Path) -> None:
    """Raise UserError if a run that made all its steps did not end well after them, according to its ``run.json``.

    Args:
        checkpoint: Its last checkpoint.
    """
    status = read_json_object(checkpoint.parent / "run.json", f"no run.json next to {checkpoint}").get("status")
    if status != "finished":
        raise UserError(
            f"all steps are in {checkpoint}, but the run ended as {status!r} after them: score the checkpoint with "
            "python -m helpers.finetune.evaluate, or raise max_steps to train on"
        )
