"""Conversations as ChatGLM3's token ids: the prompt layout, and which of the tokens are trained.

A conversation is ``[gMASK] sop``, then its turns. A turn is a role token (inserted by id, never parsed from text), a
line of metadata with its newline, and the text. Line and text are encoded separately, so that each gets the dummy
prefix that SentencePiece puts in front. An answer ends with the token after it: the next role token, or ``</s>``.
"""

import ast
import json
import keyword
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from helpers.activations.chunked_loss import IGNORE_INDEX
from helpers.errors import UserError

ROLES = ("system", "user", "assistant", "observation")
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"

Message = dict[str, Any]


class PieceEncoder(Protocol):
    """The part of a tokenizer that this module needs."""

    eos_token_id: int

    @property
    def prefix_tokens(self) -> list[int]: ...
    def role_token_id(self, role: str) -> int: ...
    def encode_text(self, text: str) -> list[int]: ...


class Turn(NamedTuple):
    """One turn as the model sees it.

    Attributes:
        role: One of ``ROLES``.
        metadata: Text on the role token's line: the name of the tool that is called, or empty.
        text: What is said.
        trained: Whether the model learns to say it.
    """

    role: str
    metadata: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        input_ids: The ids, [tokens].
        trained: Whether the model learns to predict ``input_ids[i]``, [tokens].
    """

    input_ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> list[int]:
        """``input_ids`` where trained, ``IGNORE_INDEX`` elsewhere; aligned with the input, so not yet shifted."""
        return [token if trained else IGNORE_INDEX for token, trained in zip(self.input_ids, self.trained, strict=True)]


def tool_call(parameters: dict[str, Any]) -> str:
    """Write a tool call as ChatGLM3 does: a Python block that calls ``tool_call`` with keyword arguments.

    Raises UserError for a name or a value that Python could not read back.
    """
    for name, value in parameters.items():
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"parameter name {name!r} is not a Python name; rename it here and in the tool description")
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError) as error:  # nan and inf, or brackets inside brackets without end
            raise UserError(f"the value of parameter {name!r} cannot be written in Python: {value!r}") from error
    arguments = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return f"```python\ntool_call({arguments})\n```"


def _described(tools: Sequence[Any]) -> str:
    return json.dumps(tools, indent=4, ensure_ascii=False)


def _text(message: Message, key: str) -> str:
    value = message.get(key)
    if not isinstance(value, str):
        raise UserError(f"a {message.get('role')!r} message needs a string {key!r}, not {value!r}")
    return value


def _line(text: str, description: str) -> str:
    if text.splitlines() not in ([], [text]):
        raise UserError(f"{description} {text!r} has a line break, but must be one line")
    return text


def _turns_of(message: Message) -> Iterator[Turn]:
    role = message.get("role")
    # None is the role's default: a table whose other rows have a "loss" column fills it in.
    loss = message.get("loss")
    trained = role in ("assistant", "tool") if loss is None else bool(loss)
    if role == "tool":
        parameters = message.get("parameters")
        if not isinstance(parameters, dict):
            raise UserError(f"a 'tool' message needs an object 'parameters', not {parameters!r}")
        observation = message.get("observation")
        if not isinstance(observation, str):
            observation = json.dumps(observation, ensure_ascii=False)
        name = _line(_text(message, "name"), "the name of the tool")
        if not name.strip():
            raise UserError("the name of the tool is empty")
        yield Turn("assistant", name, tool_call(parameters), trained)
        yield Turn("observation", "", observation, False)
    elif role in ROLES:
        text = _text(message, "content")
        if role == "system" and message.get("tools"):
            text = f"{text}\n{_described(message['tools'])}"
        yield Turn(role, _line(message.get("metadata") or "", "metadata"), text, trained)
    else:
        raise UserError(f"unknown role {role!r}; the roles are {', '.join((*ROLES, 'tool'))}")


def conversation_turns(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[Turn]:
    """Translate messages into the turns that the model sees.

    Args:
        messages: Each with a ``role`` and its ``content``. An assistant's ``metadata`` names the tool that it calls,
            ``loss`` says whether a turn is trained: by default the assistant's are. Role ``tool`` (``name``,
            ``parameters``, ``observation``) makes two turns: the assistant's call and the observation that answers
            it.
        tools: Descriptions (anything JSON can hold) for a system prompt in front, worded as published. A system
            message may also have them under ``tools``.

    Returns:
        The turns, in order.

    Raises:
        UserError: A role is unknown, a text is not a string, metadata has several lines, or a call is not Python.
    """
    turns = [turn for message in messages for turn in _turns_of(message)]
    if tools:
        turns.insert(0, Turn("system", "", f"{TOOLS_PROMPT}\n{_described(tools)}", False))
    return turns


def encode_turns(tokenizer: PieceEncoder, turns: Iterable[Turn], add_generation_prompt: bool = False) -> Encoded:
    """Encode turns as :func:`encode_conversation` does; for callers that have them already."""
    ids = list(tokenizer.prefix_tokens)
    trained = [False] * len(ids)
    previous_trained = False
    for turn in turns:
        # Line and text are encoded separately, so that each gets a dummy prefix of its own.
        header, text = tokenizer.encode_text(f"{turn.metadata}\n"), tokenizer.encode_text(turn.text)
        ids += [tokenizer.role_token_id(turn.role), *header, *text]
        # The role token of a turn is what ends the turn before it, so it is trained with that one.
        trained += [previous_trained] + [turn.trained] * (len(header) + len(text))
        previous_trained = turn.trained
    ids.append(tokenizer.role_token_id("assistant") if add_generation_prompt else tokenizer.eos_token_id)
    trained.append(previous_trained)
    return Encoded(ids, trained)


def encode_conversation(
    tokenizer: PieceEncoder,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> Encoded:
    """Encode a conversation, and mark the tokens that are trained.

    Without ``loss``, training covers the tokens after ``<|assistant|>``, up to and including the one that ends the
    turn.

    Args:
        tokenizer: ChatGLM3's.
        messages: The conversation, as :func:`conversation_turns` takes it.
        tools: Descriptions of tools for the system prompt, if any.
        add_generation_prompt: End with ``<|assistant|>``, ready for ``generate``, instead of ``</s>``.

    Returns:
        Token ids and marks.

    Raises:
        UserError: As :func:`conversation_turns` raises it, or for text that is not valid Unicode.
    """
    return encode_turns(tokenizer, conversation_turns(messages, tools), add_generation_prompt)


def parse_answer(text: str) -> tuple[str, str]:
    """Split a decoded answer into metadata (the name of the tool that is called, or empty) and content."""
    metadata, newline, content = text.partition("\n")
    return (metadata.strip(), content.strip()) if newline else ("", text.strip())


def display(
    messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
) -> str:
    """Write the conversation as text, role tokens spelled out. For people: encoded, it gives other ids."""
    shown = "".join(f"<|{t.role}|>{t.metadata}\n {t.text}" for t in conversation_turns(messages, tools))
    return f"[gMASK]sop{shown}{'<|assistant|>' if add_generation_prompt else '</s>'}"
