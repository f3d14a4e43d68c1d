"""Recognise how a row is written, and translate it into the messages that ``helpers.chatglm3.chat`` takes.

A row is either a pair of a question and an answer (``PAIRS`` has their keys: AdvertiseGen, Alpaca, prompt and response
…) or a list of messages: ChatGLM3's and ShareGPT's ``conversations``, or OpenAI's ``messages``. Each may have a system
prompt and tools. A key that is null counts as absent: a table has all keys in all rows.
"""

from typing import Any, NamedTuple

from helpers.chatglm3.chat import Message
from helpers.errors import UserError
from helpers.finetune.messages import loss_option, normalised_messages, parsed, shown, without_nulls

LISTS = ("conversations", "messages")
PAIRS = (
    ("content", "summary"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)
# The input of an instruction: a second part of the question.
INPUTS = ("input", "context")
SYSTEM = ("system", "system_prompt")
SAID = ("loss", "weight")  # whether the answer is trained
MESSAGE_KEYS = ("metadata", "tool_call_id")
KNOWN_KEYS = frozenset([*LISTS, *INPUTS, *SYSTEM, "history", "tools", *(key for pair in PAIRS for key in pair)])
NEEDED = "a row needs content and summary, instruction and output, prompt and response, conversations, or messages"

# Keys that do not belong to what is said; nobody expects them to be trained.
BOOKKEEPING = frozenset(
    "id idx index uuid guid uid hash source src dataset dataset_name origin url link license split lang language "
    "category type task task_type topic domain tag tags model model_name date time timestamp created created_at "
    "updated_at meta metadata extra score num_turns conversation_id conv_id session_id user_id author filename".split()
)
# Rows that this job would train wrongly: what is said is not all that counts.
_PREFERENCE = "is for preference training; keep the good answers as prompt and response, without this key"
_MEDIA = "is not text, and the model reads only text; delete the row or this key"
REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
}


class Conversation(NamedTuple):
    """A row in one form.

    Attributes:
        messages: As ``conversation_turns`` takes them.
        tools: Descriptions of tools for the system prompt, if any.
        shape: How the row was written: "content/summary", "messages" …
        unused: Keys that may matter and that are not used; "message: key" for those of a message.
    """

    messages: list[Message]
    tools: list[Any] | None
    shape: str
    unused: tuple[str, ...]


def recognise(row: dict[str, Any]) -> Conversation:
    """Translate a row.

    Args:
        row: The parsed row.

    Returns:
        The conversation.

    Raises:
        UserError: The row has none of the known shapes, or two of them, or a value of the wrong kind.
    """
    present = {key: value for key, value in row.items() if not _is_absent(value)}
    for key, why in REFUSED.items():
        if key in present:
            raise UserError(f"{key} {why}")
    shape = _shape(row, present)
    unused: set[str] = set()
    if len(shape) == 1:
        used = {*shape}
        messages, sharegpt = normalised_messages(row[shape[0]], shape[0], unused)
        name = f"{shape[0]} (ShareGPT)" if sharegpt else shape[0]
        if "history" in present:
            raise UserError(f"both history and {shape[0]}; put the history into {shape[0]}")
    else:
        used = {*shape, *SAID, "history", *(key for key in INPUTS if shape[0] == "instruction")}
        messages = [*_history(present.get("history"), unused), *_question_and_answer(row, present, shape, unused)]
        name = "/".join(shape) + (" (Alpaca)" if shape == ("instruction", "output") else "")
    messages = [*_system(present, messages), *messages]
    used |= {*SYSTEM, "tools"}
    unused |= {key for key in present if key not in used and not _is_bookkeeping(key)}
    # Keys of messages next to a pair: their author may expect them to count.
    unused |= {key for key in MESSAGE_KEYS if len(shape) > 1 and isinstance(present.get(key), str)}
    return Conversation(messages, _tools(present.get("tools")), name, tuple(sorted(unused)))


