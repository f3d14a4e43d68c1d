"""Read a split of the data, check every row before any weight is loaded, and turn rows into token ids.

A split is a file of JSON lines or one JSON array. A row is AdvertiseGen's ``{"content", "summary"}`` or
``{"conversations": [messages], "tools": [...]}`` (``helpers.chatglm3.chat`` says what a message may hold).
"""

import codecs
import json
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
from helpers.chatglm3.chat import Message, Turn, conversation_turns, encode_conversation
from helpers.chatglm3.tokenizer import ROLE_TOKENS, ChatGLMTokenizer
from helpers.errors import UserError

SHOWN_PROBLEMS = 5
MAX_REASON_LENGTH = 150
# Encoding this many short rows takes less than a second; for fewer, another process is not worth its start.
ROWS_PER_PROCESS = 10_000

_ROW_FEATURES = Features(
    {
        "number": Value("int32"),
        "problem": Value("string"),
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
        "reference": Value("string"),
        "truncated": Value("bool"),
    }
)


@dataclass(frozen=True)
class Limits:
    """The published limits, in tokens: of a prompt that is answered in evaluation, and of an answer."""

    max_input_length: int
    max_output_length: int

    @property
    def max_length(self) -> int:
        """Tokens of a training row, at most."""
        return self.max_input_length + self.max_output_length + 1


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens of a row before truncation."""

    mean: float
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class SplitReport:
    """What a split holds. ``truncated`` and ``untrainable`` are rows; the latter keep no trained token when cut."""

    path: Path
    rows: int
    truncated: int
    untrainable: int
    tokens: TokenStatistics

    def __str__(self) -> str:
        tokens = self.tokens
        return (
            f"{self.path}: {self.rows:,} rows; tokens a row: mean {tokens.mean:.0f}, median {tokens.p50}, "
            f"95th percentile {tokens.p95}, longest {tokens.max}; {self.truncated:,} rows truncated, "
            f"{self.untrainable:,} of them with nothing left to train"
        )


@dataclass(frozen=True)
class Split:
    """A checked split. ``rows`` holds ``number`` (line, or place in the array), ``input_ids`` and ``trained``, uncut;
    ``tokens`` counts them and ``first_trained`` is the place of the first trained one.
    """

    report: SplitReport
    rows: Dataset


def find_split(folder: Path, name: str) -> Path:
    """The path of a data file in ``folder``. Raises UserError that names the files which are there instead."""
    path = folder / name
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder that holds {name}")
    there = sorted(p.name for p in folder.iterdir() if p.is_file())
    shown = ", ".join(there[:10]) + (", …" if len(there) > 10 else "")
    raise UserError(f"{path} does not exist; in that folder: {shown or 'no file'}")


def read_split(
    path: Path, tokenizer: ChatGLMTokenizer, limits: Limits, *, training: bool, num_proc: int | None = None
) -> Split:
    """Read, check and tokenise the data file ``path``.

    ``training``: an empty answer is then a bad row; in evaluation it is a reference that scores 0.
    ``num_proc`` is the wish of the configuration; never more processes are used than the rows and CPUs are worth.

    Raises UserError if the file cannot be read, has no rows, or has bad ones: the first of them are named as
    ``file:line: reason`` (``file:row N: reason`` in an array).
    """
    numbers, jsons, unit = _read_rows(path)
    if not jsons:
        raise UserError(f"{path} holds no rows; write one JSON object a line, or one JSON array")
    rows = _map(
        Dataset.from_dict({"number": numbers, "json": jsons}),
        _encode_batch,
        _ROW_FEATURES,
        processes=_processes(num_proc, len(jsons)),
        tokenizer=tokenizer,
        training=training,
    )
    bad = [i for i, problem in enumerate(rows["problem"][:]) if problem]
    if bad:
        found = rows.select(bad[:SHOWN_PROBLEMS])
        named = "; ".join(f"{path}:{unit}{row['number']}: {row['problem']}" for row in found)
        more = f"; and {len(bad) - SHOWN_PROBLEMS:,} more" if len(bad) > SHOWN_PROBLEMS else ""
        raise UserError(f"{len(bad):,} of {len(jsons):,} rows cannot be used; correct or delete them: {named}{more}")
    lengths = np.array(rows["tokens"][:])
    report = SplitReport(
        path=path,
        rows=len(rows),
        truncated=int((lengths > limits.max_length).sum()),
        untrainable=len(rows) - len(_trainable(rows, limits)),
        tokens=TokenStatistics(
            mean=float(lengths.mean()),
            p50=int(np.percentile(lengths, 50, method="higher")),
            p95=int(np.percentile(lengths, 95, method="higher")),
            max=int(lengths.max()),
        ),
    )
    return Split(report, rows.remove_columns("problem"))


def training_features(split: Split, limits: Limits) -> Dataset:
    """``input_ids`` and ``labels`` (-100 where not trained) of each row, cut to ``limits.max_length``.

    Rows with nothing left to train are left out: alone in a batch, their loss would be 0/0.
    Raises UserError if no row is left.
    """
    kept = _trainable(split.rows, limits)
    if not kept:
        raise UserError(
            f"{split.report.path}: after truncation to max_input_length + max_output_length + 1 = {limits.max_length} "
            f"tokens no row has anything to train; the rows have {split.report.tokens.mean:.0f} tokens in the mean"
        )
    return _map(split.rows.select(kept), _label_batch, _TRAINING_FEATURES, max_length=limits.max_length)


def evaluation_features(split: Split, tokenizer: ChatGLMTokenizer, limits: Limits) -> Dataset:
    """One entry for each trained assistant turn: the prompt before it, and what should be answered.

    ``prompt_ids`` end with ``<|assistant|>`` and have ``max_input_length`` tokens before it at most. A longer prompt
    (``truncated`` is true) begins with a later user turn; if even the turn that is answered is too long, with its first
    tokens. ``prompt`` is the text of that turn, ``reference`` the wanted answer, cut to ``max_output_length`` tokens;
    ``number`` is the row's.
    """
    return _map(split.rows, _evaluation_batch, _EVALUATION_FEATURES, tokenizer=tokenizer, limits=limits)


def decode_text(tokenizer: ChatGLMTokenizer, ids: Sequence[int]) -> str:
    """The text of a turn without special tokens, and without the line break that begins every turn."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def parse_row(raw: bytes, *, training: bool) -> tuple[list[Message], list[Any] | None]:
    """The messages and tools of one row of JSON. Raises UserError with the reason why the row cannot be used."""
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise UserError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"a JSON object is wanted, not {_shown(row)}")
    messages, tools = _messages_and_tools(row)
    _check_messages(messages)
    _check_turns(conversation_turns(messages, tools), training)
    return messages, tools


