"""Count the tokens of a job's rows, for predictions: no weight is loaded."""

from pathlib import Path

import pyarrow.compute
from datasets import Dataset

from helpers.assets import TINY_MODEL
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.config.finetune import read_finetune_config
from helpers.finetune.dataset import Limits, read_split, training_features
from helpers.finetune.rows import find_split


def row_lengths(features: Dataset) -> list[int]:
    """Count the tokens of each training row.

    Args:
        features: As :func:`helpers.finetune.dataset.training_features` makes them, or packs of them.

    Returns:
        Tokens of each row, or of each pack.
    """
    # Arrow knows the lengths; the ids themselves would take seconds to read.
    return pyarrow.compute.list_value_length(features.data.column("input_ids")).to_pylist()


def read_row_lengths(data_dir: Path, config_file: Path, model_dir: Path | None) -> tuple[list[int], str | None]:
    """Read a job's training data and count the tokens of each row, truncated as in training.

    Args:
        data_dir: Folder with the files that the configuration names.
        config_file: ``lora.yaml``.
        model_dir: Folder with the checkpoint's tokenizer; None takes the embedded one.

    Returns:
        Tokens of each row, and a line with the tokenizer that counted if it was not the checkpoint's.

    Raises:
        UserError: The data cannot be used, or the folder has no tokenizer.
    """
    config = read_finetune_config(config_file)
    limits = Limits(config.max_input_length, config.max_output_length)
    tokenizer = ChatGLMTokenizer.from_pretrained(model_dir or TINY_MODEL)
    path = find_split(data_dir, config.data.train_file)
    split = read_split(path, tokenizer, limits, training=True, num_proc=config.data.num_proc)
    note = None
    if model_dir is None:
        note = (
            "the embedded tokenizer counted the tokens; the checkpoint's own counts differ, and --model FOLDER uses it"
        )
    return row_lengths(training_features(split, limits)), note
