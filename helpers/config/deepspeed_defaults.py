"""Complete a DeepSpeed file by "auto": what it leaves open would get DeepSpeed's defaults, not those of the job.

Without ``gradient_clipping`` DeepSpeed does not clip, without ``gradient_accumulation_steps`` it steps after each
micro-batch, without ``lr`` it takes 1e-3, and without any batch size it does not start.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.config.deepspeed import AUTO, zero_stage

SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# What each type takes of the options that the Trainer fills in.
OPTIMIZER_PARAMS = {
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "adagrad": ("lr", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
}
SCHEDULER_PARAMS = {
    "WarmupLR": ("warmup_max_lr",),
    "WarmupDecayLR": ("warmup_max_lr", "total_num_steps"),
    "WarmupCosineLR": ("total_num_steps",),
}


def with_defaults(deepspeed: Mapping[str, Any], path: Path, notes: list[str]) -> dict[str, Any]:
    """Add what a DeepSpeed file leaves open.

    Args:
        deepspeed: Its contents; not modified.
        path: The file, for the note.
        notes: Gets a line if something was left open that DeepSpeed would decide otherwise.

    Returns:
        A copy with "auto" where ``training_args`` decide, and ZeRO-0 if the file names no stage.
    """
    completed = copy.deepcopy(dict(deepspeed))
    completed.setdefault("zero_optimization", {"stage": 0})
    missing = [key for key in SIZES if key not in completed]
    completed |= dict.fromkeys(missing, AUTO)
    for block, known in (("optimizer", OPTIMIZER_PARAMS), ("scheduler", SCHEDULER_PARAMS)):
        if block not in completed:
            continue
        kind = completed[block]["type"]
        params = completed[block].setdefault("params", {})
        added = [key for key in known.get(kind.lower() if block == "optimizer" else kind, ()) if key not in params]
        params |= dict.fromkeys(added, AUTO)
        missing += [f"{block}.params.{key}" for key in added]
    offload = completed["zero_optimization"].get("offload_param") or {}
    if offload.get("device", "none") != "none" and zero_stage(completed) != 3:
        notes.append("offload_param is ignored: only ZeRO-3 can move parameters to the host")
    if missing:
        notes.append(f"{path.name} leaves {', '.join(missing)} open: training_args decide")
    return completed
