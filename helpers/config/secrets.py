"""Keep tokens, keys and passwords out of what the job writes and prints."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|passphrase|pwd|credentials?|(?:api|access|account|private|secret)_?key)$"
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")  # https://user:password@host
HIDDEN = "***"


def is_secret(key: object) -> bool:
    """Tell from a key's name whether its value is a secret: ``hub_token``, ``api_key``, ``Password``."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[-. ]", "_", str(key))
    return _SECRET.search(words.lower()) is not None


def without_secrets(value: Any, key: object = "") -> Any:
    """Copy a value with ``***`` in place of each secret, also inside of blocks, lists and addresses.

    Args:
        value: Anything that JSON or YAML can hold.
        key: Its name.

    Returns:
        The copy.
    """
    if is_secret(key) and value and value is not True:
        return HIDDEN
    if isinstance(value, Mapping):
        return {name: without_secrets(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return _IN_URL.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def find_secret(block: Any, place: str = "") -> str | None:
    """Return where a block holds a secret (``comet.api_key``); None if it holds none."""
    if isinstance(block, Mapping):
        entries = [(f"{place}.{key}" if place else str(key), key, value) for key, value in block.items()]
    else:
        entries = [(place, "", value) for value in block] if isinstance(block, list) else []
    for where, key, value in entries:
        if isinstance(value, Mapping | list) and not is_secret(key):
            if found := find_secret(value, where):
                return found
        elif repr(without_secrets(value, key)) != repr(value):  # as text: nan is not equal to itself
            return where
    return None