def _is_absent(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _is_bookkeeping(key: str) -> bool:
    # Tables saved with pandas have a column for their index, which has no name, or one with underscores.
    return key.lower() in BOOKKEEPING or key.lower().endswith("_id") or not key or key.startswith(("Unnamed:", "__"))


def _shape(row: dict[str, Any], present: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys that hold the conversation: one that holds a list, or a pair."""
    known = [*((key,) for key in LISTS), *PAIRS]
    # An empty answer is a fault of its own, which is named later; a null one is not.
    found = [keys for keys in known if all(row.get(key) is not None for key in keys)]
    filled = [keys for keys in found if any(key in present for key in keys)] or found[:1]
    if ("input", "output") in filled and len(filled) > 1 and "instruction" in row:
        filled.remove(("input", "output"))
    if not filled:
        raise UserError(_no_shape(row))
    if len(filled) > 1:
        first, second = ("/".join(keys) for keys in filled[:2])
        raise UserError(f"both {first} and {second} in one row; keep the one that is to be trained")
    return filled[0]


def _no_shape(row: dict[str, Any]) -> str:
    wrapped = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(row) <= 3 and wrapped:
        return f"the rows are inside its key {wrapped[0]!r}; write that list alone into the file"
    keys = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items())
    text = "; text alone has no answer to train" if "text" in row else ""
    return f"no question with an answer in it (it has {keys[:70] or 'no key'}){text}; {NEEDED}"


def _question_and_answer(
    row: dict[str, Any], present: dict[str, Any], shape: tuple[str, ...], unused: set[str]
) -> list[Message]:
    question, answer = (row[key] for key in shape)
    if isinstance(question, list) and isinstance(answer, list):
        unused |= {key for key in SAID if key in present}
        # TRL's conversational form: what comes before the completion is not trained.
        before, _ = normalised_messages(question, shape[0], unused)
        after, _ = normalised_messages(answer, shape[1], unused)
        return [*({"loss": False, **message} for message in before), *after]
    texts = {shape[0]: question, shape[1]: answer}
    texts |= {key: present[key] for key in INPUTS if shape[0] == "instruction" and key in present}
    for key, value in texts.items():
        if not isinstance(value, str):
            column = "; is it a whole column? pandas writes rows with to_json(path, orient='records', lines=True)"
            hint = column if isinstance(value, dict | list) else ""
            raise UserError(f"{key} must be a text, not {shown(value)}{hint}")
    answered = texts.pop(shape[1])
    asked = "\n".join(text for text in texts.values() if text.strip())
    # Beside a pair they speak of the answer, the only part that is trained.
    said = {key: parsed(present[key]) for key in SAID if key in present}
    switches = {key: value for key, value in said.items() if value in ((True, False) if key == "loss" else (0, 1))}
    unused |= said.keys() - switches.keys()  # a number of another meaning, as a row's weight in sampling
    trained = loss_option(switches, "of the row")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered} | trained]


def _history(value: Any, unused: set[str]) -> list[Message]:
    """Translate earlier turns: pairs of a question and an answer, or messages."""
    if value is None:
        return []
    turns = parsed(value)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return normalised_messages(turns, "history", unused)[0]
    messages = []
    for pair in turns if isinstance(turns, list) else [turns]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"history must be a list of [question, answer] pairs, not {shown(value)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _system(present: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Return the message for the row's system prompt, unless the messages begin with the same one."""
    given = {key: present[key] for key in SYSTEM if key in present}
    if not given:
        return []
    if len(given) > 1:
        raise UserError("both system and system_prompt in one row; keep one")
    ((key, text),) = given.items()
    if not isinstance(text, str):
        raise UserError(f"{key} must be a text, not {shown(text)}")
    first = messages[0]
    if first["role"] == "system":
        if first.get("content") == text:
            return []
        raise UserError(f"both {key} and a system message in one row; keep one")
    return [{"role": "system", "content": text}]


def _tools(value: Any) -> list[Any] | None:
    if value is None:
        return None
    tools = parsed(value)
    if not isinstance(tools, list):
        raise UserError(f"tools must be a list, not {shown(value)}")
    return without_nulls(tools) or None
