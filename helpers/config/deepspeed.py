"""Read the DeepSpeed JSON: ZeRO stage, communication buckets, "auto" values.

Imports neither torch nor DeepSpeed, so memory predictions can use it on any machine.
"""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.config.secrets import find_secret
from helpers.errors import UserError
from helpers.files import read_json_object

AUTO = "auto"
DEFAULT_BUCKET_ELEMENTS = 5e8  # DeepSpeed's reduce_bucket_size if the file has none
MIB = 2**20
WARN_FROM_BYTES = 100 * MIB
# Keys at the top of a file (DeepSpeedConfig._initialize_params in deepspeed/runtime/config.py); DeepSpeed itself
# ignores what it does not know. Blocks, with an example of some:
BLOCKS: dict[str, str] = {
    "optimizer": '{"type": "AdamW", "params": {"lr": "auto"}}',
    "scheduler": '{"type": "WarmupLR", "params": {}}',
    "fp16": '{"enabled": "auto"}',
    "bf16": '{"enabled": "auto"}',
    "zero_optimization": '{"stage": 2}',
    **dict.fromkeys(("aio", "activation_checkpointing", "comms_logger", "flops_profiler", "autotuning"), ""),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet", "torch_autocast", "data_types"), ""),
    **dict.fromkeys(("checkpoint", "data_efficiency", "hybrid_engine", "pipeline"), ""),
    **dict.fromkeys(("timers", "weight_quantization"), ""),
}
# Keys of other jobs, and those that DeepSpeed no longer reads and refuses when it starts; with what to do instead.
_DATA_PARALLEL = "the job is data parallel, and configs/ds_zero_3.json shards the weights"
_REMOVED = "DeepSpeed no longer has it"
FOREIGN = {
    **dict.fromkeys(("tensor_parallel", "autotp_size", "tp_size", "pipeline_parallel"), _DATA_PARALLEL),
    **dict.fromkeys(("sequence_parallel_size", "expert_parallel", "moe", "inference"), _DATA_PARALLEL),
    "compile": "give compile_layers: true under speed in the job's YAML file",
    "fp8": "give fp8: true under speed in the job's YAML file",
    **dict.fromkeys(("amp", "apex"), f"{_REMOVED}; fp16 and bf16 took its place"),
    **dict.fromkeys(("nebula", "compression_training", "quantize_training", "sparse_gradients"), _REMOVED),
    **dict.fromkeys(("eigenvalue", "sparse_attention", "elasticity", "graph_harvesting"), _REMOVED),
    **dict.fromkeys(("curriculum_learning", "progressive_layer_drop"), _REMOVED),
}
# Older names inside zero_optimization, with what took their place.
OLD_ZERO_KEYS = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_params": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory": true inside offload_optimizer or offload_param',
    "stage3_gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save"',
}
COMMENTS = ("_", "//", "#")  # beginnings of keys that people write because JSON has no comments
REFUSED_BLOCKS = ("data_efficiency", "hybrid_engine")
DTYPES = ("fp32", "fp16", "bf16")
MONITORS = ("tensorboard", "wandb", "comet")
REFUSED_ZERO_KEYS = ("zenflow", "legacy_stage1")
# Single values: the smallest number (whole, unless it has a decimal point), bool, or None for anything.
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 1),
    "steps_per_print": 1,
    "gradient_clipping": 0.0,
    "gradient_predivide_factor": 0.0,
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients"), bool),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather"), bool),
    **dict.fromkeys(("dataloader_drop_last", "disable_python_gc"), bool),
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type", "log_level"), None),
    "gradient_allreduce_op": None,
}


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Args:
        path: The file.

    Returns:
        Its contents, without comments: "auto" is still "auto".

    Raises:
        UserError: The file is missing, or is not a JSON object.
    """
    config = read_json_object(path, f"no DeepSpeed file {path}; configs/ds_zero_2.json is one")
    if place := find_secret(config):
        name = "COMET_API_KEY" if place == "comet.api_key" else "it"
        raise UserError(f"{path}: {place} would be saved with each checkpoint; remove it, and set {name} as a variable")
    config = {key: value for key, value in config.items() if not key.startswith(COMMENTS)}
    for key, value in config.items():
        if key in FOREIGN:
            raise UserError(f"{path}: {key} is not supported, remove it; {FOREIGN[key]}")
        if key not in BLOCKS and key not in SETTINGS:
            close = difflib.get_close_matches(key, [*BLOCKS, *SETTINGS], n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "remove it"
            raise UserError(f"{path}: unknown key {key!r}; {remedy}")
        _check_setting(key, value, path)
    zero = config.get("zero_optimization", {})
    _check_old_keys(zero, path)
    for key in REFUSED_ZERO_KEYS:
        if zero.get(key):
            raise UserError(f"{path}: zero_optimization.{key} is not supported; remove it")
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key, {}), dict | None):
            raise UserError(f"{path}: zero_optimization.{key} must be a block of keys, not {json.dumps(zero[key])}")
        offload = zero.get(key) or {}
        if offload.get("super_offload"):
            raise UserError(f"{path}: zero_optimization.{key}.super_offload is not supported; remove it")
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise UserError(f"{path}: zero_optimization.{key} on nvme needs nvme_path, a folder on a fast disk")
    for key in ("optimizer", "scheduler"):
        if key in config and not isinstance(config[key].get("type"), str):
            raise UserError(f'{path}: {key} must name its "type"; "AdamW" and "WarmupLR" are such names')
        if not isinstance(config.get(key, {}).get("params", {}), dict):
            raise UserError(f"{path}: {key}.params must be a block of keys")
    return config


def _check_old_keys(zero: Mapping[str, Any], path: Path) -> None:
    """Refuse older names: DeepSpeed knows some of them, but the Trainer and the predictor look at the newer ones."""
    old = [key for key in zero if key in OLD_ZERO_KEYS]
    if old:
        remedies = "; ".join(
            f"remove {key}" if zero[key] is False else f"instead of {key} write {OLD_ZERO_KEYS[key]}" for key in old
        )
        raise UserError(f"{path}: zero_optimization has older names: {remedies}")


def _check_setting(key: str, value: Any, path: Path) -> None:
    if key in BLOCKS:
        if not isinstance(value, dict):
            example = BLOCKS[key] or "{}"
            raise UserError(f"{path}: {key} must be a block of keys, such as {example}, not {json.dumps(value)}")
        if key in MONITORS and value.get("enabled", False):
            raise UserError(f"{path}: {key} is not supported; remove it, and give report_to under training_args")
        dtype = value.get("grad_accum_dtype") if key == "data_types" else None
        if dtype not in (None, *DTYPES):
            raise UserError(f"{path}: data_types.grad_accum_dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        tag = value.get("tag_validation", "Warn") if key == "checkpoint" else "Warn"
        if str(tag).lower() not in ("ignore", "warn", "fail"):
            raise UserError(f"{path}: checkpoint.tag_validation must be Ignore, Warn or Fail, not {tag!r}")
        if key in REFUSED_BLOCKS and value.get("enabled", False):
            raise UserError(f"{path}: {key} is not supported, because it changes what is trained; remove it")
        return
    if key.endswith("communication_data_type") and value not in (None, *DTYPES):
        raise UserError(f"{path}: {key} must be one of {', '.join(DTYPES)}, not {json.dumps(value)}")
    least = SETTINGS[key]
    if least is None or value == AUTO:
        return
    if least is bool:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} must be true or false, not {json.dumps(value)}")
        return
    whole = isinstance(least, int)
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not least <= value < math.inf:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{path}: {key} must be {kind} of at least {least:g}, not {json.dumps(value)}")


def choose_deepspeed_file(named: str | None, config_file: Path, given: Path | None) -> Path | None:
    """Choose the DeepSpeed file: the command line's, or the one that ``training_args`` names.

    Args:
        named: ``deepspeed`` under ``training_args``, relative to ``config_file`` or to the working directory.
        config_file: ``lora.yaml``.
        given: The command line's file.

    Returns:
        The file; None without one.

    Raises:
        UserError: The file that is named does not exist, or the command line gives another one.
    """
    if not named:
        return given
    candidates = [config_file.parent / named, Path(named)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        places = " nor ".join(dict.fromkeys(map(str, candidates)))
        raise UserError(f"{config_file}, training_args: deepspeed {named!r} does not exist: neither {places}")
    if given is not None and given.resolve() != found.resolve():
        raise UserError(f"{config_file}, training_args: deepspeed names {found}, the command line {given}; keep one")
    return found


def zero_stage(deepspeed: Mapping[str, Any] | None) -> int:
    """Return the ZeRO stage of a DeepSpeed file; 0 without a file."""
    return (deepspeed or {}).get("zero_optimization", {}).get("stage", 0)


def precision_switch(deepspeed: Mapping[str, Any], precision: str) -> bool | None:
    """Return what the file sets for ``precision`` ("bf16" or "fp16"); None if it is "auto" or not mentioned."""
    value = deepspeed.get(precision, {}).get("enabled", AUTO)
    return None if value == AUTO else bool(value)


def fill_auto(
    config: Mapping[str, Any],
    *,
    micro_batch_size: int,
    world_size: int,
    precision: str,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float = 0.0,
) -> dict[str, Any]:
    """Replace each "auto" by a value, as the HF Trainer does. DeepSpeed itself does not know "auto".

    Args:
        config: Contents of a DeepSpeed file; not modified.
        micro_batch_size: Sequences per micro-batch on one rank.
        world_size: Number of ranks.
        precision: Type of the weights: "bf16", "fp16" or "fp32".
        gradient_accumulation_steps: Micro-batches per optimizer step.
        gradient_clipping: Largest norm of the gradients; 0 does not clip.

    Returns:
        A copy of ``config`` without "auto".

    Raises:
        UserError: A key other than these six is "auto".
    """
    values = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
        "gradient_clipping": gradient_clipping,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
    }

    def fill_section(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {key: fill_value(prefix + key, value) for key, value in section.items()}

    def fill_value(path: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return fill_section(value, f"{path}.")
        if value != AUTO:
            return value
        if path not in values:
            raise UserError(f'fill_auto: {path} is "auto"; give it a value, only the HF Trainer could guess one')
        return values[path]

    return fill_section(config, "")


def reduce_buffer_bytes(bucket_elements: int, overlap_comm: bool, element_bytes: int) -> int:
    """Compute the bytes that ZeRO-1 and ZeRO-2 allocate per rank for gradients in flight, however small the model is.

    One buffer of ``reduce_bucket_size`` elements; two with ``overlap_comm``, so that one fills while the other is
    reduced (``setup_buckets`` in deepspeed/runtime/zero/stage_1_and_2.py).
    """
    return (2 if overlap_comm else 1) * bucket_elements * element_bytes


def bucket_bytes(deepspeed: Mapping[str, Any], element_bytes: int) -> int:
    """Apply :func:`reduce_buffer_bytes` to a DeepSpeed file; 0 for "auto", and for ZeRO-3, whose buffers differ."""
    zero = deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS)
    if zero_stage(deepspeed) not in (1, 2) or bucket == AUTO:
        return 0
    return reduce_buffer_bytes(int(bucket), bool(zero.get("overlap_comm")), element_bytes)


def bucket_warning(deepspeed: Mapping[str, Any], trainable: int, element_bytes: int) -> str | None:
    """Describe the memory that oversized communication buckets waste.

    Args:
        deepspeed: Contents of the DeepSpeed file.
        trainable: Number of trainable parameters.
        element_bytes: Bytes per gradient element.

    Returns:
        One line; None if the buckets fit the gradients, or take less than 100 MiB.
    """
    total_bytes = bucket_bytes(deepspeed, element_bytes)
    zero = deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS)
    if total_bytes < WARN_FROM_BYTES or bucket <= 2 * trainable:
        return None
    buffers = 2 if zero.get("overlap_comm") else 1
    mib = total_bytes / MIB
    return (
        f"reduce_bucket_size {bucket:.0e} takes {buffers} x {mib / buffers:,.0f} MiB on every rank for gradients of "
        f"{trainable * element_bytes / MIB:,.1f} MiB; {trainable:.0e} would do and save "
        f"{mib * (1 - trainable / bucket):,.0f} MiB"
    )
