"""Check ``lora.yaml``, the DeepSpeed JSON and this machine against each other."""

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from helpers.config.blocks import training_setting
from helpers.config.deepspeed import AUTO, precision_switch, zero_stage
from helpers.config.deepspeed_optimizer import optimizer_pairs
from helpers.config.finetune import FP8, FinetuneConfig
from helpers.errors import UserError


def contradictions(deepspeed: Mapping[str, Any], training: Mapping[str, Any], world_size: int) -> list[str]:
    """List where a DeepSpeed file and ``training_args`` disagree; "auto" agrees with everything.

    Args:
        deepspeed: Contents of the DeepSpeed file.
        training: Keyword arguments of ``TrainingArguments``; missing keys have its defaults.
        world_size: Number of ranks; ``train_batch_size`` counts the sequences of all of them.

    Returns:
        One text per contradiction, naming both values.
    """

    setting = partial(training_setting, training)
    micro_batch_size, accumulation = setting("per_device_train_batch_size"), setting("gradient_accumulation_steps")
    batch_size = micro_batch_size * accumulation * world_size
    pairs = [
        ("train_micro_batch_size_per_gpu", deepspeed, "per_device_train_batch_size", micro_batch_size),
        ("gradient_accumulation_steps", deepspeed, "gradient_accumulation_steps", accumulation),
        ("gradient_clipping", deepspeed, "max_grad_norm", setting("max_grad_norm")),
        ("train_batch_size", deepspeed, f"the batch of {world_size} ranks", batch_size),
        *optimizer_pairs(deepspeed, training),
    ]
    found = [
        f"{key} is {block[key]} but {name} is {value}"
        for key, block, name, value in pairs
        if block.get(key, AUTO) not in (AUTO, value)
    ]
    for precision in ("fp16", "bf16"):
        enabled = precision_switch(deepspeed, precision)
        if enabled is not None and precision in training and enabled != bool(training[precision]):
            found.append(f"{precision}.enabled is {enabled} but {precision} is {training[precision]}")
    return found


