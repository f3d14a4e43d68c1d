"""Files that are either the old one or the new one, never half of it; and JSON files that users give."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from helpers.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well it takes ``path``'s place in one step.

    When the block fails (a full disk, an interrupt), the temporary file is removed and ``path`` is what it was.
    Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: str | Path) -> None:
    """Raise UserError unless ``path`` is free: nothing, or an empty folder."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} {'is not empty' if path.is_dir() else 'is a file'}; name a new folder")


def check_disk_space(path: str | Path, needed_bytes: int) -> None:
    """Raise UserError unless the disk on which the new ``path`` will lie has so many bytes left."""
    place = next(folder for folder in Path(path).resolve().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"{path} needs {needed_bytes / 2**30:.2f} GiB, and {place} has {free / 2**30:.2f} GiB left; "
            "choose another disk"
        )


@contextmanager
def creating_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; when the block ends well it becomes ``path`` in one step.

    When the block fails, the temporary folder is removed and there is no ``path``. Missing parent folders are created.
    Raises UserError if ``path`` is a file or a folder that is not empty, or if the disk is full.
    """
    path = Path(path)
    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():  # safetensors makes files that nobody else may read, whatever the umask says
                file.chmod(temporary.stat().st_mode & 0o666)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}; choose another disk or folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json_object(path: Path, missing: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError: the line ``missing`` where there is no file, else what is wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw
