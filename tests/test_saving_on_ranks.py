"""What one rank of several cannot save: one line, no half checkpoint, and run.json says so."""

import errno
import json
import os

import pytest
from small_finetune import ROOT, write_config

from helpers.finetune.checkpoints import find_damage

pytestmark = pytest.mark.slow

FAILS = """
import os
from helpers.finetune import train, watchdog
from helpers.finetune.trainer import LoraTrainer

watchdog.END_SECONDS = 1.0
original = LoraTrainer._save_rng_state

def fail(self, output_dir):
    if self.state.global_step == 4 and os.environ["RANK"] == "{rank}":
        raise OSError({number}, os.strerror({number}), os.path.join(output_dir, "rng_state_{rank}.pth"))
    original(self, output_dir)

LoraTrainer._save_rng_state = fail
train.main()
"""


@pytest.mark.parametrize(
    ("rank", "number", "deepspeed", "remedy"),
    [
        (1, errno.ENOSPC, "ds_zero_2.json", "free disk space and"),
        (0, errno.EIO, None, "check the disk and"),
    ],
)
def test_a_rank_that_cannot_save_ends_the_job(
    rank, number, deepspeed, remedy, tmp_path, data_dir, small_checkpoint, rank_server
):
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(rank=rank, number=number))
    files = [data_dir, small_checkpoint, write_config(tmp_path, training_args={"eval_strategy": "no", "max_steps": 6})]
    files += [ROOT / "configs" / deepspeed] if deepspeed else []
    output = tmp_path / "output"
    done = rank_server.run(script, *files, "--output-dir", output, nprocs=2)
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and f"checkpoint-4 could not be written ({os.strerror(number)}" in lines[0]
    assert lines[0].endswith(f"checkpoint-2 is complete: {remedy} continue with --resume")
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2"]
    assert find_damage(output / "checkpoint-2") is None
    run = json.loads((output / "run.json").read_text())
    assert run["status"] == "failed" and "checkpoint-4 could not be written" in run["error"]


VANISHES = """
import shutil
from helpers.finetune import train
from helpers.finetune.recorder import Recorder

original = Recorder.on_step_end

def on_step_end(self, args, state, control, **kwargs):
    original(self, args, state, control, **kwargs)
    if state.global_step == 3:
        shutil.rmtree(args.output_dir)

Recorder.on_step_end = on_step_end
train.main()
"""


def test_an_output_folder_that_vanishes_is_said_and_not_made_again(tmp_path, data_dir, small_checkpoint, rank_server):
    script = tmp_path / "vanishes.py"
    script.write_text(VANISHES)
    config = write_config(tmp_path, training_args={"eval_strategy": "no", "logging_steps": 50})
    output = tmp_path / "output"
    done = rank_server.run(script, data_dir, small_checkpoint, config, "--output-dir", output)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and "could not be written (No such file or directory); " in lines[0]
    assert lines[0].endswith(f"{output} has gone, or a part of it: start again with a disk that stays")
    assert not output.exists()
