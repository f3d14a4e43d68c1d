"""Check the optimizer and the schedule that a DeepSpeed file brings: they replace those of ``training_args``."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.config.blocks import training_setting
from helpers.config.deepspeed import AUTO
from helpers.config.deepspeed_defaults import OPTIMIZER_PARAMS
from helpers.config.values import suggest
from helpers.errors import UserError

# Those of DeepSpeed that train under ZeRO on CPUs and GPUs, without a package or a backend of their own.
OPTIMIZERS = ("Adam", "AdamW", "Adagrad", "Lion")


def check_deepspeed_optimizer(
    deepspeed: Mapping[str, Any], training: Mapping[str, Any], path: Path, notes: list[str]
) -> None:
    """Detect what DeepSpeed would notice only when the model is loaded, and report what the file replaces.

    Args:
        deepspeed: Contents of the file.
        training: Keyword arguments of ``TrainingArguments``.
        path: The file, for messages.
        notes: Gets a line for an optimizer or a schedule of ``training_args`` that is not used.

    Raises:
        UserError: A type is unknown, or the schedule does not take its parameters.
    """
    optimizer, scheduler = deepspeed.get("optimizer"), deepspeed.get("scheduler")
    if optimizer is not None:
        kind = optimizer["type"]
        if kind.lower() not in map(str.lower, OPTIMIZERS):
            raise UserError(
                f"{path}: optimizer.type {kind!r} is not supported; use {', '.join(OPTIMIZERS)}, or remove the block "
                "and give optim under training_args"
            )
        _check_optimizer_params(kind, optimizer.get("params", {}), path)
        given = training.get("optim")
        if given is not None and not (given.startswith("adamw_torch") and kind.lower().startswith("adam")):
            notes.append(f"optim {given} is ignored: {path.name} brings the optimizer {kind}")
    if scheduler is not None:
        _build_schedule(scheduler, training, path)
        name = training.get("lr_scheduler_type", "linear")
        notes.append(f"lr_scheduler_type {name} is ignored: {path.name} brings the schedule {scheduler['type']}")


def _check_optimizer_params(kind: str, params: Mapping[str, Any], path: Path) -> None:
    """Check names and values as the optimizers of DeepSpeed take them."""
    known = {**dict.fromkeys(OPTIMIZER_PARAMS[kind.lower()]), "fp32_optimizer_states": None}
    if kind.lower().startswith("adam"):
        known |= dict.fromkeys(("torch_adam", "adam_w_mode", "bias_correction", "amsgrad"))
    for key, value in params.items():
        where = f"{path}: optimizer.params.{key}"
        if key == "max_grad_norm":
            raise UserError(f"{where} is not an option of an optimizer; give gradient_clipping at the top of the file")
        if key not in known:
            raise UserError(f"{where} is not an option of {kind}{suggest(key, known)}")
        if value == AUTO:
            continue
        wanted = "true or false"
        fits = isinstance(value, bool)
        if key in OPTIMIZER_PARAMS["adam"]:
            numbers = value if key == "betas" and isinstance(value, list) else [value]
            fits = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
            fits &= (len(numbers) == 2) == (key == "betas")
            wanted = "two numbers" if key == "betas" else "a number of at least 0"
        if not fits:
            raise UserError(f"{where} must be {wanted}, not {json.dumps(value)}")


def _build_schedule(scheduler: Mapping[str, Any], training: Mapping[str, Any], path: Path) -> None:
    """Build the schedule as DeepSpeed will, with stand-ins for "auto"."""
    # Here, because importing DeepSpeed takes seconds and looks for a GPU.
    from deepspeed.runtime import lr_schedules

    kind, given = scheduler["type"], scheduler.get("params", {})
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        raise UserError(f"{path}: scheduler.type {kind!r} is unknown; known are {known}")
    rate = training_setting(training, "learning_rate")
    # The keys that the Trainer fills; of steps it knows the number only when the data are read.
    stand_ins = {"warmup_min_lr": 0.0, "warmup_max_lr": rate, "warmup_num_steps": 1, "total_num_steps": 2}
    unknown = [key for key, value in given.items() if value == AUTO and key not in stand_ins]
    if unknown:
        raise UserError(f'{path}: scheduler.params.{unknown[0]} is "auto", which the Trainer cannot fill; give a value')
    params = {key: stand_ins[key] if value == AUTO else value for key, value in given.items()}
    try:
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=rate)  # AdamW: OneCycle wants an optimizer with betas
        schedule = getattr(lr_schedules, kind)(optimizer, **params)
        optimizer.step()
        schedule.step()
    except (TypeError, ValueError, KeyError, AssertionError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: scheduler {kind} does not take its params {dict(given)}: {reason}") from error


def optimizer_pairs(
    deepspeed: Mapping[str, Any], training: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any], str, Any]]:
    """List which values of the file's optimizer and schedule must agree with ``training_args``.

    Args:
        deepspeed: Contents of the DeepSpeed file.
        training: Keyword arguments of ``TrainingArguments``; missing keys have its defaults.

    Returns:
        For each: the key, the block that may have it, and the name and value that the configuration has.
    """
    setting = partial(training_setting, training)
    optimizer, schedule = (deepspeed.get(key, {}).get("params", {}) for key in ("optimizer", "scheduler"))
    pairs = [
        ("lr", optimizer, "learning_rate", setting("learning_rate")),
        ("betas", optimizer, "adam_beta1 and adam_beta2", [setting("adam_beta1"), setting("adam_beta2")]),
        ("eps", optimizer, "adam_epsilon", setting("adam_epsilon")),
        ("weight_decay", optimizer, "weight_decay", setting("weight_decay")),
        ("warmup_max_lr", schedule, "learning_rate", setting("learning_rate")),
    ]
    max_steps, warmup = setting("max_steps"), setting("warmup_steps")
    if max_steps > 0:
        pairs.append(("total_num_steps", schedule, "max_steps", max_steps))
    if max_steps > 0 or warmup >= 1 or not warmup:
        # As the Trainer counts them: below 1 it is a share, and DeepSpeed wants at least one step.
        steps = int(warmup) if warmup >= 1 else math.ceil(max_steps * warmup)
        pairs.append(("warmup_num_steps", schedule, "warmup_steps", max(1, steps)))
    return pairs
