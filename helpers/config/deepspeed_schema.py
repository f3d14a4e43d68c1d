"""Check a DeepSpeed file with DeepSpeed's own models, before DeepSpeed is started with it."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from helpers.config.deepspeed import AUTO
from helpers.errors import UserError


def check_deepspeed_values(config: Mapping[str, Any], path: Path) -> None:
    """Check the blocks that DeepSpeed declares as models: ``zero_optimization``, ``fp16`` and ``bf16``.

    Args:
        config: Contents of the file; "auto" passes.
        path: The file, for messages.

    Raises:
        UserError: A key of a block is unknown, or a value is of another kind.
    """
    # Here, because importing DeepSpeed takes seconds and looks for a GPU.
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for name, model in models.items():
        block = _without_auto(config.get(name, {}))
        _check_quoted(block, model, f"{path}: {name}")
        try:
            model(**block)
        except (ValidationError, AssertionError, ValueError) as error:
            raise UserError(f"{path}: {name}{_describe(error)}") from error


def _without_auto(block: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if value != AUTO
    }


def _check_quoted(block: Mapping[str, Any], model: type[BaseModel], where: str) -> None:
    """Refuse text for a number or a switch: DeepSpeed would convert some, the Trainer and the predictor would not."""
    fields = {name: field for key, field in model.model_fields.items() for name in (key, field.alias)}
    for key, value in block.items():
        if key not in fields:
            continue
        annotation = fields[key].annotation
        kinds = {kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)}
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if nested and isinstance(value, Mapping):
            _check_quoted(value, nested[0], f"{where}.{key}")
        if isinstance(value, str) and kinds <= {int, float, bool}:
            wanted = "true or false" if kinds == {bool} else "a number"
            raise UserError(f"{where}.{key} must be {wanted}, not {value!r}; remove the quotes")
        if isinstance(value, bool) and (kinds <= {int, float} or any(_whole(kind) for kind in kinds)):
            raise UserError(f"{where}.{key} must be a number, not {str(value).lower()}")


def _whole(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum) and issubclass(kind, int)


def _describe(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f": {' '.join(str(error).split())}"
    first = error.errors()[0]
    place = "".join(f".{part}" for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place} is not a key of DeepSpeed; correct or remove it"
    return f"{place} is {first['input']!r}: {first['msg']}"
