"""Write files and folders atomically, check where they will go, and read users' JSON."""

import codecs
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from helpers.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; if the block succeeds, rename it to ``path`` in one step.

    If the block fails (a full disk, an interrupt), the temporary file is removed and ``path`` stays as it was: a reader
    finds the old file or the new one, never half of it. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fresh_folder(parent: Path, name: str) -> Path:
    """Find a folder name that is not taken, so that a second run does not touch the first one's files.

    Args:
        parent: The folder it goes into.
        name: The name to try first.

    Returns:
        ``parent/name``, or the first of ``parent/name-2``, ``parent/name-3`` … that does not exist. Creates nothing.
    """
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(parent / candidate for candidate in names if not (parent / candidate).exists())


def check_new_folder(path: str | Path) -> None:
    """Raise UserError unless ``path`` does not exist or is an empty folder."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} {'is not empty' if path.is_dir() else 'is a file'}; name a new folder")


def check_writable_folder(path: str | Path, remedy: str) -> None:
    """Make a folder that does not exist, write into it, and remove again what was made.

    Args:
        path: The folder.
        remedy: Advice if that is not possible; it ends the error message.

    Raises:
        UserError: It cannot be made or written to.
    """
    path = Path(path)
    made = []
    try:
        for folder in (*reversed(path.parents), path):
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(f"{path} cannot be made: {folder} is not a folder; {remedy}")
            if not folder.is_dir():
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} cannot be made or written to ({reason}); {remedy}") from error
    finally:
        for folder in reversed(made):
            folder.rmdir()


def check_disk_space(path: str | Path, needed_bytes: int) -> None:
    """Raise UserError unless the disk that will hold the new ``path`` has ``needed_bytes`` left."""
    existing = next(folder for folder in Path(path).resolve().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{path} needs {needed_bytes / 2**30:.2f} GiB, and {existing} has {free / 2**30:.2f} GiB left; "
            "choose another disk"
        )


def drop_half_line(path: Path) -> None:
    """Cut off what follows the last line's end: a process that was killed, or a full disk, left it half written."""
    if path.is_file():
        raw = path.read_bytes()
        if not raw.endswith(b"\n"):
            os.truncate(path, raw.rfind(b"\n") + 1)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``; if the block succeeds, rename it to ``path`` in one step.

    If the block fails, the temporary folder is removed and ``path`` does not exist. Missing parent folders are created.

    Raises:
        UserError: ``path`` is a file or a folder that is not empty, or the disk is full.
    """
    path = Path(path)
    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():  # safetensors ignores the umask: its files are readable by their owner only
                file.chmod(temporary.stat().st_mode & 0o666)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}; choose another disk or folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json_object(path: Path, missing: str, remedy: str = "correct the file") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        missing: The whole error message if the file does not exist.
        remedy: Advice for a damaged file; it ends the error message.

    Returns:
        The object.

    Raises:
        UserError: The file does not exist, is not JSON, or holds something other than an object.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(missing) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    text = decode_utf8(path, raw)
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({_json_fault(text, error)}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object but a {type(content).__name__}; {remedy}")
    return content


# What people write in JSON as in other languages, with what JSON wants.
_NOT_JSON = (
    (r"/\*.*?\*/|//.*|/\*.*|#.*", "has a comment, {found!r}, and JSON has none; remove it"),
    (r"(?:True|False|None)\b", "has {found}, as in Python; write true, false or null"),
    (r"'", "has a single quote; JSON wants double ones"),
)


def _json_fault(text: str, error: json.JSONDecodeError) -> str:
    """Say what is wrong with a text that should be JSON, in the words of what was probably meant."""
    rest = text[error.pos :].lstrip()
    for pattern, fault in _NOT_JSON:
        if found := re.match(pattern, rest):
            number = text.count("\n", 0, len(text) - len(rest)) + 1
            return f"line {number} {fault.format(found=found[0].strip()[:40])}"
    if "trailing comma" in error.msg or (rest[:1] in ("}", "]") and text[: error.pos].rstrip().endswith(",")):
        return f"line {error.lineno} has a comma too many before it; remove the comma"
    if not text.strip():
        return "it is empty"
    return f"{error.msg} at line {error.lineno}, column {error.colno}"


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; ``object_pairs_hook`` of :func:`json.loads`, which keeps the last of two.

    Args:
        pairs: Keys and values.

    Returns:
        The object.

    Raises:
        ValueError: A key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def read_utf8(path: Path) -> str:
    """Read a text file in UTF-8, whatever the locale. Raises UserError if it is in another encoding."""
    return decode_utf8(path, path.read_bytes())


def decode_utf8(path: Path, raw: bytes) -> str:
    """Decode the text of a file, with or without a byte order mark.

    Args:
        path: The file, for messages.
        raw: What it holds.

    Returns:
        The text.

    Raises:
        UserError: It is not UTF-8, or only git-lfs's pointer to the file.
    """
    check_not_lfs_pointer(path, raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        try:
            raw.decode("gb18030")
            encoding = "GB18030"
        except UnicodeDecodeError:
            encoding = "UTF-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "ITS_ENCODING"
        raise UserError(
            f"{path} is not UTF-8 (line {line}); convert it with iconv -f {encoding} -t UTF-8 {path.name}"
        ) from error


def check_not_lfs_pointer(path: Path, raw: bytes | None = None) -> None:
    """Raise UserError if a file is only a pointer, which git leaves if git-lfs is not installed.

    Args:
        path: The file.
        raw: What it holds, if it is known; otherwise its beginning is read.
    """
    if raw is None:
        with path.open("rb") as file:
            raw = file.read(len(LFS_POINTER))
    if raw.startswith(LFS_POINTER):
        raise UserError(f"{path} is a pointer of git-lfs, not the file itself; run git lfs pull, or download it again")
