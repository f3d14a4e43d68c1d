"""Read the blocks of ``lora.yaml`` that hold a library's options: the Trainer's and PEFT's."""

import os
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PrefixTuningConfig
from transformers import TrainingArguments

from helpers.config.adapter_names import SPLIT, translate_adapter
from helpers.config.deepspeed import AUTO
from helpers.config.options import (
    IGNORED_LORA,
    IGNORED_TRAINING,
    LORA_LIMITS,
    REFUSED_LORA,
    REFUSED_TRAINING,
    TRAINING_LIMITS,
    check_lora,
    check_training,
    settle,
)
from helpers.config.other_tools import check_known_keys
from helpers.config.prefix_options import IGNORED_PREFIX, PREFIX_LIMITS, REFUSED_PREFIX
from helpers.config.values import annotations, check_values, wants_number
from helpers.errors import UserError

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "group_by_length": "train_sampling_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
# Options of older transformers that have no effect here; accepted so that older files keep working.
DROPPED = (
    *("overwrite_output_dir", "save_safetensors", "logging_dir", "sortish_sampler", "ddp_timeout_seconds"),
    *("fp16_opt_level", "fp16_backend", "half_precision_backend", "use_mps_device", "use_ipex", "jit_mode_eval"),
    *("tpu_num_cores", "tpu_metrics_debug", "past_index", "ray_scope", "xpu_backend", "mp_parameters"),
    *("include_inputs_for_metrics", "include_tokens_per_second", "use_legacy_prediction_loop", "torchdynamo"),
    *("push_to_hub_token", "push_to_hub_model_id", "push_to_hub_organization"),
)
# Older options that asked for something else: only without a value they may pass.
REMOVED = ("sharded_ddp", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "adafactor", "dispatch_batches")
CHECKPOINTING_KEYS = ("gradient_checkpointing", "activation_checkpointing")  # transformers' old name and its new one
DEFAULT_SEED = 42
BETAS = ("adam_beta1", "adam_beta2")  # torch's Adam refuses an int next to a float


def training_setting(training: Mapping[str, Any], name: str) -> Any:
    """Look up an option of the Trainer.

    Args:
        training: Keyword arguments of ``TrainingArguments``.
        name: Of the option.

    Returns:
        Its value, or the Trainer's default.
    """
    return training.get(name, getattr(TrainingArguments, name))


def training_block(block: dict[str, Any], source: str, notes: list[str], *, scored: bool) -> dict[str, Any]:
    """Check ``training_args`` and translate older names.

    Args:
        block: The block's keys and values.
        source: The file's name, for messages.
        notes: Gets a line for each decision, and for each key without an effect.
        scored: Whether answers are generated and scored.

    Returns:
        Keyword arguments of ``TrainingArguments``.

    Raises:
        UserError: A key is unknown or cannot be used here, or a value is wrong.
    """
    where = f"{source}, training_args"
    known = annotations(TrainingArguments)
    training: dict[str, Any] = {}
    for key, value in block.items():
        if key in DROPPED:
            notes.append(f"{key} no longer has an effect and is ignored")
            continue
        name = RENAMED.get(key, key)
        if (key in REMOVED and not value) or (name in training and value is None):
            continue
        if name not in known:
            check_known_keys({key: value}, [*known, *RENAMED], where)
        if name in CHECKPOINTING_KEYS and not (value is None or isinstance(value, bool) or value == AUTO):
            raise UserError(f"{where}: {key} must be true, false or auto, not {value!r}")
        if name != key:
            notes.append(f"{key} is called {name} today")
        if key == "group_by_length":
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
            value = "group_by_length" if value else "random"
        elif key == "warmup_ratio" and isinstance(value, int | float) and not 0 <= value < 1:
            # The option that took its place reads such a number as steps.
            raise UserError(
                f"{where}: warmup_ratio must be at least 0 and below 1, not {value!r}; or give warmup_steps"
            )
        elif key == "lr_scheduler_kwargs" and isinstance(value, dict):
            value = {name: _number_or_text(item) for name, item in value.items()}
        elif name.endswith("_strategy") and value is False:
            value = "no"  # YAML 1.1 reads no, without quotes, as false
        # YAML 1.1 reads 5e-5, which has no decimal point, as text.
        training[name] = _number(value, f"{where}: {key}") if wants_number(known[name]) else value
        if name in BETAS and type(value) is int:
            training[name] = float(value)
    typed = {key: value for key, value in training.items() if key not in CHECKPOINTING_KEYS}
    check_values(typed, TrainingArguments, TRAINING_LIMITS, where)
    training = settle(training, IGNORED_TRAINING, REFUSED_TRAINING, where, notes)
    check_training(training, scored=scored, where=where)
    training["output_dir"] = os.path.expanduser(training.get("output_dir") or "./output")
    if training.get("save_strategy") == "no":
        notes.append("save_strategy no: what is trained is not kept")
    if "seed" not in training:
        training["seed"] = DEFAULT_SEED
        notes.append(f"no seed given: seed {DEFAULT_SEED}")
    return training


def _number_or_text(value: Any) -> Any:
    try:
        return _number(value, "")
    except UserError:
        return value


def _number(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{where} must be a number, not {value!r}") from None


def adapter_block(block: dict[str, Any], source: str, notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check ``peft_config``.

    Args:
        block: The block's keys and values; none if all parameters are trained.
        source: The file's name, for messages.
        notes: Gets a line for each decision, and for each key without an effect.

    Returns:
        Keyword arguments of ``LoraConfig`` and of ``PrefixTuningConfig``; those of the other one are empty.

    Raises:
        UserError: A key is unknown or cannot be used here, or a value is wrong.
    """
    if not block:
        return {}, {}
    where = f"{source}, peft_config"
    if str(block.get("task_type") or "CAUSAL_LM").upper() != "CAUSAL_LM":
        raise UserError(f"{where}: task_type {block['task_type']!r} is not supported; use CAUSAL_LM")
    block["task_type"] = "CAUSAL_LM"
    kind = str(block.pop("peft_type", "LORA")).upper()
    if kind == "PREFIX_TUNING":
        return {}, _prefix(block, where, notes)
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind!r} is not supported; use LORA or PREFIX_TUNING")
    return _lora(block, where, notes), {}


def _prefix(block: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    check_known_keys(block, annotations(PrefixTuningConfig), where)
    check_values(block, PrefixTuningConfig, PREFIX_LIMITS, where)
    block = settle(block, IGNORED_PREFIX, REFUSED_PREFIX, where, notes)
    if block.get("num_virtual_tokens") is None:
        raise UserError(f"{where}: PREFIX_TUNING needs num_virtual_tokens; the published file has 128")
    return {"task_type": "CAUSAL_LM", **block}


def _lora(block: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    check_known_keys(block, annotations(LoraConfig), where)
    check_lora(block, where)
    check_values(block, LoraConfig, LORA_LIMITS, where)
    block = settle(block, IGNORED_LORA, REFUSED_LORA, where, notes)
    targets = block.get("target_modules")
    if targets is None and block.get("target_parameters"):
        block["target_modules"] = []  # with None, PEFT names the fused matrix, which is not here
    elif targets is None:
        block["target_modules"] = list(SPLIT)  # what ChatGLM3's published adapters train
        notes.append(f"no target_modules given: LoRA on {', '.join(SPLIT)}")
    elif isinstance(targets, str) and re.fullmatch(r"\w+", targets):
        block["target_modules"] = [targets]  # a name; PEFT would take it for a pattern of whole names
    return {"task_type": "CAUSAL_LM", **translate_adapter(block, notes)}
