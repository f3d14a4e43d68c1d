"""Read a configuration from a job's own files, as helpers.finetune.train takes them: ``lora.yaml``, DeepSpeed JSON."""

import re
from pathlib import Path
from typing import Any

from helpers.config.compatibility import choose_precision
from helpers.config.deepspeed import choose_deepspeed_file, read_deepspeed_config
from helpers.config.finetune import FinetuneConfig, read_finetune_config
from helpers.errors import UserError
from helpers.memory.predict.configuration import Configuration, Lora, Strategy
from helpers.memory.predict.model_shape import ModelShape

# Defaults of transformers.TrainingArguments and peft.LoraConfig.
DEFAULT_MICRO_BATCH_SIZE, DEFAULT_RANK, DEFAULT_DROPOUT = 8, 8, 0.0
PARTS = ("self_attn", "mlp")  # of a layer


def read_job(
    config_file: Path, deepspeed_file: Path | None, *, shape: ModelShape, world_size: int, sequence_length: int | None
) -> Configuration:
    """Describe the job that ``python -m helpers.finetune.train`` would start with these files on GPUs with bf16.

    Args:
        config_file: A ``lora.yaml``.
        deepspeed_file: The DeepSpeed JSON; None trains without DeepSpeed.
        shape: The network that the job fine-tunes.
        world_size: Number of GPUs.
        sequence_length: Tokens of the longest row; None takes the longest that ``config_file`` allows. Packs have a
            length of their own and ignore it.

    Returns:
        The configuration to predict for.

    Raises:
        UserError: A file is missing, contradicts itself or asks for something that no prediction covers.
    """
    job = read_finetune_config(config_file)
    deepspeed_file = choose_deepspeed_file(job.deepspeed_file, config_file, deepspeed_file)
    deepspeed = read_deepspeed_config(deepspeed_file) if deepspeed_file else None
    return configuration_of(
        job, deepspeed, shape=shape, world_size=world_size, sequence_length=sequence_length, source=str(deepspeed_file)
    )


def configuration_of(
    job: FinetuneConfig,
    deepspeed: dict[str, Any] | None,
    *,
    shape: ModelShape,
    world_size: int,
    sequence_length: int | None,
    source: str = "the DeepSpeed file",
) -> Configuration:
    """Describe the same from files that were read already.

    ``gradient_checkpointing: auto`` counts as off: the job tries that first. ``source`` names the DeepSpeed file in
    messages.
    """
    if job.prefix:
        raise UserError("the memory of PREFIX_TUNING is not predicted")
    kind = choose_precision(job.training, deepspeed, "bf16")
    training = job.training
    strategy = _strategy(deepspeed, world_size, shape, source) if deepspeed is not None else _without(world_size)
    return Configuration(
        shape=shape,
        lora=_lora(job.lora, shape) if job.lora else None,
        precision="fp32" if kind == "no" else "bf16" if strategy.zero_stage else "autocast",
        strategy=strategy,
        micro_batch_size=training.get("per_device_train_batch_size", DEFAULT_MICRO_BATCH_SIZE),
        # A row is cut to the sum of both limits and one (helpers.finetune.dataset).
        sequence_length=job.speed.packing or sequence_length or job.max_input_length + job.max_output_length + 1,
        padded=job.speed.packing is None,
        # Attention for packs and without a mask needs weights in 16 bit (helpers.finetune.speed).
        padding_mask=job.speed.padding_mask or (job.trains_all and not strategy.zero_stage),
        checkpointing=job.checkpointing is True,
        quantization_bits=job.quantization_bit or 16,
        fp8=job.speed.fp8,
        fp8_transposed=job.speed.fp8_transposed,
        fused_rounding=job.speed.compile_layers,
        gradient_accumulation_steps=training.get("gradient_accumulation_steps", 1),
        expandable_segments=job.speed.expandable_segments,
        loss_chunk=job.speed.loss_chunk,
        offloaded_checkpoints=job.checkpointing is True and job.speed.offload_checkpoints,
        small_nccl_buffers=job.speed.small_nccl_buffers,
        lean=True,
        compiled=job.speed.compile_layers,
        recomputed_inputs=job.speed.recompute_inputs,
        shared_dropout=job.speed.shared_dropout,
    )


def _lora(options: dict[str, Any], shape: ModelShape) -> Lora:
    return Lora(
        r=options.get("r", DEFAULT_RANK),
        targets=_targets(options.get("target_modules"), shape),
        dropout=options.get("lora_dropout", DEFAULT_DROPOUT),
    )


def _targets(targets: list[str] | str | None, shape: ModelShape) -> tuple[str, ...]:
    """Return the matrices of a layer that get an adapter; ``targets`` holds names, or is a pattern of whole paths."""
    if targets == "all-linear":
        return tuple(shape.linears)
    if isinstance(targets, str):
        layers = [f"model.layers.{number}" for number in range(shape.layers)]
        paths = {name: [f"{layer}.{part}.{name}" for layer in layers for part in PARTS] for name in shape.linears}
        return tuple(name for name in shape.linears if any(re.fullmatch(targets, path) for path in paths[name]))
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in targets or ()))


def _without(world_size: int) -> Strategy:
    return Strategy("ddp", world_size) if world_size > 1 else Strategy()


def _strategy(deepspeed: dict[str, Any], world_size: int, shape: ModelShape, source: str) -> Strategy:
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage is {stage!r}; predictions are for 1, 2 and 3")

    def elements(key: str, default: int, auto: int) -> int:
        value = zero.get(key, default)
        if value == "auto":
            return auto
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
            raise UserError(f"{source}: zero_optimization.{key} is {value!r}; give a number of elements above 0")
        return int(value)

    defaults = Strategy()
    overlap = zero.get("overlap_comm")
    return Strategy(
        f"zero-{stage}",
        world_size,
        # transformers/integrations/deepspeed.py fills "auto" with hidden_size squared.
        reduce_bucket_size=elements("reduce_bucket_size", defaults.reduce_bucket_size, shape.hidden**2),
        overlap_comm=stage == 3 if overlap is None else bool(overlap),
        max_live_parameters=elements(
            "stage3_max_live_parameters", defaults.max_live_parameters, defaults.max_live_parameters
        ),
        prefetch_bucket_size=_or_none(
            zero, "stage3_prefetch_bucket_size", source, defaults.prefetch_bucket_size, int(0.9 * shape.hidden**2)
        ),
        max_reuse_distance=_or_none(
            zero, "stage3_max_reuse_distance", source, defaults.max_reuse_distance, defaults.max_reuse_distance
        ),
        sub_group_size=elements("sub_group_size", defaults.sub_group_size, defaults.sub_group_size),
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_parameters=_offloads(zero, "offload_param"),
    )


def _or_none(zero: dict[str, Any], key: str, source: str, default: int, auto: int) -> int:
    """Return a size that may be 0: nothing in advance, or nothing kept. ``auto`` is what transformers fills in."""
    value = zero.get(key, default)
    if value == "auto":  # transformers/integrations/deepspeed.py
        return auto
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(f"{source}: zero_optimization.{key} is {value!r}; give a number of elements, 0 or more")
    return int(value)


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
