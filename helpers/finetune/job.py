"""The fine-tune before it starts: everything that can be checked without loading a weight."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

import helpers.chatglm3  # noqa: F401  (registers the published layout)
from helpers.chatglm3.checkpoint import check_checkpoint, resolve_folder
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.config.compatibility import check_quantization, check_speed, choose_precision, contradictions
from helpers.config.deepspeed import AUTO, read_deepspeed_config, zero_stage
from helpers.config.finetune import FinetuneConfig, read_finetune_config
from helpers.errors import UserError
from helpers.finetune.checkpoints import complete_checkpoints, read_quantization_bit
from helpers.finetune.dataset import (
    Limits,
    SplitReport,
    evaluation_features,
    read_split,
    training_features,
)
from helpers.finetune.packing import packed_features
from helpers.finetune.ranks import Ranks
from helpers.finetune.rows import find_split
from helpers.hardware import Machine, describe_machine, mixed_precision
from helpers.memory.predict import read_shape
from helpers.memory.predict.jobs import configuration_of
from helpers.memory.predict.planner import fits
from helpers.memory.units import GIB


@dataclass(frozen=True)
class Data:
    """Tokenised splits; ``dev`` and ``answers`` (prompts to answer) are None without a dev file."""

    train: Dataset
    dev: Dataset | None
    answers: Dataset | None
    reports: list[SplitReport]


@dataclass(frozen=True)
class Job:
    """Everything that was checked before a weight is loaded."""

    config: FinetuneConfig
    deepspeed: dict[str, Any] | None
    model_dir: Path
    output_dir: Path
    resume_from: Path | None
    precision: str
    machine: Machine
    tokenizer: ChatGLMTokenizer
    data: Data
    notes: list[str]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed file; 0 without one."""
        return zero_stage(self.deepspeed)


def _resume_point(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises UserError where earlier results would be overwritten or none are there."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; name a folder")
    if resume:
        checkpoints = complete_checkpoints(output_dir)
        if not checkpoints:
            raise UserError(f"--resume: {output_dir} holds no finished checkpoint; start without --resume")
        return checkpoints[-1]
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} is not empty; go on with --resume, or name another with --output-dir")
    return None


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
    train_features = training_features(train, limits)
    if config.speed.packing:
        train_features = packed_features(train_features, config.speed.packing, config.training["seed"])
        notes.append(_packing_note(train_features, config.speed.packing))
    if names.val_file is None or not (folder / names.val_file).is_file():
        missing = f"no file {names.val_file} in {folder}" if names.val_file else "no val_file given"
        notes.append(f"{missing}: evaluation is skipped")
        return Data(train_features, None, None, [train.report])
    dev = read_split(folder / names.val_file, tokenizer, limits, training=False, num_proc=names.num_proc)
    answers = evaluation_features(dev, tokenizer, limits)
    if len(answers) > config.max_eval_samples:
        notes.append(
            f"{config.max_eval_samples} of {len(answers):,} dev answers are generated and scored (max_eval_samples); "
            "helpers.finetune.evaluate scores all"
        )
        answers = answers.select(range(config.max_eval_samples))
    return Data(train_features, training_features(dev, limits), answers, [train.report, dev.report])


def _decide_checkpointing(
    config: FinetuneConfig, deepspeed: dict[str, Any] | None, model: Path, machine: Machine, ranks: Ranks, longest: int
) -> tuple[FinetuneConfig, str]:
    """``gradient_checkpointing: auto`` as true where the smallest GPU could not hold the job without it; and a note."""
    wanted, why = False, "no GPU here whose memory is known"
    sizes = [gpu.total_bytes for gpu in machine.gpus if gpu.total_bytes is not None]
    if sizes:
        job = configuration_of(
            config, deepspeed, shape=read_shape(model), world_size=ranks.world_size, sequence_length=longest
        )
        # FlashAttention, which does without a mask, runs where bf16 does: from Ampere on.
        job = dataclasses.replace(job, padding_mask=job.padding_mask or mixed_precision(machine) != "bf16")
        fit = fits(job, min(sizes))
        wanted = not fit
        why = f"{fit.needed / GIB:.1f} GiB predicted without it, {fit.usable / GIB:.1f} usable"
    training = {key: value for key, value in config.training.items() if key != "activation_checkpointing"}
    decided = dataclasses.replace(config, training=training | {"gradient_checkpointing": wanted})
    return decided, f"gradient_checkpointing auto -> {str(wanted).lower()}: {why}"


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

    ``model_dir`` may be a name on the hub; ``output_dir`` goes before the configuration's. Raises UserError.
    """
    config = read_finetune_config(config_file)
    deepspeed = read_deepspeed_config(deepspeed_file) if deepspeed_file else None
    ranks.check_gpus()
    machine = describe_machine()
    notes = [*machine.notes, *config.notes]
    hardware = "no" if config.training.get("use_cpu") else mixed_precision(machine)
    precision = choose_precision(config.training, deepspeed, hardware)
    if deepspeed is not None:
        differ = contradictions(deepspeed, config.training, ranks.world_size)
        if differ:
            raise UserError(f"{deepspeed_file} contradicts {config_file}: {'; '.join(differ)}; say auto")
    check_quantization(config.quantization_bit, deepspeed)
    check_speed(config, deepspeed)
    output_dir = Path(output_dir or config.training["output_dir"])
    resume_from = _resume_point(output_dir, resume)
    if resume_from is not None and read_quantization_bit(resume_from) != config.quantization_bit:
        raise UserError(
            f"{resume_from} was trained with quantization_bit {read_quantization_bit(resume_from)}, but {config_file} "
            f"says {config.quantization_bit}; go on with the same, or start anew in another folder"
        )
    # Absolute, since the adapter names it as its base, wherever it is read from later.
    model = resolve_folder(model_dir).resolve()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check_checkpoint(model)
    notes += [f"warning: {warning.message}" for warning in warned]
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = _read_data(data_dir, config, tokenizer, notes)
    if config.checkpointing == AUTO:
        limits = Limits(config.max_input_length, config.max_output_length)
        longest = min(data.reports[0].tokens.max, limits.max_length)
        config, note = _decide_checkpointing(config, deepspeed, model, machine, ranks, longest)
        notes.append(note)
    return Job(config, deepspeed, model, output_dir, resume_from, precision, machine, tokenizer, data, notes)
