"""Read a data file and check every row of it, before any weight is loaded.

A file holds JSON lines, or one JSON array. A row is AdvertiseGen's ``{"content", "summary"}``, or
``{"conversations": [messages], "tools": [...]}`` (``helpers.chatglm3.chat`` explains messages).
"""

import codecs
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from helpers.chatglm3.chat import Message, Turn, conversation_turns
from helpers.errors import UserError

SHOWN_PROBLEMS = 5
MAX_REASON_LENGTH = 150


class Row(NamedTuple):
    """A row that passed all checks.

    Attributes:
        number: Its line in the file, or its place in the array, from 1.
        turns: The conversation.
    """

    number: int
    turns: list[Turn]


def find_split(folder: Path, name: str) -> Path:
    """Return the path of a data file in ``folder``. Raises UserError that names the files there are instead."""
    path = folder / name
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder that holds {name}")
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise UserError(f"{path} does not exist; in that folder: {shown or 'no file'}")


def read_rows(path: Path, *, training: bool) -> list[Row]:
    """Read a data file and check every row.

    Args:
        path: The file.
        training: Whether an empty answer is a bad row. In evaluation it is a reference that scores 0.

    Returns:
        The rows, in the order of the file.

    Raises:
        UserError: The file cannot be read, holds no rows, or has bad ones. The first of those are named as
            ``file:line: reason``, or ``file:row N: reason`` in an array.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    raw = raw.removeprefix(codecs.BOM_UTF8)
    numbered: Iterable[tuple[int, Any]]
    check: Callable[..., list[Turn]]
    if raw.lstrip().startswith(b"["):
        unit, numbered, check = "row ", enumerate(_parse_array(path, raw), start=1), check_row
    else:
        # Only a line feed ends a line: a JSON string may contain U+2028 and other separators as they are.
        lines = enumerate(raw.split(b"\n"), start=1)
        unit, numbered, check = "", ((number, line) for number, line in lines if line.strip()), parse_row
    rows, problems = [], []
    for number, content in numbered:
        try:
            rows.append(Row(number, check(content, training=training)))
        except (UserError, RecursionError) as error:
            reason = str(error) if isinstance(error, UserError) else "nested too deeply"
            problems.append(f"{path}:{unit}{number}: {_shortened(reason, MAX_REASON_LENGTH)}")
    total = len(rows) + len(problems)
    if not total:
        raise UserError(f"{path} holds no rows; write one JSON object per line, or one JSON array")
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS:,} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(
            f"{len(problems):,} of {total:,} rows cannot be used; correct or delete them: "
            f"{'; '.join(problems[:SHOWN_PROBLEMS])}{more}"
        )
    return rows


def parse_row(raw: bytes, *, training: bool) -> list[Turn]:
    """Return the turns of one line of JSON. Raises UserError with the reason why the row cannot be used."""
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # a number with too many digits
        raise UserError(f"not JSON ({error})") from error
    return check_row(row, training=training)


def check_row(row: Any, *, training: bool) -> list[Turn]:
    """Return the turns of one parsed row. Raises UserError with the reason why the row cannot be used."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {_shown(row)}")
    messages, tools = _messages_and_tools(row)
    _check_messages(messages)
    turns = conversation_turns(messages, tools)
    _check_turns(turns, training)
    return turns


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
    """Check the types that ``conversation_turns`` relies on."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"message {number} must be an object with a role, not {_shown(message)}")
        for key, expected, description in (("metadata", str, "a string"), ("loss", bool, "true or false")):
            if message.get(key) is not None and not isinstance(message[key], expected):
                raise UserError(f"{key} of message {number} must be {description}, not {_shown(message[key])}")
        if message["role"] == "tool" and "observation" not in message:
            raise UserError(f"message {number} of role tool has no observation")


def _check_turns(turns: list[Turn], training: bool) -> None:
    """Check that the turns may follow each other like this, and that there is something to train."""
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
        raise UserError("empty answer; give it loss false if it is intended")


def _check_order(previous: Turn | None, turn: Turn) -> None:
    before = previous.role if previous else None
    called_tool = previous is not None and before == "assistant" and bool(previous.metadata)
    allowed = {
        "system": before in (None, "system"),
        "user": before in (None, "system") or (before == "assistant" and not called_tool),
        # A thought and the tool call that follows it are two assistant turns.
        "assistant": before in ("user", "observation")
        or (before == "assistant" and not called_tool and bool(turn.metadata)),
        "observation": called_tool,
    }
    if not allowed[turn.role]:
        after = "the call of a tool" if called_tool else f"the {before} turn" if before else "nothing"
        raise UserError(f"the {turn.role} turn {_shown(turn.text)} comes after {after}")


def _check_text(text: str) -> None:
    # JSON can spell half of a surrogate pair, which no encoding can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half a character, {text[error.start]!r}, in {_shown(text)}") from error


def _shown(value: Any) -> str:
    return _shortened(repr(value), 40)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