def check_quantization(bits: int | None, deepspeed: dict[str, Any] | None) -> None:
    """Check that the job can train on quantised weights.

    Args:
        bits: ``quantization_bit`` of the configuration; None passes every check.
        deepspeed: Contents of the DeepSpeed file, or None.

    Raises:
        UserError: The DeepSpeed file asks for ZeRO-3, or bitsandbytes is not installed.
    """
    if bits is None:
        return
    if zero_stage(deepspeed) == 3:
        raise UserError(
            f"quantization_bit {bits} does not go with ZeRO-3, which would cut codes from their scales: use "
            "configs/ds_zero_2.json, or no DeepSpeed file"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantization_bit {bits} needs the package bitsandbytes: pip install bitsandbytes==0.50.2")


def check_gpu_options(deepspeed: Mapping[str, Any] | None, hardware: str) -> None:
    """Raise UserError if a DeepSpeed file quantises what it sends and this machine has no GPU, which alone can."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key) and hardware == "no":
            raise UserError(f"zero_optimization.{key} needs a GPU, and there is none here; remove it")


def check_speed(config: FinetuneConfig, deepspeed: dict[str, Any] | None) -> None:
    """Raise UserError if an option of ``speed`` cannot be combined with the rest of the job."""
    if config.speed.recompute_inputs and not config.speed.compile_layers:
        raise UserError("speed: recompute_inputs is for compiled layers; set compile_layers: true, or remove it")
    if config.speed.fp8_transposed and not config.speed.fp8:
        raise UserError("speed: fp8_transposed is for matrices in fp8; set fp8: true, or remove it")
    limit = config.speed.gpu_memory_gib
    if limit is not None and limit < 3:
        raise UserError(f"speed: gpu_memory_gib {limit} leaves nothing for tensors; give 3 or more")
    if config.speed.offload_checkpoints and not config.checkpointing:
        raise UserError(
            "speed: offload_checkpoints moves the inputs that gradient checkpointing saves, which is off: set "
            "gradient_checkpointing: true under training_args"
        )


def check_method(config: FinetuneConfig) -> None:
    """Raise UserError if what is trained does not go with other options."""
    if config.trains_all and config.quantization_bit:
        raise UserError(
            f"quantization_bit {config.quantization_bit} makes codes of the weights, which cannot be trained; remove "
            "it, or add a peft_config"
        )
    if config.prefix:
        reasons = {
            "speed: packing": (config.speed.packing, "whose rows would not see the prefix"),
            "speed: compile_layers": (config.speed.compile_layers, "which does not cover keys from outside the layer"),
            "load_best_model_at_end": (
                config.training.get("load_best_model_at_end"),
                "because PEFT cannot load it again",
            ),
            "gradient_checkpointing": (config.checkpointing is True, "which drops keys from outside the layer"),
        }
        for name, (is_on, reason) in reasons.items():
            if is_on:
                raise UserError(f"PREFIX_TUNING does not go with {name}, {reason}; remove it, or train LoRA")


def check_adapter_options(config: FinetuneConfig, deepspeed: dict[str, Any] | None) -> None:
    """Raise UserError if an option of ``peft_config`` needs whole, unquantised weights and the job has none."""
    mica = str(config.lora.get("init_lora_weights")).lower() == "mica"
    if zero_stage(deepspeed) == 3:
        remedy = "use configs/ds_zero_2.json or no DeepSpeed file"
        if config.lora.get("trainable_token_indices"):
            raise UserError(f"trainable_token_indices reads rows of a matrix that ZeRO-3 has sharded; {remedy}")
        if mica:  # a checkpoint would lack it: under ZeRO-3 only what is trained is gathered
            raise UserError(
                f"init_lora_weights mica freezes a part of the adapter, which ZeRO-3 does not save; {remedy}"
            )
    if config.base_format:
        setting = FP8 if config.base_format == FP8 else "quantization_bit"
        initial = config.lora.get("init_lora_weights")
        if mica or initial == "orthogonal":
            raise UserError(f"init_lora_weights {initial} reads weights in 16 bit; remove it, or {setting}")
        if config.lora.get("use_dora") and setting == FP8:
            raise UserError(f"use_dora reads weights in 16 bit; remove it, or {setting}")


def choose_precision(training: dict[str, Any], deepspeed: dict[str, Any] | None, hardware: str) -> str:
    """Choose the precision to train in: what the files ask for, or the best that this machine has.

    Args:
        training: Keyword arguments of ``TrainingArguments``.
        deepspeed: Contents of the DeepSpeed file, or None.
        hardware: The best precision of this machine, in the terms of the result.

    Returns:
        "bf16", "fp16" or "no" (fp32).

    Raises:
        UserError: The files ask for both, for one this machine does not support, or for fp16 with a fixed loss scale,
            whose gradients underflow until the loss reads 0 or nan.
    """
    enabled = {
        kind for kind in ("bf16", "fp16") if training.get(kind) or (deepspeed and precision_switch(deepspeed, kind))
    }
    if len(enabled) == 2:
        raise UserError("bf16 and fp16 are both enabled; keep one")
    chosen = enabled.pop() if enabled else hardware
    best = "fp32" if hardware == "no" else hardware
    if chosen == "bf16" and hardware != "bf16":
        raise UserError(f"this hardware does not support bf16; remove the line to train in {best}")
    if chosen == "fp16" and hardware == "no":
        raise UserError("fp16 needs a GPU, and there is no GPU here; remove the line to train in fp32")
    scale = (deepspeed or {}).get("fp16", {}).get("loss_scale", 0)
    if chosen == "fp16" and scale != 0:
        raise UserError(f"fp16.loss_scale is fixed at {scale}, so gradients underflow; set it to 0, which adapts it")
    return chosen
