"""Read a data file and check every row of it, before any weight is loaded.

``helpers.finetune.formats`` has the kinds of files, ``helpers.finetune.shapes`` the ways to write a row.
"""

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from helpers.chatglm3.chat import Turn, conversation_turns
from helpers.errors import UserError
from helpers.finetune.formats import read_file
from helpers.finetune.messages import shown
from helpers.finetune.shapes import recognise

SHOWN_PROBLEMS = 5
MAX_REASON_LENGTH = 200
# What differs between two rows with the same fault: numbers, and the values that are shown.
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\d+|, not .*|\(it has [^)]*\)")


class CheckedRow(NamedTuple):
    """What one row holds.

    Attributes:
        turns: The conversation.
        shape: How the row is written: "content/summary", "messages" …
        remarks: Surprises for its author.
    """

    turns: list[Turn]
    shape: str
    remarks: list[str]


class Row(NamedTuple):
    """A row that passed all checks.

    Attributes:
        number: Its line in the file, or its place in the array, from 1.
        turns: The conversation.
    """

    number: int
    turns: list[Turn]


class DataFile(NamedTuple):
    """The rows of a file.

    Attributes:
        rows: All of them, in the order of the file.
        format: How the file and its rows are written: "JSON lines of content/summary".
        notes: One line for each thing that its author may not expect, as a key that is not used.
    """

    rows: list[Row]
    format: str
    notes: list[str]


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


def read_rows(path: Path, *, training: bool) -> DataFile:
    """Read a data file and check every row.

    Args:
        path: The file.
        training: Whether an empty answer is a bad row. In evaluation it is a reference that scores 0.

    Returns:
        The rows, and what to report about them.

    Raises:
        UserError: The file cannot be read, holds no rows, or has bad ones. The first of those are named as
            ``file:line: reason``, or ``file:row N: reason`` where rows are counted. If all rows have the same fault,
            it is named once.
    """
    file = read_file(path)
    rows: list[Row] = []
    problems: dict[int, str] = {}
    shapes: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    for number, content in file.rows:
        try:
            if isinstance(content, UserError):
                raise content
            checked = check_row(content, training=training)
        except (UserError, RecursionError) as error:
            problems[number] = str(error) if isinstance(error, UserError) else "nested too deeply"
        else:
            rows.append(Row(number, checked.turns))
            shapes[checked.shape] += 1
            remarks.update(checked.remarks)
    if problems:
        raise UserError(_described(path, file.unit, problems, len(rows)))
    if not rows:
        raise UserError(f"{path} holds no rows; write one JSON object per line, or one JSON array")
    written = f"{file.format} of {' and '.join(shape for shape, _ in shapes.most_common())}"
    notes = [f"warning: {path}: {remark} (in {count:,} of {len(rows):,} rows)" for remark, count in remarks.items()]
    return DataFile(rows, written, notes)


def _described(path: Path, unit: str, problems: dict[int, str], good: int) -> str:
    """Describe what is wrong with the rows of a file, by number."""
    total = len(problems) + good
    kinds = {_VARIABLE.sub("", reason) for reason in problems.values()}
    if len(problems) > 1 and not good and len(kinds) == 1:
        number, reason = next(iter(problems.items()))
        place = f"{unit or 'line '}{number}"
        return f"{path}: no row can be used, all {total:,} for the same reason; {place}: {_shortened(reason, 400)}"
    named = [
        f"{path}:{unit}{number}: {_shortened(reason, MAX_REASON_LENGTH)}"
        for number, reason in islice(problems.items(), SHOWN_PROBLEMS)
    ]
    more = f"; and {len(problems) - SHOWN_PROBLEMS:,} more" if len(problems) > SHOWN_PROBLEMS else ""
    return f"{len(problems):,} of {total:,} rows cannot be used; correct or delete them: {'; '.join(named)}{more}"


def check_row(row: Any, *, training: bool) -> CheckedRow:
    """Return the turns of one parsed row. Raises UserError with the reason why the row cannot be used."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {shown(row)}")
    conversation = recognise(row)
    turns = conversation_turns(conversation.messages, conversation.tools)
    _check_turns(turns, training)
    remarks = [f"{key} is not used" for key in conversation.unused]
    others = sorted({turn.role for turn in turns if turn.trained and turn.role != "assistant"})
    remarks += [f"turns of the {role} are trained, as their loss or weight asks" for role in others]
    return CheckedRow(turns, conversation.shape, remarks)


def _check_turns(turns: list[Turn], training: bool) -> None:
    """Check that the turns may follow each other like this, and that there is something to train."""
    previous: Turn | None = None
    for turn in turns:
        _check_order(previous, turn)
        _check_text(turn.metadata + turn.text)
        previous = turn
    if turns[-1].role == "user" and not turns[-1].trained:
        raise UserError("the last user turn has no answer")
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise UserError("no assistant turn")
    trained = [turn for turn in (turns if training else answers) if turn.trained]
    if not trained:
        raise UserError("every assistant turn has loss false or weight 0: nothing to train")
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
        raise UserError(f"the {turn.role} turn {shown(turn.text)} comes after {after}")


def _check_text(text: str) -> None:
    # JSON can spell half of a surrogate pair, which no encoding can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half a character, {text[error.start]!r}, in {shown(text)}") from error


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
