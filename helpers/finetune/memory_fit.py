"""Predict a job's GPU memory where it decides something, before a weight is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

from helpers.config.finetune import FinetuneConfig
from helpers.errors import UserError
from helpers.finetune.ranks import Ranks
from helpers.hardware import Machine, mixed_precision
from helpers.memory.predict import read_shape
from helpers.memory.predict.jobs import configuration_of
from helpers.memory.predict.planner import Fit, fits
from helpers.memory.units import GIB


def predicted_fit(
    config: FinetuneConfig, deepspeed: dict[str, Any] | None, model: Path, machine: Machine, ranks: Ranks, longest: int
) -> Fit | None:
    """Predict whether the smallest GPU holds the job.

    Args:
        config: Contents of ``lora.yaml``.
        deepspeed: Contents of the DeepSpeed file; None without one.
        model: The checkpoint's folder.
        machine: This machine.
        ranks: This process's place.
        longest: Tokens of the longest row.

    Returns:
        The prediction; None without a GPU whose memory size is known.

    Raises:
        UserError: No prediction covers the job.
    """
    sizes = [gpu.total_bytes for gpu in machine.gpus if gpu.total_bytes is not None]
    if not sizes:
        return None
    job = configuration_of(
        config, deepspeed, shape=read_shape(model), world_size=ranks.world_size, sequence_length=longest
    )
    # FlashAttention needs no mask, but it runs only on GPUs that have bf16: Ampere and later.
    job = dataclasses.replace(job, padding_mask=job.padding_mask or mixed_precision(machine) != "bf16")
    return fits(job, min(sizes))


def decide_checkpointing(config: FinetuneConfig, fit: Fit | None) -> tuple[FinetuneConfig, str]:
    """Decide ``gradient_checkpointing: auto``: true if the smallest GPU could not hold the job without it.

    Args:
        config: Contents of ``lora.yaml``.
        fit: The prediction without checkpointing (:func:`predicted_fit`).

    Returns:
        The configuration with the decision, and a line that gives its reason.
    """
    enable, reason = False, "no GPU here with a known memory size"
    if config.prefix:
        reason = "PREFIX_TUNING does not go with it"
    elif fit is not None:
        enable = not fit
        reason = f"{fit.needed / GIB:.1f} GiB predicted without it, {fit.usable / GIB:.1f} usable"
    training = {key: value for key, value in config.training.items() if key != "activation_checkpointing"}
    decided = dataclasses.replace(config, training=training | {"gradient_checkpointing": enable})
    return decided, f"gradient_checkpointing auto -> {str(enable).lower()}: {reason}"


def full_training_notes(
    config: FinetuneConfig, deepspeed: dict[str, Any] | None, model: Path, machine: Machine, ranks: Ranks, longest: int
) -> list[str]:
    """Describe the memory that training all parameters needs, which is a multiple of what an adapter needs.

    Args:
        config: Contents of ``lora.yaml``, with checkpointing decided.
        deepspeed: Contents of the DeepSpeed file; None without one.
        model: The checkpoint's folder.
        machine: This machine.
        ranks: This process's place.
        longest: Tokens of the longest row.

    Returns:
        A line; none for an adapter, without a GPU, or for a job that no prediction covers.
    """
    if not config.trains_all:
        return []
    try:
        fit = predicted_fit(config, deepspeed, model, machine, ranks, longest)
    except UserError:
        return []
    if fit is None:
        return []
    line = f"{fit.needed / GIB:.1f} GiB predicted on each GPU, {fit.usable / GIB:.1f} usable"
    if fit:
        return [line]
    return [f"warning: {line}; configs/ds_zero_3_offload_full.json keeps Adam's states in host memory"]
