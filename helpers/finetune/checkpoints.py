"""Prove that a checkpoint is complete, and find the newest one that a run can continue from.

A checkpoint consists of the files of all ranks. When all of them are written, rank 0 adds the manifest: the size and
the hash of every file, and what decided the training. A checkpoint without it was not finished; one whose files differ
from it is damaged.
"""

import hashlib
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.files import atomic_write, read_json_object

MANIFEST = "manifest.json"
# Files from which an adapter or a full model is loaded.
MODEL_FILES = ("adapter_config.json", "config.json", "*.safetensors", "*.safetensors.index.json")
_RANK = re.compile(r"(?:rng_state|zero_pp_rank)_(\d+)[._]")

Files = dict[str, tuple[int, str]]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(checkpoint: Path, rank: int) -> Files:
    """Describe the files that one rank wrote.

    Every rank reads its own: on a network's file system, another host may not see them yet.

    Args:
        checkpoint: The checkpoint's folder.
        rank: Whose files. Rank 0 also owns those that have no rank in their name.

    Returns:
        Size in bytes and hash of each file, by its path inside ``checkpoint``.
    """
    # The README is left out: people edit it, and no program reads it.
    mine = (path for path in checkpoint.rglob("*") if _owner(path.name) == rank and path.name != "README.md")
    paths = sorted(path for path in mine if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): (path.stat().st_size, file_hash(path)) for path in paths}


def _owner(name: str) -> int:
    match = _RANK.search(name)
    return int(match[1]) if match else 0


def write_manifest(checkpoint: Path, files: Files, facts: dict[str, Any]) -> None:
    """Declare a checkpoint complete.

    Args:
        checkpoint: Its folder.
        files: What all ranks wrote (:func:`describe_files`).
        facts: What decided the training (:mod:`helpers.finetune.same_training`).
    """
    described = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    with atomic_write(checkpoint / MANIFEST) as temporary:
        content = json.dumps({"training": facts, "files": described}, indent=1, ensure_ascii=False)
        temporary.write_text(f"{content}\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> tuple[Files, dict[str, Any]]:
    """Read the manifest.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        The files and the facts, as they were given to :func:`write_manifest`.

    Raises:
        UserError: It is missing or damaged.
    """
    path = checkpoint / MANIFEST
    content = read_json_object(path, f"{checkpoint.name} was not finished: it has no {MANIFEST}")
    try:
        files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
        return files, dict(content["training"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the manifest of a checkpoint") from error


def find_damage(checkpoint: Path, only: tuple[str, ...] | None = None) -> str | None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        checkpoint: The checkpoint's folder.
        only: Patterns of the files that matter; None for all.

    Returns:
        What is wrong, in words; None if every file is as it was written.
    """
    try:
        files, _ = read_manifest(checkpoint)
    except UserError as error:
        return str(error)
    for name, (size, digest) in files.items():
        if only is not None and not any(fnmatch(name, pattern) for pattern in only):
            continue
        path = checkpoint / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, and {size:,} were written"
            if file_hash(path) != digest:
                return f"{name} is not what was written: its bytes have changed"
        except FileNotFoundError:
            of_rank = _owner(path.name)
            hint = f" (rank {of_rank} wrote it: all hosts must share the output folder)" if of_rank else ""
            return f"{name} is missing{hint}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """List the folders ``checkpoint-N`` of a run, finished or not, sorted by N."""
    numbered = [(p.name.removeprefix("checkpoint-"), p) for p in output_dir.glob("checkpoint-*") if p.is_dir()]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints that a run has finished.

    Args:
        output_dir: The run's output folder.

    Returns:
        The ``checkpoint-N`` folders that have a manifest, sorted by N; none if the folder does not exist.
    """
    return [path for path in numbered_checkpoints(output_dir) if (path / MANIFEST).is_file()]


def newest_intact(checkpoints: list[Path], left_out: list[str], only: tuple[str, ...] | None = None) -> Path | None:
    """Find the newest checkpoint whose files are as they were written.

    Args:
        checkpoints: Their folders, the newest last.
        left_out: Gets a line for each newer one that is left out.
        only: Patterns of the files that matter; None for all.

    Returns:
        Its folder, or None.
    """
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint, only)
        if damage is None:
            return checkpoint
        left_out.append(f"{checkpoint} is left out: {damage}")
    return None
