"""A rank that has gone is one line on the others, not gloo's or NCCL's."""

import dataclasses
import json
import signal

import pytest
import torch.distributed as dist
from small_finetune import ONE_RANK, write_config

from helpers.errors import UserError
from helpers.finetune.lost_rank import explained_lost_rank
from helpers.finetune.ranks import FAILED

GLOO = "[…/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5313: Connection reset by peer. This is typically …"
NCCL = "NCCL communicator was aborted on rank 1."


@pytest.fixture
def two_ranks():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return dataclasses.replace(ONE_RANK, world_size=2, store=store)


@pytest.mark.parametrize("text", [GLOO, NCCL])
def test_it_names_the_checkpoint_to_continue_from(text, two_ranks, small_run, tmp_path):
    for folder, remedy in ((small_run, "continue from checkpoint-10 with --resume"), (tmp_path, "start again")):
        with pytest.raises(UserError, match=f"another rank has gone without a word .*; {remedy}") as caught:
            with explained_lost_rank(two_ranks, folder):
                raise RuntimeError(text)
        assert "\n" not in str(caught.value)


def test_what_the_other_rank_has_reported_comes_first(two_ranks, tmp_path):
    two_ranks.store.set(FAILED, "rank 1 on b: the disk is full")
    with pytest.raises(UserError, match=r"^rank 1 on b: the disk is full; start again"):
        with explained_lost_rank(two_ranks, tmp_path):
            raise RuntimeError(GLOO)


@pytest.mark.parametrize(("ranks", "text"), [("two_ranks", "mat1 and mat2 shapes"), (None, GLOO)])
def test_other_errors_stay_what_they_are(ranks, text, tmp_path, request):
    place = request.getfixturevalue(ranks) if ranks else ONE_RANK
    with pytest.raises(RuntimeError, match=r"mat1|Connection"):
        with explained_lost_rank(place, tmp_path):
            raise RuntimeError(text)


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_one_line(tmp_path, data_dir, small_checkpoint, rank_server):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\n"
        "from helpers.finetune import recorder, train\n"
        "original = recorder.Recorder.on_step_end\n"
        "def on_step_end(self, args, state, control, **kwargs):\n"
        "    if state.global_step == 3 and self.ranks.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    original(self, args, state, control, **kwargs)\n"
        "recorder.Recorder.on_step_end = on_step_end\n"
        "train.main()\n"
    )
    config = write_config(tmp_path, training_args={"eval_strategy": "no"})
    output = tmp_path / "output"
    done = rank_server.run(script, data_dir, small_checkpoint, config, "--output-dir", output, nprocs=2)
    # Either rank 1's end is noticed first, and rank 0 is ended as torchrun does, or rank 0 says what it sees.
    assert done.returncode in (2, -signal.SIGKILL, 128 + signal.SIGKILL), done
    assert "Traceback" not in done.stderr
    assert json.loads((output / "run.json").read_text())["status"] in ("failed", "interrupted")
