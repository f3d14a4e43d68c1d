"""Read a YAML file of keys and values that somebody wrote by hand."""

import math
from pathlib import Path
from typing import Any

import yaml

from helpers.errors import UserError
from helpers.files import read_utf8

MOST_VALUES = 10_000  # of a file with its aliases written out: nine levels of nine aliases are 387 million
FULL_WIDTH_COLON = "\uff1a"  # of Chinese and Japanese keyboards
MERGE = "tag:yaml.org,2002:merge"  # the key <<, whose values a block may replace by its own


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, but a key that occurs twice in a block is an error, not the last of the two values."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a block, before what it merges is written out.

        Args:
            anchor: The block's name for aliases.

        Returns:
            The block.

        Raises:
            UserError: A key occurs twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise UserError(
                    f"{self.name}:{line}: the key {key.value!r} occurs twice in its block, first in line "
                    f"{lines[name]}; remove one"
                )
            lines[name] = line
        return node


def _problem(error: Exception) -> str:
    """Say what is wrong and where, without the line itself: it may hold a token."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    context = f"{error.context}, " if error.context else ""
    return f"{context}{error.problem}, line {mark.line + 1}, column {mark.column + 1}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys and values.

    Args:
        path: The file.

    Returns:
        The keys and values.

    Raises:
        FileNotFoundError: The file does not exist.
        UserError: It cannot be read, is not YAML, has a key twice, refers to itself, or holds something else.
    """
    try:
        text = read_utf8(path)
        loader = _UniqueKeys(text)
        loader.name = str(path)  # in the messages
        raw = loader.get_single_data()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); configs/lora.yaml is a configuration file"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        lines = [number for number, line in enumerate(text.splitlines(), start=1) if FULL_WIDTH_COLON in line]
        colon = f"; line {lines[0]} has a full-width colon, write : instead" if lines else ""
        raise UserError(f"{path} is not YAML: {_problem(error)}{colon}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error
    if not isinstance(raw, dict):
        held = "it is empty" if raw is None else f"not a {type(raw).__name__}"
        raise UserError(f"{path} must hold keys and values, {held}; configs/lora.yaml is a configuration file")
    if _written_out(raw, {}) > MOST_VALUES:
        raise UserError(
            f"{path} refers to itself, or to so much that it has over {MOST_VALUES:,} values; write them out"
        )
    return raw


def _written_out(value: Any, sizes: dict[int, float]) -> float:
    """Count the values of a YAML document with each alias (``*name``) written out; infinity if one is inside itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf  # until all of it is counted
        inside = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_written_out(item, sizes) for item in inside)
    return sizes[id(value)]
