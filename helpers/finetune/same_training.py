"""Record what decides a training, and compare: a checkpoint continues only the training that it belongs to."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from helpers.config.deepspeed import zero_stage
from helpers.config.finetune import FinetuneConfig
from helpers.errors import UserError
from helpers.finetune.checkpoints import file_hash, read_manifest

FRESH = "start fresh with another --output-dir"
# Options that change what a run says, keeps or takes, but not what it trains. All others have to stay.
_FREE_PREFIXES = ("logging_", "log_", "eval_", "save_", "ddp_", "trackio_", "torch_empty_cache_")
_FREE = {
    *("output_dir", "report_to", "run_name", "project", "debug", "skip_memory_metrics", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "include_num_input_tokens_seen"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "tf32", "full_determinism", "ignore_data_skip"),
    "restore_callback_states_from_checkpoint",
    *("bf16", "fp16", "use_cpu"),  # compared as the precision that follows from them
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # compared as rows in a step
    *("max_steps", "num_train_epochs"),  # a run may be made longer
}
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def training_facts(
    config: FinetuneConfig,
    deepspeed: Mapping[str, Any] | None,
    *,
    precision: str,
    world_size: int,
    model_dir: Path,
    train_file: Path,
) -> dict[str, Any]:
    """Collect what decides a training.

    Args:
        config: Contents of ``lora.yaml``.
        deepspeed: Contents of the DeepSpeed file; None without one.
        precision: "bf16", "fp16" or "no".
        world_size: Number of ranks.
        model_dir: Folder of the base model.
        train_file: The rows.

    Returns:
        The facts, as JSON has them. Files are facts by their contents: they may move.
    """
    training = config.training
    micro_batch_size = training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    accumulation = training.get("gradient_accumulation_steps", TrainingArguments.gradient_accumulation_steps)
    facts = {
        "world_size": world_size,
        "micro_batch_size": micro_batch_size,
        "rows_per_step": micro_batch_size * accumulation * world_size,
        "zero_stage": None if deepspeed is None else zero_stage(deepspeed),
        "deepspeed": {key: (deepspeed or {}).get(key) for key in ("optimizer", "scheduler", "gradient_clipping")},
        "precision": "fp32" if precision == "no" else precision,
        "base_model": weights_sample(model_dir),
        "train_file": file_hash(train_file),
        "settings": {
            "quantization_bit": config.quantization_bit,
            "max_input_length": config.max_input_length,
            "max_output_length": config.max_output_length,
            "packing": config.speed.packing,
        },
        "training_args": training,
        "peft_config": config.lora,
    }
    return json.loads(json.dumps(facts, default=str))


def weights_sample(folder: Path) -> str:
    """Return a hash that tells a base model from others of the same shape.

    Of each file of weights it takes pieces at equal distances: reading all of a 6B model would take a minute.
    """
    total = sha256()
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "tokenizer.model"):
            total.update(f"{path.name} {file_hash(path)}".encode())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            total.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                    file.seek(start)
                    total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()


def check_same_training(checkpoint: Path, facts: dict[str, Any], config_file: Path) -> list[str]:
    """Compare what a checkpoint was trained with to what is asked for now.

    Args:
        checkpoint: A complete checkpoint.
        facts: Of this job (:func:`training_facts`).
        config_file: ``lora.yaml``, for messages.

    Returns:
        A line for each difference with which training may continue.

    Raises:
        UserError: It would continue another training: as if nothing had happened, or in a library's traceback.
    """
    files, then = read_manifest(checkpoint)
    if not any(name.endswith(("optimizer.pt", "optim_states.pt")) for name in files):
        raise UserError(
            f"{checkpoint} has no optimizer state to continue from (save_only_model); "
            f"remove save_only_model and {FRESH}"
        )
    try:
        _check_ranks(checkpoint, then, facts)
        for key, what in (("base_model", "another base model"), ("train_file", "another train_file")):
            if then[key] != facts[key]:
                raise UserError(f"{checkpoint} was trained with {what}; give the same one, or {FRESH}")
        changed = list(_changed(then, facts))
        if changed:
            before = ", ".join(f"{name} {_shown(old)}" for name, old, _ in changed)
            now = ", ".join(_shown(new) for _, _, new in changed)
            raise UserError(
                f"{checkpoint} was trained with {before}, but {config_file} has {now}; resume with the same, or {FRESH}"
            )
        return _notes(then, facts)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the manifest in {checkpoint} is of another version of this job; {FRESH}") from error


def _check_ranks(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Check what the files of the optimizer state are made for: ZeRO's are one part per rank."""
    if then["zero_stage"] != now["zero_stage"]:
        remedies = f"give a DeepSpeed file with stage {then['zero_stage']}"
        if then["zero_stage"] is None:
            remedies = "leave the DeepSpeed file out"
        raise UserError(
            f"{checkpoint} was trained {_strategy(then)}, but this job runs {_strategy(now)}; {remedies}, or {FRESH}"
        )
    if then["zero_stage"] is not None and then["world_size"] != now["world_size"]:
        raise UserError(
            f"{checkpoint} holds the optimizer state of {then['world_size']} rank(s) {_strategy(then)}, but "
            f"{now['world_size']} were started; start {then['world_size']}, or {FRESH}"
        )
    if then["rows_per_step"] != now["rows_per_step"]:
        raise UserError(
            f"{checkpoint} was trained on {then['rows_per_step']} rows per step ({then['world_size']} ranks), but this "
            f"job has {now['rows_per_step']} ({now['world_size']} ranks); adapt gradient_accumulation_steps or the "
            f"number of ranks, or {FRESH}"
        )


def _strategy(facts: dict[str, Any]) -> str:
    return "without DeepSpeed" if facts["zero_stage"] is None else f"under DeepSpeed ZeRO-{facts['zero_stage']}"


def _changed(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of each setting that has to stay and has not."""
    if then["precision"] != now["precision"]:
        yield "precision", then["precision"], now["precision"]
    for block, defaults in (
        ("settings", {}),
        ("deepspeed", {}),
        ("training_args", _defaults(TrainingArguments)),
        ("peft_config", _defaults(LoraConfig)),
    ):
        for key in sorted(then[block].keys() | now[block].keys()):
            if block == "training_args" and (key in _FREE or key.startswith(_FREE_PREFIXES)):
                continue
            old, new = (facts[block].get(key, defaults.get(key)) for facts in (then, now))
            if _ordered(old) != _ordered(new):
                yield key, old, new


def _defaults(options: type) -> dict[str, Any]:
    """Return what options are without a line in the file, as JSON has it."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(options)
    }
    return json.loads(json.dumps(defaults, default=str))


def _ordered(value: Any) -> Any:
    """Sort names: their order in a list means nothing."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _notes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    notes = []
    parts = [(facts["world_size"], facts["micro_batch_size"]) for facts in (then, now)]
    if parts[0] != parts[1]:
        (ranks, rows), (ranks_now, rows_now) = parts
        notes.append(
            f"steps have the same rows, now as {rows_now} on each of {ranks_now} rank(s) instead of {rows} on {ranks}: "
            "dropout draws other numbers from here on"
        )
    constant = str(now["training_args"].get("lr_scheduler_type", "")).startswith("constant")
    for key in ("max_steps", "num_train_epochs"):
        old, new = (facts["training_args"].get(key) for facts in (then, now))
        if old != new:
            schedule = "" if constant else "; the learning rate follows the schedule of the new length from here on"
            notes.append(f"{key} is {_shown(new)}, and was {_shown(old)}{schedule}")
    return notes