def _messages_and_tools(row: dict[str, Any]) -> tuple[list[Message], list[Any] | None]:
    if "conversations" in row:
        messages, tools = row["conversations"], row.get("tools")
        if not isinstance(messages, list) or not messages:
            raise UserError(f"conversations must be a list of messages, not {_shown(messages)}")
        if tools is not None and not isinstance(tools, list):
            raise UserError(f"tools must be a list, not {_shown(tools)}")
        return messages, tools
    if "content" in row and "summary" in row:
        roles = {"user": row["content"], "assistant": row["summary"]}
        return [{"role": role, "content": content} for role, content in roles.items()], None
    raise UserError(f"neither conversations nor content and summary in it (it has {', '.join(row) or 'no key'})")


def _check_messages(messages: list[Any]) -> None:
    """The types that ``conversation_turns`` takes for granted."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"message {number} must be an object with a role, not {_shown(message)}")
        for key, kind, wanted in (("metadata", str, "a string"), ("loss", bool, "true or false")):
            if message.get(key) is not None and not isinstance(message[key], kind):
                raise UserError(f"{key} of message {number} must be {wanted}, not {_shown(message[key])}")
        if message["role"] == "tool" and "observation" not in message:
            raise UserError(f"message {number} of role tool has no observation")


def _check_turns(turns: list[Turn], training: bool) -> None:
    """Whether the turns can follow each other so, and hold something to train."""
    previous: Turn | None = None
    for turn in turns:
        _check_order(previous, turn)
        _check_text(turn.metadata + turn.text)
        previous = turn
    if turns[-1].role == "user":
        raise UserError("the last user turn has no answer")
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise UserError("no assistant turn")
    trained = [turn for turn in answers if turn.trained]
    if not trained:
        raise UserError("every assistant turn has loss false: nothing to train")
    if training and any(not turn.text.strip() for turn in trained):
        raise UserError("empty answer; give it loss false if it is meant")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half a character, {text[error.start]!r}, in {_shown(text)}") from error


def _check_order(previous: Turn | None, turn: Turn) -> None:
    before = previous.role if previous else None
    called = previous is not None and before == "assistant" and bool(previous.metadata)
    allowed = {
        "system": before in (None, "system"),
        "user": before in (None, "system") or (before == "assistant" and not called),
        # A thought, and then the call of a tool, are two assistant turns.
        "assistant": before in ("user", "observation")
        or (before == "assistant" and not called and bool(turn.metadata)),
        "observation": called,
    }
    if not allowed[turn.role]:
        after = "the call of a tool" if called else f"the {before} turn" if before else "nothing"
        raise UserError(f"the {turn.role} turn {_shown(turn.text)} comes after {after}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _read_rows(path: Path) -> tuple[list[int], list[bytes], str]:
    """Number and JSON of each row, and what stands before a number in ``file:number``."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if raw.lstrip().startswith(b"["):
        rows = [json.dumps(row).encode() for row in _parse_array(path, raw)]
        return list(range(1, len(rows) + 1)), rows, "row "
    # Only a line feed ends a line: a JSON string may hold U+2028 and its like as they are.
    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]
    return [number for number, _ in lines], [line for _, line in lines], ""


