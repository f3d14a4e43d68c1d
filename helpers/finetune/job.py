"""Prepare a fine-tune: read its files and check everything that can be checked without loading a weight."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers.chatglm3.checkpoint import check_checkpoint, resolve_folder
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.config.compatibility import (
    check_adapter_options,
    check_gpu_options,
    check_method,
    check_quantization,
    check_speed,
    choose_precision,
    contradictions,
)
from helpers.config.deepspeed import AUTO, choose_deepspeed_file, read_deepspeed_config, zero_stage
from helpers.config.deepspeed_defaults import with_defaults
from helpers.config.deepspeed_optimizer import check_deepspeed_optimizer
from helpers.config.deepspeed_schema import check_deepspeed_values
from helpers.config.finetune import FinetuneConfig, read_finetune_config
from helpers.config.overruled import overruled_options, rate_notes
from helpers.errors import UserError
from helpers.finetune.adapter import check_adapter, check_prefix
from helpers.finetune.dataset import (
    Limits,
    SplitReport,
    evaluation_features,
    read_split,
    training_features,
    truncation_notes,
)
from helpers.finetune.fp8 import check_fp8
from helpers.finetune.packing import packed_features
from helpers.finetune.ranks import Ranks
from helpers.finetune.resume import agree_on_facts, resume_point
from helpers.finetune.rows import find_split
from helpers.finetune.same_training import check_same_training, training_facts
from helpers.finetune.steps import check_rows_fill_a_batch, planned_steps
from helpers.hardware import Machine, describe_machine, mixed_precision
from helpers.memory.predict import read_shape
from helpers.memory.predict.jobs import configuration_of
from helpers.memory.predict.machine import calibrated
from helpers.memory.predict.planner import fits
from helpers.memory.units import GIB


@dataclass(frozen=True)
class Data:
    """Tokenised splits.

    Attributes:
        train: Training features: one example, or one pack, per row.
        dev: Training features of the dev file; None without one.
        answers: Prompts of the dev file to answer and score; None without one.
        reports: What was read from each file.
    """

    train: Dataset
    dev: Dataset | None
    answers: Dataset | None
    reports: list[SplitReport]


@dataclass(frozen=True)
class Job:
    """A checked fine-tune, ready to load weights.

    Attributes:
        config: Contents of ``lora.yaml``, with every "auto" decided.
        deepspeed: Contents of the DeepSpeed file, where the Trainer fills in "auto"; None without one.
        model_dir: Local folder of the checkpoint, absolute and checked.
        output_dir: Folder of the results.
        resume_from: Checkpoint to continue from; None to start fresh.
        precision: "bf16", "fp16" or "no" (fp32).
        machine: This machine.
        tokenizer: The checkpoint's.
        data: The tokenised splits.
        facts: What decides the training, for the checkpoints.
        planned_steps: Optimizer steps of the whole training.
        notes: One line for each decision the files left open, and for each warning.
    """

    config: FinetuneConfig
    deepspeed: dict[str, Any] | None
    model_dir: Path
    output_dir: Path
    resume_from: Path | None
    precision: str
    machine: Machine
    tokenizer: ChatGLMTokenizer
    data: Data
    facts: dict[str, Any]
    planned_steps: int
    notes: list[str]

    @property
    def zero_stage(self) -> int:
        """The DeepSpeed file's ZeRO stage; 0 without a file."""
        return zero_stage(self.deepspeed)


def _packing_note(packs: Dataset, capacity: int) -> str:
    lengths = packs["lengths"][:]
    rows, tokens = sum(map(len, lengths)), sum(map(sum, lengths))
    return (
        f"packing: {rows:,} rows into {len(packs):,} packs of {capacity:,} tokens, "
        f"{tokens / (len(packs) * capacity):.1%} full"
    )


def _read_data(folder: Path, config: FinetuneConfig, tokenizer: ChatGLMTokenizer, notes: list[str]) -> Data:
    limits = Limits(config.max_input_length, config.max_output_length)
    names = config.data
    train = read_split(find_split(folder, names.train_file), tokenizer, limits, training=True, num_proc=names.num_proc)
    notes += train.report.notes
    train_features = training_features(train, limits)
    if config.speed.packing:
        train_features = packed_features(train_features, config.speed.packing, config.training["seed"])
        notes.append(_packing_note(train_features, config.speed.packing))
    if names.val_file is None or not (folder / names.val_file).is_file():
        missing = f"no file {names.val_file} in {folder}" if names.val_file else "no val_file given"
        notes.append(f"{missing}: evaluation is skipped")
        return Data(train_features, None, None, [train.report])
    dev = read_split(folder / names.val_file, tokenizer, limits, training=False, num_proc=names.num_proc)
    notes += dev.report.notes
    answers = evaluation_features(dev, tokenizer, limits)
    if len(answers) > config.max_eval_samples:
        notes.append(
            f"{config.max_eval_samples} of {len(answers):,} dev answers are generated and scored (max_eval_samples); "
            "helpers.finetune.evaluate scores all"
        )
        answers = answers.select(range(config.max_eval_samples))
    notes += truncation_notes(answers, dev.report.path, limits)
    return Data(train_features, training_features(dev, limits), answers, [train.report, dev.report])


