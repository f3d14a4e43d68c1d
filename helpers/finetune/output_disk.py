"""Keep the output folder to one job, and say in one line what a disk refuses to write or to read."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from helpers.errors import UserError
from helpers.files import check_writable_folder
from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.ranks import Ranks
from helpers.memory.units import MIB

LOCK = ".lock"
_ANOTHER = "name another folder with --output-dir"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ONLY_WRITING = (*_FULL, errno.EFBIG, errno.EROFS)
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)
_GONE = (errno.ENOENT, errno.ENOTDIR)
# What torch.save says, as a RuntimeError, if the disk is full or read-only, or the folder is gone; and torch.load.
_TORCH_GONE = "Parent directory"
_TORCH_SAVE = (
    "failed writing",
    "unexpected pos",
    "cannot be opened",
    "open file failed",
    _TORCH_GONE,
    "iostream error",
)
_TORCH_LOAD = ("PytorchStreamReader", "unexpected EOF", "failed finding central directory")


@contextmanager
def only_job(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the output folder's lock, which the system releases when the process ends, however it ends.

    Rank 0 makes the folder and holds the lock; the others wait until it does. A folder that is still empty in the
    end is removed.

    Args:
        folder: The output folder.
        ranks: This process's place.

    Raises:
        UserError: Another job holds it, or the folder cannot be made or written to.
    """
    if not ranks.is_first:
        ranks.share("locked", "")
        yield
        return
    check_writable_folder(folder, _ANOTHER)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        ranks.share("locked", "yes")
        try:
            yield
        finally:
            with suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    for path in missing:
                        path.rmdir()


def _locked(folder: Path) -> IO[str]:
    """Open the lock file and lock it."""
    path = folder / LOCK
    while True:
        try:
            file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} could not be written ({error.strerror}); {_ANOTHER}") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The job that held it may have removed it meanwhile.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # the file system has no locks
            file.close()
            raise UserError(
                f"another job is writing to {folder}; wait for its end, or choose another --output-dir"
            ) from error
        file.close()


def is_disk_error(error: BaseException, folder: Path) -> bool:
    """Tell whether an error concerns a file in ``folder``, or a disk that is full or broken."""
    if isinstance(error, OSError):
        named = str(error.filename or "")
        return error.errno in (*_ONLY_WRITING, *_BROKEN) or bool(named and Path(named).is_relative_to(folder))
    return isinstance(error, SafetensorError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_SAVE)
    )


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the output folder's disk into one line.

    Args:
        folder: The output folder.

    Raises:
        UserError: Something could not be written, or not be read again.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error, folder):
            raise
        raise disk_error(error, folder, getattr(error, "filename", None)) from error


@contextmanager
def explained_read_errors(folder: Path) -> Iterator[None]:
    """Turn errors of reading a model into one line.

    Args:
        folder: The model's folder.

    Raises:
        UserError: A file of it could not be read.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        named = getattr(error, "filename", None)
        writing = getattr(error, "errno", None) in _ONLY_WRITING or (named and not Path(named).is_relative_to(folder))
        if writing or (isinstance(error, RuntimeError) and not any(part in str(error) for part in _TORCH_LOAD)):
            raise
        raise UserError(
            f"{named or folder} could not be read ({_reason(error)}); check its disk, or copy the model again"
        ) from error


def check_still_there(folder: Path, written: Path) -> None:
    """Check that a run's folder has not vanished: writing would make it again, without what was in it.

    Args:
        folder: The run's folder.
        written: What is about to be written, for the message.

    Raises:
        FileNotFoundError: It is gone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(written))


def disk_error(error: BaseException, folder: Path, path: str | Path | None, *, saving: bool = False) -> UserError:
    """Describe that ``path`` could not be written, or not be read.

    Args:
        error: What happened.
        folder: The output folder.
        path: The file or folder; None if it is not known.
        saving: Whether it happened while a checkpoint was saved.

    Returns:
        One line with the reason, and how to go on.
    """
    number = getattr(error, "errno", None)
    if not saving and number in _BROKEN and not (path and Path(path).parent == folder):
        what = f"{path or 'a file'} could not be read or written"
    elif isinstance(error, SafetensorError) and not saving:
        what = "a file could not be read or written"
    else:
        what = f"{path or folder} could not be written"
    reason = _reason(error)
    try:
        kept = complete_checkpoints(folder)
    except OSError:
        kept = []
    gone = number in _GONE or _TORCH_GONE in reason or not folder.is_dir()
    if gone and not kept:
        return UserError(f"{what} ({reason}); {folder} has gone, or a part of it: start again with a disk that stays")
    if number is None:
        number = _errno_of_writing(folder)
    if number in _FULL and not gone:
        with suppress(OSError):
            reason += f"; {shutil.disk_usage(folder).free / MIB:,.0f} MiB free on its disk"
    steps = [] if gone else [_cure(number, folder)]
    steps.append("continue with --resume" if kept else "start again")
    complete = f"{kept[-1].name} is complete: " if kept else ""
    return UserError(f"{what} ({reason}); {complete}{' and '.join(steps)}")


def unwritten(error: OSError) -> UserError | None:
    """Describe that a file outside of the output folder could not be written; None if the error says something else."""
    if error.errno not in _ONLY_WRITING:
        return None
    remedy = _cure(error.errno, Path(error.filename or ".").parent)
    return UserError(f"{error.filename or 'a file'} could not be written ({error.strerror}); {remedy} and start again")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _errno_of_writing(folder: Path) -> int | None:
    """Find out why a library could not write, whose message has no errno; ENOSPC if it works now."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MIB))
    except OSError as error:
        return error.errno
    return errno.ENOSPC


def _cure(number: int | None, folder: Path) -> str:
    """Return what to do about an error of the disk with ``folder``, as words that "and start again" can follow."""
    if number in _FULL:
        with suppress(OSError):
            disk = os.statvfs(folder)
            if disk.f_files and not disk.f_favail:
                return "remove files, because the disk has no inodes left,"
        return "free disk space"
    if number == errno.EFBIG:
        return "raise the limit of a file's size (ulimit -f)"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable"
    return "check the disk"
