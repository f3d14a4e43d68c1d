"""Record what decides a training, and compare: a checkpoint continues only the training that it belongs to."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from peft import LoraConfig, PrefixTuningConfig
from transformers import TrainingArguments

from helpers.config.deepspeed import zero_stage
from helpers.config.finetune import FinetuneConfig
from helpers.errors import UserError
from helpers.finetune.checkpoints import file_hash, read_manifest

FRESH = "start fresh with another --output-dir"
# Options that change what a run says, keeps or takes, but not what it trains.
_FREE_PREFIXES = ("logging_", "log_", "eval_", "save_", "trackio_", "torch_empty_cache_")
_FREE = {
    *("output_dir", "report_to", "run_name", "project", "debug", "skip_memory_metrics", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "include_num_input_tokens_seen"),
    *("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "activation_checkpointing", "gradient_checkpointing", "disable_tqdm"),
    "restore_callback_states_from_checkpoint",
    *("bf16", "fp16", "use_cpu"),  # compared as the precision that follows from them
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # compared as rows in a step
    *("max_steps", "num_train_epochs"),  # a run may be made longer
}
# The optimizer's state belongs to one algorithm, and the adapter's tensors to one shape and scale.
_FIXED = {"optim", "optim_args", "optim_target_modules", "quantization_bit"}
_FIXED_ZERO = ("offload_optimizer", "round_robin_gradients", "parameter_alignment", "elastic_checkpoint")
_FREE_LORA = {"lora_dropout"}
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # they follow the loss, all others only the step
_WHAT_THEY_FOLLOW = ("eval_steps", "eval_strategy", "eval_delay", "metric_for_best_model", "greater_is_better")
# What a DeepSpeed file changes in numbers, besides what other blocks of the facts have.
_DEEPSPEED = (
    *("scheduler", "gradient_clipping", "communication_data_type", "prescale_gradients", "torch_autocast"),
    *("gradient_predivide_factor", "gradient_allreduce_op", "data_types"),
)
_ZERO = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
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
        "deepspeed": _deepspeed_facts(deepspeed or {}),
        "precision": "fp32" if precision == "no" else precision,
        "base_model": weights_sample(model_dir),
        "train_file": file_hash(train_file),
        "settings": {
            "quantization_bit": config.quantization_bit,
            "max_input_length": config.max_input_length,
            "max_output_length": config.max_output_length,
            "packing": config.speed.packing,
            "compile_layers": config.speed.compile_layers,
            "loss_chunk": config.speed.loss_chunk,
            "padding_mask": config.speed.padding_mask,
            "fp8": config.speed.fp8 or None,  # None, as in checkpoints of before
            "shared_dropout": config.speed.shared_dropout or None,  # the same
        },
        "training_args": training,
        "method": config.method,
        "peft_config": config.lora or config.prefix,
    }
    return json.loads(json.dumps(facts, default=str))


def _deepspeed_facts(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    optimizer, zero = deepspeed.get("optimizer") or {}, deepspeed.get("zero_optimization") or {}
    return {
        "type of the optimizer": optimizer.get("type"),
        "params of the optimizer": optimizer.get("params"),
        **{key: deepspeed.get(key) for key in _DEEPSPEED},
        **{key: zero.get(key) for key in (*_FIXED_ZERO, *_ZERO)},
        **{
            f"{kind} of the DeepSpeed file": {k: v for k, v in (deepspeed.get(kind) or {}).items() if k != "enabled"}
            for kind in ("fp16", "bf16")
        },
        "offload_optimizer": (zero.get("offload_optimizer") or {}).get("device"),
    }


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
        A line for each difference that changes the result: what happens from here on.

    Raises:
        UserError: The optimizer's state, the adapter or the base does not fit what is asked for.
    """
    _, then = read_manifest(checkpoint)
    try:
        if then["training_args"].get("save_only_model"):
            raise UserError(
                f"{checkpoint} has no optimizer state to continue from (save_only_model); "
                f"remove save_only_model and {FRESH}"
            )
        _check_strategy(checkpoint, then, facts)
        if then["base_model"] != facts["base_model"]:
            raise UserError(f"{checkpoint} was trained with another base model; give the same one, or {FRESH}")
        changed = list(_changed(then, facts))
        fixed = [(name, old, new) for name, old, new in changed if _is_fixed(name, old, new)]
        if fixed:
            before = ", ".join(f"{name} {_shown(old)}" for name, old, _ in fixed)
            now = ", ".join(_shown(new) for _, _, new in fixed)
            raise UserError(
                f"{checkpoint} was trained with {before}, but {config_file} has {now}; resume with the same, or {FRESH}"
            )
        return [*_notes(checkpoint, then, facts), *(_note(*change) for change in changed)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the manifest in {checkpoint} is of another version of this job; {FRESH}") from error


def _check_strategy(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Check what the files of the optimizer's state are made for."""
    if then["method"] != now["method"]:
        raise UserError(
            f"{checkpoint} was trained with {then['method']}, but this job trains {now['method']}; give the same "
            f"peft_config, or {FRESH}"
        )
    stages = then["zero_stage"], now["zero_stage"]
    if stages[0] != stages[1] and not set(stages) <= {1, 2}:  # ZeRO-1 and ZeRO-2 have the same state
        remedies = f"give a DeepSpeed file with stage {stages[0]}"
        if stages[0] is None:
            remedies = "leave the DeepSpeed file out"
        raise UserError(
            f"{checkpoint} was trained {_strategy(then)}, but this job runs {_strategy(now)}; {remedies}, or {FRESH}"
        )
    if stages[0] == 3 and then["world_size"] != now["world_size"]:
        raise UserError(
            f"{checkpoint} holds the optimizer state of {then['world_size']} rank(s) {_strategy(then)}, which cannot "
            f"be cut again, but {now['world_size']} were started; start {then['world_size']}, or {FRESH}"
        )
    if stages[0] is not None and then["world_size"] != now["world_size"] and then["deepspeed"]["round_robin_gradients"]:
        raise UserError(
            f"{checkpoint} was trained with round_robin_gradients, whose order belongs to {then['world_size']} ranks, "
            f"but {now['world_size']} were started; start {then['world_size']}, or {FRESH}"
        )
    if stages[0] is not None and then["precision"] != now["precision"]:
        raise UserError(
            f"{checkpoint} was trained in {then['precision']}, but this job runs in {now['precision']}, and "
            f"DeepSpeed's optimizer state belongs to one precision; resume in {then['precision']}, or {FRESH}"
        )


def _strategy(facts: dict[str, Any]) -> str:
    return "without DeepSpeed" if facts["zero_stage"] is None else f"under DeepSpeed ZeRO-{facts['zero_stage']}"


def _changed(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of each setting that decides the result and has changed."""
    for block, defaults in (
        ("settings", {}),
        ("deepspeed", {}),
        ("training_args", _defaults(TrainingArguments)),
        ("peft_config", _adapter_defaults()),
    ):
        for key in sorted(then[block].keys() | now[block].keys()):
            if block == "training_args" and _is_free(key, now):
                continue
            old, new = (facts[block].get(key, defaults.get(key)) for facts in (then, now))
            if _ordered(old) != _ordered(new):
                yield key, old, new


def _is_free(name: str, facts: dict[str, Any]) -> bool:
    """Whether an option of the Trainer may change without a word."""
    if name in _WHAT_THEY_FOLLOW and facts["training_args"].get("lr_scheduler_type") in _STATEFUL_SCHEDULES:
        return False
    return name in _FREE or name.startswith(_FREE_PREFIXES)


def _is_fixed(name: str, old: Any, new: Any) -> bool:
    """Whether training cannot go on with another value."""
    if name == "lr_scheduler_type":
        return old in _STATEFUL_SCHEDULES or new in _STATEFUL_SCHEDULES
    if name == "scheduler":  # DeepSpeed's and the Trainer's have other states
        return (old is None) != (new is None)
    return name in {*_adapter_defaults(), *_FIXED, *_FIXED_ZERO, "type of the optimizer"} - _FREE_LORA


def _adapter_defaults() -> dict[str, Any]:
    return _defaults(PrefixTuningConfig) | _defaults(LoraConfig)


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


def _note(name: str, old: Any, new: Any) -> str:
    what = "used from here on"
    if name in ("seed", "data_seed"):
        what = "rows come in another order from here on, some twice and some not at all; dropout goes on as it was"
    return f"{name} is {_shown(new)}, and was {_shown(old)}: {what}"


def _notes(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    notes = []
    if then["train_file"] != now["train_file"]:
        notes.append("train_file has other contents than before: training goes on at the same place in the new rows")
    if then["precision"] != now["precision"]:
        scale = "; the loss scale starts again" if now["precision"] == "fp16" else ""
        notes.append(f"precision is {now['precision']}, and was {then['precision']}: used from here on{scale}")
    if then["zero_stage"] != now["zero_stage"]:
        notes.append(f"ZeRO stage is {now['zero_stage']}, and was {then['zero_stage']}: with the same optimizer state")
    before, after = then["rows_per_step"], now["rows_per_step"]
    if before != after:
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        notes.append(
            f"a step has {after} rows ({now['world_size']} ranks), and had {before} ({then['world_size']} ranks): the "
            f"{step} steps until here count as {step * after:,} rows instead of {step * before:,}, so some rows are "
            f"{'left out' if after > before else 'trained on again'}; adapt gradient_accumulation_steps to avoid it"
        )
    parts = [(facts["world_size"], facts["micro_batch_size"]) for facts in (then, now)]
    if parts[0] != parts[1]:
        (ranks, rows), (ranks_now, rows_now) = parts
        notes.append(
            f"a micro-batch has {rows_now} rows on each of {ranks_now} rank(s), and had {rows} on {ranks}: "
            "dropout draws other numbers from here on"
        )
    if now["training_args"].get("ignore_data_skip"):
        notes.append("ignore_data_skip: rows come from the beginning of the epoch's order again")
    constant = str(now["training_args"].get("lr_scheduler_type", "")).startswith("constant")
    for key in ("max_steps", "num_train_epochs"):
        old, new = (facts["training_args"].get(key) for facts in (then, now))
        if old != new:
            schedule = "" if constant else "; the learning rate follows the schedule of the new length from here on"
            notes.append(f"{key} is {_shown(new)}, and was {_shown(old)}{schedule}")
    return notes