def _decide_checkpointing(
    config: FinetuneConfig, deepspeed: dict[str, Any] | None, model: Path, machine: Machine, ranks: Ranks, longest: int
) -> tuple[FinetuneConfig, str]:
    """Decide ``gradient_checkpointing: auto``: true if the smallest GPU could not hold the job without it.

    Returns the configuration with the decision, and a line that gives its reason.
    """
    enable, reason = False, "no GPU here with a known memory size"
    sizes = [gpu.total_bytes for gpu in machine.gpus if gpu.total_bytes is not None]
    if config.prefix:
        reason = "PREFIX_TUNING does not go with it"
    elif sizes:
        job = configuration_of(
            config, deepspeed, shape=read_shape(model), world_size=ranks.world_size, sequence_length=longest
        )
        # FlashAttention needs no mask, but it runs only on GPUs that have bf16: Ampere and later.
        mask = job.padding_mask or mixed_precision(machine) != "bf16"
        job = dataclasses.replace(job, padding_mask=mask, machine=calibrated())
        fit = fits(job, min(sizes))
        enable = not fit
        reason = f"{fit.needed / GIB:.1f} GiB predicted without it, {fit.usable / GIB:.1f} usable"
    training = {key: value for key, value in config.training.items() if key != "activation_checkpointing"}
    decided = dataclasses.replace(config, training=training | {"gradient_checkpointing": enable})
    return decided, f"gradient_checkpointing auto -> {str(enable).lower()}: {reason}"


def prepare(
    data_dir: Path,
    model_dir: str,
    config_file: Path,
    deepspeed_file: Path | None,
    *,
    output_dir: Path | None,
    resume: bool,
    ranks: Ranks,
) -> Job:
    """Check everything that can be checked without loading a weight.

    Args:
        data_dir: Folder with the files that the configuration names.
        model_dir: Folder of a ChatGLM3 checkpoint, or its name on the Hub.
        config_file: ``lora.yaml``.
        deepspeed_file: DeepSpeed JSON; None trains without DeepSpeed.
        output_dir: Overrides the configuration's ``output_dir``.
        resume: Continue from the newest checkpoint in the output folder.
        ranks: This process's place.

    Returns:
        The job.

    Raises:
        UserError: Something is missing, wrong or contradictory.
    """
    config = read_finetune_config(config_file)
    deepspeed_file = choose_deepspeed_file(config.deepspeed_file, config_file, deepspeed_file)
    deepspeed = read_deepspeed_config(deepspeed_file) if deepspeed_file else None
    if deepspeed is not None and deepspeed_file is not None:
        check_deepspeed_values(deepspeed, deepspeed_file)
    ranks.check_gpus()
    machine = describe_machine()
    notes = [*machine.notes, *config.notes]
    hardware = "no" if config.training.get("use_cpu") else mixed_precision(machine)
    precision = choose_precision(config.training, deepspeed, hardware)
    if deepspeed is not None and deepspeed_file is not None:
        deepspeed = with_defaults(deepspeed, deepspeed_file, notes)
        check_deepspeed_optimizer(deepspeed, config.training, deepspeed_file, notes)
        found = contradictions(deepspeed, config.training, ranks.world_size)
        if found:
            raise UserError(f"{deepspeed_file} contradicts {config_file}: {'; '.join(found)}; write auto in the former")
    check_method(config)
    check_quantization(config.quantization_bit, deepspeed)
    check_gpu_options(deepspeed, hardware)
    check_speed(config, deepspeed)
    check_adapter_options(config, deepspeed)
    output_dir = Path(output_dir or config.training["output_dir"])
    resume_from = resume_point(output_dir, resume, ranks, notes)
    # Absolute, because the adapter records it as its base and may be read from another working directory.
    model = resolve_folder(model_dir).resolve()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check_checkpoint(model)
    notes += [f"warning: {warning.message}" for warning in warned]
    notes += check_fp8(config, deepspeed, machine, read_shape(model))
    if config.lora:
        check_adapter(config.lora, model, str(config_file), rounded=config.base_format is not None)
    check_prefix(config, model, str(config_file))
    facts = training_facts(
        config,
        deepspeed,
        precision=precision,
        world_size=ranks.world_size,
        model_dir=model,
        train_file=find_split(data_dir, config.data.train_file),
    )
    agree_on_facts(facts, ranks)
    if resume_from is not None:
        notes += check_same_training(resume_from, facts, config_file)
    tokenizer = ChatGLMTokenizer.from_pretrained(model)
    data = _read_data(data_dir, config, tokenizer, notes)
    planned = planned_steps(config.training, len(data.train), ranks.world_size)
    check_rows_fill_a_batch(planned, config.training, len(data.train), ranks.world_size)
    notes += overruled_options(config.training)
    if not (deepspeed or {}).get("scheduler"):  # otherwise it replaces the Trainer's
        notes += rate_notes(config.training, planned)
    if config.checkpointing == AUTO:
        limits = Limits(config.max_input_length, config.max_output_length)
        longest = min(data.reports[0].tokens.max, limits.max_length)
        config, note = _decide_checkpointing(config, deepspeed, model, machine, ranks, longest)
        notes.append(note)
    return Job(
        config, deepspeed, model, output_dir, resume_from, precision, machine, tokenizer, data, facts, planned, notes
    )
