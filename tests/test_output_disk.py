"""The output folder belongs to one job, and what its disk refuses is one line."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from safetensors import SafetensorError
from small_finetune import ONE_RANK, write_config

from helpers.errors import UserError
from helpers.finetune import train
from helpers.finetune.checkpoints import write_manifest
from helpers.finetune.output_disk import (
    LOCK,
    disk_error,
    explained_disk_errors,
    explained_read_errors,
    only_job,
    unwritten,
)
from helpers.finetune.ranks import FAILED, Ranks
from helpers.finetune.run_folder import RunFile

HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def raised(number: int, path: object = None) -> OSError:
    return OSError(number, os.strerror(number), str(path) if path else None)


def test_a_second_job_is_refused_until_the_first_process_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another job is writing to .*; wait for its end, or choose another"):
            with only_job(tmp_path, ONE_RANK):
                pytest.fail("both hold it")
        other.kill()
        other.wait()
        with only_job(tmp_path, ONE_RANK):
            assert (tmp_path / LOCK).is_file()


def test_other_ranks_wait_for_the_lock_or_learn_that_it_is_taken(tmp_path):
    store = dist.HashStore()
    ranks = [Ranks(rank=rank, local_rank=rank, world_size=2, local_world_size=2, store=store) for rank in range(2)]
    store.set(FAILED, "rank 0 on a: another job is writing")
    with pytest.raises(UserError, match="another job is writing"), only_job(tmp_path, ranks[1]):
        pytest.fail("it did not wait")
    with only_job(tmp_path, ranks[0]), only_job(tmp_path, ranks[1]):
        assert (tmp_path / LOCK).is_file()


def test_a_second_job_is_refused_before_it_reads_a_checkpoint(tmp_path, monkeypatch, data_dir, small_checkpoint):
    monkeypatch.setattr(train, "prepare", lambda *_, **__: pytest.fail("it was not refused"))
    output = tmp_path / "output"
    output.mkdir()
    arguments = [str(data_dir), str(small_checkpoint), str(write_config(tmp_path)), "--output-dir", str(output)]
    command = [sys.executable, "-c", HOLD, str(output / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another job is writing to"):
            train._run(train._arguments([*arguments, "--resume"]), ONE_RANK)
        other.kill()


def test_a_job_that_is_refused_leaves_nothing(tmp_path, data_dir, small_checkpoint):
    for output in (tmp_path / "new" / "folder", tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match="bad"), only_job(output, ONE_RANK):
            assert (output / LOCK).exists()
            raise UserError("bad")
        assert sorted(tmp_path.iterdir()) == before


def test_what_a_job_has_written_stays(tmp_path):
    with pytest.raises(UserError), only_job(tmp_path / "new", ONE_RANK):
        (tmp_path / "new" / "run.json").write_text("{}")
        raise UserError("bad")
    assert (tmp_path / "new" / "run.json").exists()


def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    lockf, removed = fcntl.lockf, []

    def remove_first(file, how):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with only_job(tmp_path, ONE_RANK):
        assert (tmp_path / LOCK).is_file()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_folder_that_takes_no_lock_is_one_line(number, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise raised(number, path)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"\.lock could not be written \({os.strerror(number)}\); name another folder"):
        with only_job(tmp_path, ONE_RANK):
            pytest.fail("it was not refused")


def test_a_folder_under_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made: .* is not a folder; name another folder with --output-dir"):
        with only_job(tmp_path / "file" / "output", ONE_RANK):
            pytest.fail("it was not refused")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda folder: raised(errno.ENOSPC), r"written \(No space left on device; .* MiB free.*: free disk space and"),
        (lambda folder: raised(errno.EDQUOT), r"written \(Disk quota exceeded; .*: free disk space and continue"),
        (
            lambda folder: raised(errno.EFBIG, folder / "a"),
            r"a could not be written \(File too large\); .*: raise",
        ),
        (
            lambda folder: raised(errno.EROFS, folder / "metrics.jsonl"),
            r"metrics.jsonl could .*Read-only .*: make it",
        ),
        (
            lambda folder: raised(errno.EACCES, folder / "run.json"),
            r"run.json could .*Permission .*: make it",
        ),
        (
            lambda folder: raised(errno.ENOENT, folder / "run.json"),
            r"run.json could .*No such .*complete: continue",
        ),
        (
            lambda folder: raised(errno.EIO),
            r"a file could not be read or written \(Input/output .*: check",
        ),
        (
            lambda folder: raised(errno.EIO, folder / "metrics.jsonl"),
            r"metrics.jsonl could not be written .*: check",
        ),
        (lambda folder: raised(errno.ESTALE, folder / "checkpoint-4" / "a"), r"a could not be read or written \(Stale"),
        (lambda folder: RuntimeError("[enforce fail] . unexpected pos 11264 vs 11152"), "unexpected pos 11264"),
        (lambda folder: RuntimeError("PytorchStreamWriter failed writing file data/0"), "failed writing file"),
        (lambda folder: RuntimeError("Parent directory /a does not exist."), "Parent directory"),
    ],
)
def test_what_a_disk_refuses_is_one_line(error, said, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    write_manifest(tmp_path / "checkpoint-4", {}, {})
    with pytest.raises(UserError, match=said) as caught, explained_disk_errors(tmp_path):
        raise error(tmp_path)
    assert "checkpoint-4 is complete" in str(caught.value) and "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone", "/elsewhere/x"), RuntimeError("shape mismatch")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, explained_disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_folder_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    line = str(disk_error(raised(errno.ENOENT), gone, gone / "metrics.jsonl"))
    assert "metrics.jsonl could not be written (No such file or directory); " in line and "has gone" in line
    assert "space" not in line


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    run_file = RunFile(tmp_path / "gone" / "run.json", ONE_RANK, {})
    with pytest.raises(UserError, match=r"gone/run.json could not be written \(No such file .* has gone"):
        with explained_disk_errors(tmp_path / "gone"):
            run_file.update(step=1)
    assert not (tmp_path / "gone").exists()


def test_torch_s_own_words_get_the_remedy_of_what_the_disk_says(tmp_path, monkeypatch):
    error = RuntimeError("PytorchStreamWriter failed writing file data/0")
    assert "; free disk space and start again" in str(disk_error(error, tmp_path, None, saving=True))

    def refuse(**_):
        raise raised(errno.EFBIG)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "raise the limit of a file's size (ulimit -f) and" in str(disk_error(error, tmp_path, None, saving=True))


def test_a_disk_without_inodes_is_not_called_full(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_files=9, f_favail=0, f_bavail=9, f_blocks=9, f_bfree=9, f_frsize=9)
    )
    line = str(disk_error(raised(errno.ENOSPC), tmp_path, None))
    assert line.endswith("; remove files, because the disk has no inodes left, and start again")


READ_ERRORS = {
    "a file": (
        lambda model: raised(errno.EIO, model / "model.safetensors"),
        r"model.safetensors could not be read \(",
    ),
    "no name": (lambda model: raised(errno.ESTALE), r"model could not be read \(Stale file handle\); check its disk"),
    "safetensors": (lambda model: SafetensorError("MetadataIncompleteBuffer"), r"model could not be read \(Metadata"),
    "torch": (
        lambda model: RuntimeError("PytorchStreamReader failed reading zip archive"),
        r"model could not be read \(",
    ),
}


@pytest.mark.parametrize("name", READ_ERRORS)
def test_a_base_model_that_cannot_be_read_is_named_as_such(name, tmp_path):
    error, said = READ_ERRORS[name]
    model = tmp_path / "model"
    with pytest.raises(UserError, match=said) as caught:
        with explained_disk_errors(tmp_path / "output"), explained_read_errors(model):
            raise error(model)
    assert "written" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [raised(errno.ENOSPC, "/nvme/swap"), raised(errno.EACCES, "/cache/x"), RuntimeError("shape mismatch")]
)
def test_while_a_model_is_read_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, explained_read_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "free disk space"), (errno.EROFS, "make it writable")])
def test_a_file_elsewhere_that_could_not_be_written_is_named(number, said):
    assert str(unwritten(raised(number, "/cache/x"))).startswith("/cache/x could not be written (")
    assert str(unwritten(raised(number, "/cache/x"))).endswith(f"; {said} and start again")
    assert unwritten(raised(errno.EIO, "/cache/x")) is None
