"""Choose the checkpoint to continue from, the same on every rank."""

import json
import socket
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.finetune.checkpoints import MANIFEST, file_hash, newest_intact, numbered_checkpoints
from helpers.finetune.output_disk import LOCK
from helpers.finetune.ranks import Ranks
from helpers.finetune.same_training import FRESH


def resume_point(output_dir: Path, resume: bool, ranks: Ranks, notes: list[str]) -> Path | None:
    """Find the checkpoint to continue from.

    Rank 0 chooses, and every rank must see the same one.

    Args:
        output_dir: The run's folder, which only this job writes to.
        resume: Whether ``--resume`` was given.
        ranks: This process's place.
        notes: Gets a line for the checkpoint, on rank 0, and for each damaged one that is left out.

    Returns:
        Its folder; None to start fresh.

    Raises:
        UserError: A fresh start would overwrite earlier results, there is nothing to resume, or hosts do not share the
            folder.
    """
    if not resume and output_dir.is_dir() and any(path.name != LOCK for path in output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} is not empty; continue with --resume, or choose another --output-dir")
    own = ""
    if resume and ranks.is_first:
        checkpoint = _newest(output_dir, notes)
        own = f"{checkpoint.name} {file_hash(checkpoint / MANIFEST)}"
    chosen = ranks.share("resume_point", own)
    if bool(chosen) != resume:
        raise UserError("some ranks were started with --resume and some without; start all with the same command")
    if not chosen:
        return None
    name, manifest_hash = chosen.split()
    manifest = output_dir / name / MANIFEST
    if not manifest.is_file() or file_hash(manifest) != manifest_hash:
        raise UserError(
            f"rank 0 resumes from {name}, which is not in {output_dir} on {socket.gethostname()}; "
            "all hosts must share the output folder"
        )
    return output_dir / name


def _newest(output_dir: Path, notes: list[str]) -> Path:
    left_out: list[str] = []
    checkpoint = newest_intact(numbered_checkpoints(output_dir), left_out)
    if checkpoint is None:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(f"--resume: {output_dir} holds no finished checkpoint{reasons}; {FRESH}")
    notes += [*left_out, f"resuming from {checkpoint}"]
    return checkpoint


def agree_on_facts(facts: dict[str, Any], ranks: Ranks) -> None:
    """Raise UserError if this rank's host has another data file, base model or configuration than rank 0's."""
    first = json.loads(ranks.share("training_facts", json.dumps(facts)))
    different = [key for key, value in facts.items() if first[key] != value]
    if different:
        raise UserError(
            f"{socket.gethostname()} has another {' and '.join(different)} than the host of rank 0; "
            "give all hosts the same files"
        )