def _parse_array(path: Path, raw: bytes) -> list[Any]:
    try:
        return json.loads(raw.decode())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); "
            "the file begins with [, so it must be one JSON array"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _encode_batch(batch: dict[str, list], tokenizer: ChatGLMTokenizer, training: bool) -> dict[str, list]:
    encoded = [_encode_row(raw, tokenizer, training) for raw in batch["json"]]
    return {
        "number": batch["number"],
        "problem": [problem for problem, _, _ in encoded],
        "tokens": [len(ids) for _, ids, _ in encoded],
        "first_trained": [trained.index(True) if trained else 0 for _, _, trained in encoded],
        "input_ids": [ids for _, ids, _ in encoded],
        "trained": [trained for _, _, trained in encoded],
    }


def _encode_row(raw: bytes, tokenizer: ChatGLMTokenizer, training: bool) -> tuple[str | None, list[int], list[bool]]:
    """The problem of a row, or None; its ids; which of them are trained."""
    try:
        messages, tools = parse_row(raw, training=training)
        encoded = encode_conversation(tokenizer, messages, tools)
    except RecursionError:
        return "nested too deeply", [], []
    except UserError as error:
        reason = str(error)
        return reason if len(reason) <= MAX_REASON_LENGTH else f"{reason[:MAX_REASON_LENGTH]}…", [], []
    return None, encoded.input_ids, encoded.trained


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
    """The evaluation features of each trained assistant turn of one conversation."""
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
            "reference": decode_text(tokenizer, ids[start + 1 : ends[turn]][: limits.max_output_length]),
            "truncated": len(prefix) + len(history) < start,
        }


def _trainable(rows: Dataset, limits: Limits) -> list[int]:
    """Places of the rows that keep a trained token after truncation."""
    return [i for i, first in enumerate(rows["first_trained"][:]) if first < limits.max_length]


def _processes(wanted: int | None, rows: int) -> int:
    """How many processes to encode with: no more than wished, than the rows are worth, and than this rank's CPUs."""
    cpus = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(wanted or 1, cpus // ranks, rows // ROWS_PER_PROCESS))


def _map(
    rows: Dataset, function: Callable[..., dict[str, list]], features: Features, processes: int = 1, **arguments: Any
) -> Dataset:
    """``rows.map`` in batches, all columns replaced, without a progress bar."""
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
