"""How a conversation becomes ChatGLM3's token ids: the prompt layout, and which of its tokens are trained.

A conversation is ``[gMASK] sop``, then its turns. A turn is the role token (inserted by id, never parsed from text),
then the line of metadata with its newline, then the text; both are encoded separately, so that each gets its own
dummy prefix. The token after an assistant's turn (the next role token, or ``</s>``) is what ends the answer.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from helpers.errors import UserError

ROLES = ("system", "user", "assistant", "observation")
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"

Message = dict[str, Any]


class PieceEncoder(Protocol):
    """What this module needs of a tokenizer."""

    eos_token_id: int
    prefix_tokens: list[int]

    def role_token_id(self, role: str) -> int: ...
    def encode_text(self, text: str) -> list[int]: ...


class Turn(NamedTuple):
    """One turn as the model sees it. ``trained``: whether the model learns to say it."""

    role: str
    metadata: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids; ``trained[i]`` says whether predicting ``input_ids[i]`` is trained. Same length."""

    input_ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> list[int]:
        """``input_ids`` where trained, -100 elsewhere (the model shifts them itself)."""
        return [token if trained else -100 for token, trained in zip(self.input_ids, self.trained, strict=True)]


def tool_call(parameters: dict[str, Any]) -> str:
    """A tool call as ChatGLM3 writes it: a Python block that calls ``tool_call`` with keyword arguments."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return f"```python\ntool_call({arguments})\n```"


def _described(tools: Sequence[Any]) -> str:
    return json.dumps(tools, indent=4, ensure_ascii=False)


def _text(message: Message, key: str) -> str:
    value = message.get(key)
    if not isinstance(value, str):
        raise UserError(f"a {message.get('role')!r} message needs a string {key!r}, not {value!r}")
    return value


def _turns_of(message: Message) -> Iterator[Turn]:
    role = message.get("role")
    loss = message.get("loss")  # None too means trained: it is what a table has where only other rows say "loss"
    trained = loss is None or bool(loss)
    if role == "tool":
        parameters = message.get("parameters")
        if not isinstance(parameters, dict):
            raise UserError(f"a 'tool' message needs an object 'parameters', not {parameters!r}")
        observation = message.get("observation")
        if not isinstance(observation, str):
            observation = json.dumps(observation, ensure_ascii=False)
        yield Turn("assistant", _text(message, "name"), tool_call(parameters), trained)
        yield Turn("observation", "", observation, False)
    elif role in ROLES:
        text = _text(message, "content")
        if role == "system" and message.get("tools"):
            text = f"{text}\n{_described(message['tools'])}"
        yield Turn(role, message.get("metadata") or "", text, trained and role == "assistant")
    else:
        raise UserError(f"unknown role {role!r}; the roles are {', '.join((*ROLES, 'tool'))}")


def conversation_turns(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[Turn]:
    """The turns of a conversation.

    ``messages`` hold ``role`` and ``content``; an assistant's ``metadata`` names the tool that it calls;
    ``loss: false`` keeps an assistant's turn out of training. A message of role ``tool`` (``name``, ``parameters``,
    ``observation``) stands for the assistant's call and the observation that answers it. ``tools`` (JSON-like
    descriptions) are put in front as the published system prompt; a system message may carry them under ``tools``.

    Raises UserError for an unknown role or a text that is not a string.
    """
    turns = [turn for message in messages for turn in _turns_of(message)]
    if tools:
        turns.insert(0, Turn("system", "", f"{TOOLS_PROMPT}\n{_described(tools)}", False))
    return turns


def encode_turn(tokenizer: PieceEncoder, role: str, metadata: str, text: str) -> list[int]:
    """Ids of one turn, its role token first."""
    header = tokenizer.encode_text(f"{metadata}\n")
    return [tokenizer.role_token_id(role), *header, *tokenizer.encode_text(text)]


def encode_conversation(
    tokenizer: PieceEncoder,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> Encoded:
    """Ids of a whole conversation, and which of them are trained.

    With ``add_generation_prompt`` it ends with ``<|assistant|>``, ready for ``generate``; else with ``</s>``.
    The trained tokens are those after ``<|assistant|>`` up to and including the token that ends the turn.
    """
    ids = list(tokenizer.prefix_tokens)
    trained = [False] * len(ids)
    previous_trained = False
    for turn in conversation_turns(messages, tools):
        turn_ids = encode_turn(tokenizer, turn.role, turn.metadata, turn.text)
        ids += turn_ids
        # The role token of this turn is what ends the one before it.
        trained += [previous_trained] + [turn.trained] * (len(turn_ids) - 1)
        previous_trained = turn.trained
    ids.append(tokenizer.role_token_id("assistant") if add_generation_prompt else tokenizer.eos_token_id)
    trained.append(previous_trained)
    return Encoded(ids, trained)


def parse_answer(text: str) -> tuple[str, str]:
    """Split a decoded answer into ``(metadata, content)``; metadata names the tool that is called, or is empty."""
    metadata, newline, content = text.partition("\n")
    return (metadata.strip(), content.strip()) if newline else ("", text.strip())


def display(
    messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
) -> str:
    """The conversation as readable text, role tokens spelled out. For people: its ids are not those of the model."""
    shown = "".join(f"<|{t.role}|>{t.metadata}\n {t.text}" for t in conversation_turns(messages, tools))
    return f"[gMASK]sop{shown}{'<|assistant|>' if add_generation_prompt else '</s>'}"
