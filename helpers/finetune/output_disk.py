"""Keep the output folder to one job, and say in one line what its disk refuses."""

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from helpers.errors import UserError
from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.ranks import Ranks
from helpers.memory.units import MIB

LOCK = ".lock"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
# What torch.save says, as a RuntimeError, if the disk is full or read-only, or the folder is gone.
_TORCH_SAVE = ("failed writing", "unexpected pos", "cannot be opened", "Parent directory", "iostream error")


@contextmanager
def only_job(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the output folder's lock, which the system releases when the process ends, however it ends.

    Rank 0 holds it, and the others wait until it does.

    Args:
        folder: The output folder; it exists.
        ranks: This process's place.

    Raises:
        UserError: Another job holds it.
    """
    if not ranks.is_first:
        ranks.share("locked", "")
        yield
        return
    with (folder / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another job is writing to {folder}; wait for its end, or choose another --output-dir"
                ) from error
            # The file system has no locks.
        ranks.share("locked", "yes")
        yield


def is_disk_error(error: BaseException, folder: Path) -> bool:
    """Tell whether an error says that a file in ``folder`` could not be written, or that a disk is full or broken."""
    if isinstance(error, OSError):
        named = str(error.filename or "")
        return error.errno in _DISK or bool(named and Path(named).is_relative_to(folder))
    return isinstance(error, SafetensorError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_SAVE)
    )


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the output folder's disk into one line.

    Args:
        folder: The output folder.

    Raises:
        UserError: Something could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error, folder):
            raise
        raise disk_error(error, folder, getattr(error, "filename", None) or folder) from error


def disk_error(error: BaseException, folder: Path, path: str | Path) -> UserError:
    """Describe that ``path`` could not be written.

    Args:
        error: What happened.
        folder: The output folder.
        path: The file or folder.

    Returns:
        One line with the reason, the space left, and how to go on.
    """
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    try:
        reason += f"; {shutil.disk_usage(folder).free / MIB:,.0f} MiB free on its disk"
        kept = complete_checkpoints(folder)
    except OSError:
        return UserError(
            f"{path} could not be written ({reason}); {folder} is gone: start again with a disk that stays"
        )
    remedy = (
        f"{kept[-1].name} is complete: free disk space and continue with --resume"
        if kept
        else ("free disk space and start again")
    )
    return UserError(f"{path} could not be written ({reason}); {remedy}")
