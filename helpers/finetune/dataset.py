"""Turn the files of a data folder into token ids, labels, and prompts to answer."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from helpers.activations.chunked_loss import IGNORE_INDEX
from helpers.chatglm3.chat import Turn, encode_turns
from helpers.chatglm3.tokenizer import ROLE_TOKENS, ChatGLMTokenizer
from helpers.errors import UserError
from helpers.finetune.rows import Row, read_rows
from helpers.finetune.split_report import SplitReport, TokenStatistics

# Encoding this many short rows takes less than a second; for fewer, another process is not worth its start.
ROWS_PER_PROCESS = 10_000

_TEXTS = dict.fromkeys(("role", "metadata", "text"), List(Value("string")))
_TURN_FEATURES = Features({"number": Value("int32"), **_TEXTS, "trained": List(Value("bool"))})
_ROW_FEATURES = Features(
    {
        "number": Value("int32"),
        "tokens": Value("int32"),
        "first_trained": Value("int32"),
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
    }
)
_TRAINING_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
_EVALUATION_FEATURES = Features(
    {
        "number": Value("int32"),
        "prompt_ids": List(Value("int32")),
        "prompt": Value("string"),
        "full_prompt": Value("string"),
        "reference": Value("string"),
        "truncated": Value("bool"),
    }
)


@dataclass(frozen=True)
class Limits:
    """The published limits, in tokens.

    Args:
        max_input_length: Of a prompt that is answered in evaluation.
        max_output_length: Of an answer.
    """

    max_input_length: int
    max_output_length: int

    @property
    def max_length(self) -> int:
        """Tokens of a training row, at most."""
        return self.max_input_length + self.max_output_length + 1


@dataclass(frozen=True)
class Split:
    """A checked and tokenised data file.

    Attributes:
        report: What the file holds.
        rows: Per row its ``number`` (line of the file, or place in the array), and without truncation ``input_ids``,
            ``trained`` (bool per token), ``tokens`` (how many) and ``first_trained`` (index of the first trained one).
    """

    report: SplitReport
    rows: Dataset


def read_split(
    path: Path, tokenizer: ChatGLMTokenizer, limits: Limits, *, training: bool, num_proc: int | None = None
) -> Split:
    """Read, check and tokenise a data file.

    Args:
        path: The file, in any format that :mod:`helpers.finetune.formats` reads.
        tokenizer: ChatGLM3's.
        limits: What the report counts as truncated.
        training: Whether an empty answer is a bad row. In evaluation it is a reference that scores 0.
        num_proc: Processes that tokenise, at most; fewer are used if the rows or the CPUs do not warrant them.

    Returns:
        The tokenised rows and a report.

    Raises:
        UserError: The file cannot be read, holds no rows, or has bad ones, which are named with line and reason.
    """
    file = read_rows(path, training=training)
    rows = _map(
        _turns_dataset(file.rows),
        _encode_batch,
        _ROW_FEATURES,
        processes=_number_of_processes(num_proc, len(file.rows)),
        tokenizer=tokenizer,
    )
    lengths = np.array(rows["tokens"][:])
    report = SplitReport(
        path=path,
        format=file.format,
        rows=len(rows),
        truncated=int((lengths > limits.max_length).sum()),
        untrainable=len(rows) - len(_trainable(rows, limits)),
        tokens=TokenStatistics(
            mean=float(lengths.mean()),
            p50=int(np.percentile(lengths, 50, method="higher")),
            p95=int(np.percentile(lengths, 95, method="higher")),
            max=int(lengths.max()),
        ),
        notes=file.notes,
    )
    return Split(report, rows)


def training_features(split: Split, limits: Limits) -> Dataset:
    """Label the rows of a split, truncated to ``limits.max_length``.

    Rows with nothing left to train are dropped: alone in a batch, their loss would be 0/0.

    Args:
        split: The tokenised rows.
        limits: The lengths to truncate to.

    Returns:
        Per row ``input_ids`` and ``labels`` (``IGNORE_INDEX`` where not trained; aligned with the input).

    Raises:
        UserError: No row has anything left to train.
    """
    kept = _trainable(split.rows, limits)
    if not kept:
        raise UserError(
            f"{split.report.path}: after truncation to max_input_length + max_output_length + 1 = {limits.max_length} "
            f"tokens no row has anything to train; the rows have {split.report.tokens.mean:.0f} tokens on average"
        )
    return _map(split.rows.select(kept), _label_batch, _TRAINING_FEATURES, max_length=limits.max_length)


def evaluation_features(split: Split, tokenizer: ChatGLMTokenizer, limits: Limits) -> Dataset:
    """Make a prompt for each trained assistant turn, and the answer to compare with.

    A prompt that is too long begins with a later user turn. If even the turn that is answered is too long, its first
    tokens are kept.

    Args:
        split: The tokenised rows.
        tokenizer: ChatGLM3's.
        limits: The lengths to truncate to.

    Returns:
        Per answer: ``number`` of its row; ``prompt_ids``, at most ``max_input_length`` tokens and then
        ``<|assistant|>``; ``prompt``, the text of the turn that is answered; ``full_prompt``, all turns up to it, never
        truncated; ``reference``, the text of the answer, at most ``max_output_length`` tokens; ``truncated``, whether
        the prompt was.
    """
    return _map(split.rows, _evaluation_batch, _EVALUATION_FEATURES, tokenizer=tokenizer, limits=limits)


def truncation_notes(prompts: Dataset, path: Path, limits: Limits) -> list[str]:
    """Return one line about the prompts that are truncated before they are answered; none if all of them fit."""
    truncated = sum(prompts["truncated"][:])
    if not truncated:
        return []
    return [
        f"warning: {path}: {truncated:,} of {len(prompts):,} prompts are longer than max_input_length "
        f"{limits.max_input_length} and are truncated before they are answered (cut in predictions.jsonl); raise it"
    ]


def decode_text(tokenizer: ChatGLMTokenizer, ids: Sequence[int]) -> str:
    """Decode a turn without special tokens, and without the line break that begins every turn."""
    return tokenizer.decode_ids(ids, skip_special_tokens=True).strip()


def _turns_dataset(rows: list[Row]) -> Dataset:
    """Put rows into Arrow, from where other processes read them: a column per field of a turn."""
    columns = {field: [[getattr(turn, field) for turn in row.turns] for row in rows] for field in Turn._fields}
    return Dataset.from_dict({"number": [row.number for row in rows], **columns}, features=_TURN_FEATURES)


def _encode_batch(batch: dict[str, list], tokenizer: ChatGLMTokenizer) -> dict[str, list]:
    conversations = zip(*(batch[field] for field in Turn._fields), strict=True)
    encoded = [encode_turns(tokenizer, map(Turn, *fields)) for fields in conversations]
    return {
        "number": batch["number"],
        "tokens": [len(e.input_ids) for e in encoded],
        "first_trained": [e.trained.index(True) for e in encoded],
        "input_ids": [e.input_ids for e in encoded],
        "trained": [e.trained for e in encoded],
    }


def _label_batch(batch: dict[str, list], max_length: int) -> dict[str, list]:
    pairs = list(zip(batch["input_ids"], batch["trained"], strict=True))
    return {
        "input_ids": [ids[:max_length] for ids, _ in pairs],
        "labels": [np.where(trained, ids, IGNORE_INDEX)[:max_length] for ids, trained in pairs],
    }


def _evaluation_batch(batch: dict[str, list], tokenizer: ChatGLMTokenizer, limits: Limits) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in _EVALUATION_FEATURES}
    for number, ids, trained in zip(batch["number"], batch["input_ids"], batch["trained"], strict=True):
        for entry in _answers(ids, trained, tokenizer, limits):
            for name, value in {"number": number, **entry}.items():
                columns[name].append(value)
    return columns


def _answers(
    ids: list[int], trained: list[bool], tokenizer: ChatGLMTokenizer, limits: Limits
) -> Iterator[dict[str, Any]]:
    """Yield the evaluation features of each trained assistant turn of one conversation."""
    roles = {tokenizer.special_token_ids[token] for token in ROLE_TOKENS}
    user, assistant = tokenizer.role_token_id("user"), tokenizer.role_token_id("assistant")
    # Text never becomes a role token, so each of them begins a turn; it ends before the next one or at </s>.
    starts = [i for i, token in enumerate(ids) if token in roles]
    ends = [*starts[1:], len(ids) - 1]
    prefix = ids[: starts[0]]
    room = max(0, limits.max_input_length - len(prefix))
    for turn in range(1, len(starts)):
        start = starts[turn]
        if ids[start] != assistant or not trained[start + 1]:
            continue
        # The whole conversation if it fits, else from the earliest user turn on that does.
        begins = [starts[0], *(i for i in starts[:turn] if ids[i] == user)]
        history = next((ids[begin:start] for begin in begins if start - begin <= room), None)
        if history is None:
            history = ids[starts[turn - 1] : start][:room]
        yield {
            "prompt_ids": [*prefix, *history, assistant],
            "prompt": decode_text(tokenizer, ids[starts[turn - 1] : start]),
            "full_prompt": tokenizer.decode(ids[starts[0] : start]),
            "reference": decode_text(tokenizer, ids[start + 1 : ends[turn]][: limits.max_output_length]),
            "truncated": len(prefix) + len(history) < start,
        }


def _trainable(rows: Dataset, limits: Limits) -> list[int]:
    """Return the indices of the rows that keep a trained token after truncation."""
    return [i for i, first in enumerate(rows["first_trained"][:]) if first < limits.max_length]


def _number_of_processes(requested: int | None, rows: int) -> int:
    """Limit the processes to what was requested, what the rows are worth, and this rank's share of the CPUs."""
    cpus = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(requested or 1, cpus // ranks, rows // ROWS_PER_PROCESS))


def _map(
    rows: Dataset, function: Callable[..., dict[str, list]], features: Features, processes: int = 1, **arguments: Any
) -> Dataset:
    """Replace all columns of ``rows`` by those of ``function``, in batches and without a progress bar."""
    with _no_progress_bars():
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            features=features,
            fn_kwargs=arguments,
            num_proc=processes if processes > 1 else None,
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
