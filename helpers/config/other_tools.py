"""Hints for keys of other tools (LLaMA-Factory, ms-swift, axolotl, TRL), and for keys in the wrong block."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from helpers.config.values import annotations, suggest
from helpers.errors import UserError

_BASE = "name the base model on the command line, as MODEL_DIR"
_LENGTH = "give max_input_length and max_output_length at the top"
_DATA = "name the files under data_config, as train_file and val_file; DATA_DIR is their folder"
_PRECISION = "give bf16: true or fp16: true under training_args, or leave it out for the best this machine has"
_BITS = "give quantization_bit: 4 or quantization_bit: 8 at the top"
_PACKING = "give packing: 2048 under speed"
_TASK = "remove it; peft_config decides what is trained, and the tokenizer how conversations are written"
HINTS: Mapping[str, str] = {
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "model_id_or_path", "model_type", "model", "tokenizer"), _BASE
    ),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "model_max_length"), _LENGTH),
    **dict.fromkeys(("max_length", "max_source_length", "max_target_length", "max_prompt_length"), _LENGTH),
    **dict.fromkeys(("dataset", "datasets", "dataset_dir", "dataset_text_field", "val_size", "val_set_size"), _DATA),
    **dict.fromkeys(("train_file", "val_file", "test_file", "validation_file", "num_proc", "eval_dataset"), _DATA),
    **dict.fromkeys(("torch_dtype", "dtype", "compute_type", "load_in_16bit"), _PRECISION),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bits", "quant_bits"), _BITS),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing"), _PACKING),
    **dict.fromkeys(("finetuning_type", "train_type", "sft_type", "adapter", "stage", "template"), _TASK),
    **dict.fromkeys(("lora_rank", "lora_r"), "give r under peft_config"),
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "lora_target_linear"), "give target_modules under peft_config"
    ),
    "micro_batch_size": "give per_device_train_batch_size under training_args",
    "num_epochs": "give num_train_epochs under training_args",
    "optimizer": "give optim under training_args",
    "lr_scheduler": "give lr_scheduler_type under training_args",
    "early_stopping_patience": "remove it; load_best_model_at_end keeps the best checkpoint",
    "adafactor": "give optim: adafactor",
}


def check_known_keys(block: Mapping[Any, object], known: Iterable[str], where: str) -> None:
    """Check that every key of a block is known.

    Args:
        block: Keys and values.
        known: The keys it may have.
        where: The block's place, for messages.

    Raises:
        UserError: A key is not; with what to write instead if it is known from elsewhere, or the most similar one.
    """
    for key in block:
        if key not in known:
            elsewhere = _hint(key, where)
            raise UserError(f"{where}: unknown key {key!r}{f'; {elsewhere}' if elsewhere else suggest(key, known)}")


def _hint(key: object, where: str) -> str | None:
    if not isinstance(key, str):
        return None
    for options, block in ((TrainingArguments, "training_args"), (LoraConfig, "peft_config")):
        if key in annotations(options) and not where.endswith(block):
            return f"it belongs under {block}"
    return HINTS.get(key)
