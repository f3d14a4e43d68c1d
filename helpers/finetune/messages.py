"""Translate the messages of other formats into ChatGLM3's: ShareGPT's ``from`` and ``value``, OpenAI's tool calls.

A message that calls a tool becomes an assistant turn with the tool's name as metadata; what the tool returned becomes
an observation. On any message, ``loss`` or OpenAI's ``weight`` says whether it is trained.
"""

import json
from typing import Any

from helpers.chatglm3.chat import Message, tool_call
from helpers.errors import UserError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "observation",
    "function_call": "call",
    "function_response": "observation",
}
# Keys of a message besides its role, by the role's name here.
_COMMON = {"role", "from", "content", "value", "loss", "weight"}
_USED = {
    "system": {"tools", "metadata"},
    "user": {"metadata"},
    "assistant": {"metadata", "tool_calls", "function_call"},
    "observation": {"metadata", "name", "tool_call_id"},
    "call": {"name"},
    "tool": {"name", "parameters", "observation", "tool_call_id"},
}
_BOOKKEEPING = {"id", "index", "timestamp", "created", "created_at", "date", "model", "lang", "language", "source"}


def shown(value: Any) -> str:
    """Return ``value`` for a message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def parsed(value: Any) -> Any:
    """Return ``value``, or what it holds if it is a string of JSON: a table has no other way to hold a list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def without_nulls(value: Any) -> Any:
    """Return ``value`` without keys that are null, which a table adds to the objects that lack them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def normalised_messages(value: Any, key: str, unused: set[str]) -> tuple[list[Message], bool]:
    """Translate a list of messages.

    Args:
        value: The list, or JSON of it.
        key: The row's key that holds it, for messages of errors.
        unused: Collects "message: key" for each unused key that its author may expect to count.

    Returns:
        The messages, and whether they were written as in ShareGPT.

    Raises:
        UserError: It is no list of messages, or one of them cannot be translated.
    """
    messages = parsed(value)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{key} must be a list of messages, not {shown(value)}")
    translated: list[Message] = []
    sharegpt = False
    for number, message in enumerate(messages, start=1):
        role = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise UserError(f"message {number} must be an object with a role, not {shown(message)}")
        sharegpt |= message.get("role") is None
        # An empty list is what a table, or an API, has for "none".
        given = {key: inner for key, inner in message.items() if inner is not None and inner != []}
        translated += _translated(given, ROLES.get(role, role), number, unused)
    return translated, sharegpt


def _translated(message: dict[str, Any], role: str, number: int, unused: set[str]) -> list[Message]:
    is_pair = "observation" in message or "parameters" in message
    role = "observation" if role == "tool" and not is_pair else role
    ignored = message.keys() - _COMMON - _USED.get(role, set()) - _BOOKKEEPING
    unused |= {f"message: {key}" for key in ignored}
    if not isinstance(message.get("metadata", ""), str):
        raise UserError(f"metadata of message {number} must be a string, not {shown(message['metadata'])}")
    common = {"role": role} | loss_option(message, f"of message {number}")
    if role == "tool":
        if "observation" not in message:
            raise UserError(f"message {number} of role tool has no observation")
        parameters = without_nulls(parsed(message.get("parameters")))
        return [{**common, **{k: message.get(k) for k in ("name", "observation")}, "parameters": parameters}]
    content = _content(message, number)
    if role == "call":
        return [_call(parsed(content), common, number)]
    common |= {"content": content}
    common |= {key: without_nulls(message[key]) for key in ("metadata", "tools") if key in message}
    if role != "assistant":
        return [common]
    call = _called(message, number)
    if call is None:
        return [common]
    # As ChatGLM3 was trained: the thought and the call are two turns.
    thought = [common] if isinstance(content, str) and content.strip() else []
    return [*thought, _call(call, {key: value for key, value in common.items() if key != "content"}, number)]


def loss_option(message: dict[str, Any], where: str) -> dict[str, bool]:
    """Translate ``loss`` and OpenAI's ``weight``.

    Args:
        message: May have either of them.
        where: Its place, for messages of errors: "of message 2".

    Returns:
        ``{"loss": …}`` if the message says whether it is trained, otherwise nothing.

    Raises:
        UserError: A value is of another kind, or the two disagree.
    """
    loss, weight = message.get("loss"), message.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise UserError(f"loss {where} must be true or false, not {shown(loss)}")
    if weight is not None and weight not in (0, 1):
        raise UserError(f"weight {where} must be 0 or 1, not {shown(weight)}")
    if loss is not None and weight is not None and loss != bool(weight):
        raise UserError(f"loss {str(loss).lower()} and weight {weight} {where} disagree; keep one of them")
    if loss is None and weight is None:
        return {}
    return {"loss": loss if loss is not None else bool(weight)}


def _content(message: dict[str, Any], number: int) -> Any:
    """Return the text of a message; OpenAI's list of parts is joined."""
    content = message.get("content", message.get("value"))
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"message {number} has a part of type {kind}; the model reads only text")
        texts.append(part["text"])
    return "\n".join(texts)


def _called(message: dict[str, Any], number: int) -> Any:
    """Return the tool call of an OpenAI message, {"name", "arguments"}; None without one."""
    calls = parsed(message.get("tool_calls"))
    if calls is None:
        return message.get("function_call")
    if not isinstance(calls, list):
        raise UserError(f"tool_calls of message {number} must be a list, not {shown(calls)}")
    if len(calls) > 1:
        raise UserError(
            f"message {number} calls {len(calls)} tools at once; ChatGLM3 calls one at a time: "
            "write each call and its result one after the other"
        )
    (call,) = calls
    return call.get("function", call) if isinstance(call, dict) else call


def _call(call: Any, message: dict[str, Any], number: int) -> Message:
    """Return the assistant message that calls a tool."""
    name, arguments = (call.get("name"), parsed(call.get("arguments"))) if isinstance(call, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"message {number} must call a tool with its name and arguments, not {shown(call)}")
    return {**message, "role": "assistant", "metadata": name, "content": tool_call(without_nulls(arguments))}
