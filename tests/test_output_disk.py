"""The output folder belongs to one job, and what its disk refuses is one line."""

import errno
import os
import subprocess
import sys

import pytest
import torch.distributed as dist
from small_finetune import ONE_RANK

from helpers.errors import UserError
from helpers.finetune.checkpoints import write_manifest
from helpers.finetune.output_disk import LOCK, disk_error, explained_disk_errors, only_job
from helpers.finetune.ranks import FAILED, Ranks

HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


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


def raised(number: int, path: object = None) -> OSError:
    return OSError(number, os.strerror(number), str(path) if path else None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda folder: raised(errno.ENOSPC), "No space left on device"),
        (lambda folder: raised(errno.EDQUOT), "Disk quota exceeded"),
        (lambda folder: raised(errno.EROFS, folder / "metrics.jsonl"), r"metrics.jsonl could .*Read-only file system"),
        (lambda folder: raised(errno.ENOENT, folder / "run.json"), r"run.json could .*No such file or directory"),
        (lambda folder: raised(errno.EIO), "Input/output error"),
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
    assert "metrics.jsonl could not be written (No such file or directory); " in line and "is gone" in line
