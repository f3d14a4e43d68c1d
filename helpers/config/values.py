"""Check the kind of a value against a library's own annotation, before the library is asked to use it.

The Trainer and PEFT declare their options as dataclasses, but compare no value with its annotation: a quoted number
goes wrong somewhere inside, minutes later. Here pydantic compares, strictly: no value is converted.
"""

import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from helpers.config.secrets import without_secrets
from helpers.errors import UserError

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a block of keys"}


@dataclass(frozen=True)
class Limits:
    """Bounds of a number. The annotation has only its type.

    Attributes:
        at_least: The smallest value.
        above: All values are greater.
        below: All values are smaller.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None

    def violated(self, value: float) -> str | None:
        """Describe the bound that ``value`` violates; None if it violates none."""
        if isinstance(value, float) and not math.isfinite(value):  # a whole number may be too large for this question
            return "finite"
        if self.at_least is not None and value < self.at_least:
            return f"at least {_shown(self.at_least)}"
        if self.above is not None and value <= self.above:
            return f"above {_shown(self.above)}"
        if self.below is not None and value >= self.below:
            return f"below {_shown(self.below)}"
        return None


def _shown(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


@cache
def annotations(options: type) -> dict[str, Any]:
    """Return the annotation of each option that a dataclass takes."""
    hints = get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options) if field.init}


def wants_number(annotation: Any) -> bool:
    """Tell whether an option takes a number with decimals, and no text."""
    return float in _alternatives(annotation) and str not in _alternatives(annotation)


def check_values(block: Mapping[str, Any], options: type, limits: Mapping[str, Limits], where: str) -> None:
    """Check the kind of each value, and the numbers' limits.

    Args:
        block: Options and their values; every option is one of ``options``.
        options: The dataclass that will take them.
        limits: Bounds of some of its numbers.
        where: The block's place, for messages.

    Raises:
        UserError: A value is of another kind than its annotation says, or out of its limits.
    """
    hints = annotations(options)
    defaults = {field.name: field.default for field in fields(options) if field.default is not MISSING}
    for key, value in block.items():
        if not _fits(value, hints[key]):
            default = f"; leave the line out for {defaults[key]}" if value is None and key in defaults else ""
            shown = without_secrets(value, key)
            unquoted = _unquoted(value) if shown == value else ""
            raise UserError(f"{where}: {key} must be {describe(hints[key])}, not {shown!r}{default or unquoted}")
        if isinstance(value, int | float) and not isinstance(value, bool) and key in limits:
            bound = limits[key].violated(value)
            if bound:
                raise UserError(f"{where}: {key} must be {bound}, not {value!r}")


def describe(annotation: Any) -> str:
    """Say what kind of value an annotation wants, in the words of a configuration file."""
    alternatives = _alternatives(annotation)
    named = [kind for kind in alternatives if kind not in (type(None), str) or not _enumerations(annotation)]
    named.sort(key=lambda kind: get_origin(kind) is not list)  # typing's cache may return a union in another order
    return " or ".join(dict.fromkeys(_describe_one(kind) for kind in named if kind is not type(None)))


def _describe_one(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        element = get_args(kind)[0] if get_args(kind) else Any
        return {str: "a list of texts", int: "a list of whole numbers"}.get(element, "a list")
    return _WANTED.get(get_origin(kind) or kind, "a block of keys")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _enumerations(annotation: Any) -> list[type[Enum]]:
    return [kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, Enum)]


def _fits(value: Any, annotation: Any) -> bool:
    enumerations = _enumerations(annotation)
    if enumerations and value is not None:  # annotated as text as well, of which only the members' values will do
        return isinstance(value, str) and any(value in {member.value for member in kind} for kind in enumerations)
    name = repr(annotation)  # not all annotations can be hashed
    if name not in _adapters:
        _adapters[name] = TypeAdapter(annotation)
    try:
        # As JSON: strict there, too, but a list may become a tuple, and keys an object.
        _adapters[name].validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):  # TypeError: YAML knows dates
        return False
    return True


_adapters: dict[str, TypeAdapter[Any]] = {}


def _unquoted(value: Any) -> str:
    """Return the end of a message about text that looks like a number or a switch: how to write it."""
    if isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str) and re.fullmatch(r"true|false", value, re.IGNORECASE):
        return f"; write {value.lower()} without quotes"
    if not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    return f"; write {int(number) if number.is_integer() else number} without quotes"


def suggest(key: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown key: the most similar known one, or all known ones."""
    close = difflib.get_close_matches(str(key), list(known), n=1)  # YAML's keys need not be text
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))[:200]}"


def check_keys(found: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Raise UserError for a key that is not ``known``."""
    for key in found:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{suggest(key, known)}")
