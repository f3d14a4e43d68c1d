"""The watchdog: who is silent, who waits where, and the end of a rank that waits for a stopped one."""

import dataclasses
import json
import os
import re
import socket
import sys

import pytest
import torch.distributed as dist
from small_finetune import ONE_RANK, write_config

from helpers.finetune import watchdog
from helpers.finetune.beats import LONGEST_BEAT, Beat, Judge, where
from helpers.finetune.ranks import FAILED
from helpers.finetune.run_folder import RunFile
from helpers.finetune.watchdog import Watchdog

LIMIT_OF_SILENCE = 10


class Ranks:
    """Ranks 0 to 2 as rank 0 sees them, second by second."""

    def __init__(self):
        self.judge = Judge(0, 3, LIMIT_OF_SILENCE)
        self.numbers = [0, 0, 0]

    def pass_seconds(self, seconds, *, silent=(), still=(), done=(), store=True):
        for _ in range(seconds):
            self.judge.pass_time(1)
            for rank in range(3):
                self.numbers[rank] += rank not in silent
                number = self.numbers[rank]
                if store:
                    stack = 0 if rank in still else number
                    self.judge.hear(rank, Beat(number, f"host{rank}", 7, f"at line {rank}", stack, rank in done))
            if store:
                self.judge.answered = self.judge.now
        return self.judge.verdict()


def test_ranks_that_beat_and_move_are_left_alone():
    assert Ranks().pass_seconds(50) is None


def test_a_silent_rank_is_named_with_its_host_and_last_step_after_the_limit_only():
    ranks = Ranks()
    ranks.pass_seconds(3)
    assert ranks.pass_seconds(LIMIT_OF_SILENCE, silent=[1], still=[0, 1, 2]) is None
    verdict = ranks.pass_seconds(1, silent=[1], still=[0, 1, 2])
    assert verdict.startswith("rank 1 on host1 (last step 7): silent for 10 s")
    assert verdict.endswith("rank 0 waits at line 0")


def test_a_rank_that_has_finished_may_be_silent():
    ranks = Ranks()
    ranks.pass_seconds(3, done=[1])
    assert ranks.pass_seconds(50, silent=[1], done=[1]) is None


def test_a_store_that_does_not_answer_is_not_taken_for_a_silent_rank():
    ranks = Ranks()
    ranks.pass_seconds(3)
    assert ranks.pass_seconds(LIMIT_OF_SILENCE, store=False) is None
    verdict = ranks.pass_seconds(1, store=False)
    assert verdict.startswith("the job's store, on rank 0 on host0 (last step 7)'s host, has not answered for 10 s")


def test_ranks_that_all_stand_still_are_named_with_their_lines():
    ranks = Ranks()
    ranks.pass_seconds(3)
    assert ranks.pass_seconds(50, still=[0, 2]) is None
    verdict = ranks.pass_seconds(LIMIT_OF_SILENCE + 2, still=[0, 1, 2])
    assert verdict.startswith("no rank has moved for 10 s: rank 0 on host0 (last step 7) at line 0; rank 1 on host1")


def test_a_rank_that_was_stopped_itself_blames_nobody():
    ranks = Ranks()
    ranks.pass_seconds(3)
    ranks.judge.pass_time(3600)
    assert ranks.judge.now == 3 + LONGEST_BEAT and ranks.judge.verdict() is None


def test_a_line_is_named_with_the_collective_that_it_is_in():
    code = compile("def all_reduce(): return sys._getframe()\n", "/x/torch/distributed/distributed_c10d.py", "exec")
    names = {"sys": sys}
    exec(code, names)
    assert where(names["all_reduce"]())[0] == ", in all_reduce"
    assert where(None)[0] == ""


def test_it_ends_the_rank_with_one_line_in_run_json_and_the_store(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watchdog, "END_SECONDS", 0)
    ended = []
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = dataclasses.replace(ONE_RANK, world_size=2, store=store)
    dog = Watchdog(ranks, {}, RunFile(tmp_path / "run.json", ranks, {"status": "running"}), ended.append)
    assert dog.judge.limit == 1800  # transformers' own
    dog.bark("rank 1 is silent")
    assert ended == [2] and capsys.readouterr().err == "error: rank 1 is silent; start again\n"
    assert store.get(FAILED) == b"rank 1 is silent; start again"
    run = json.loads((tmp_path / "run.json").read_text())
    assert run == {"status": "failed", "error": "UserError: rank 1 is silent; start again"}


def test_two_ranks_hear_of_each_other(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dogs = []
    for rank in (0, 1):
        ranks = dataclasses.replace(ONE_RANK, rank=rank, world_size=2, store=store)
        dogs.append(Watchdog(ranks, {"ddp_timeout": 5}, RunFile(tmp_path / "run.json", ranks, {})))
    dogs[1].step = 3
    dogs[0].exchange(store)
    assert dogs[0].judge.beats[1] is None
    dogs[1].exchange(store)
    dogs[0].exchange(store)
    assert dogs[0].judge.beats[1].step == 3 and dogs[1].judge.beats[0].number == 1


def test_alone_it_does_nothing(tmp_path):
    with Watchdog(ONE_RANK, {}, RunFile(tmp_path / "run.json", ONE_RANK, {})) as dog:
        assert not dog._talker.is_alive()


@pytest.mark.slow
def test_a_stopped_rank_ends_the_other_with_one_line(tmp_path, data_dir, small_checkpoint, rank_server):
    # As torchrun does to a rank that does not end: rank 1 is killed when rank 0 has ended.
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, pathlib, signal, subprocess\n"
        "from helpers.finetune import train\n"
        "from helpers.finetune.watchdog import Watchdog\n"
        f"pids = pathlib.Path({str(tmp_path)!r})\n"
        "(pids / f'pid-{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
        "step_end, exchange = Watchdog.on_step_end, Watchdog.exchange\n"
        "def on_step_end(self, *args, **kwargs):\n"
        "    step_end(self, *args, **kwargs)\n"
        "    if self.step == 3 and self.ranks.rank == 1:\n"
        "        signal.pause()\n"
        "def exchange_and_stop(self, store):\n"
        "    step = self.step\n"
        "    exchange(self, store)\n"
        "    if step == 3 and self.ranks.rank == 1:\n"
        "        first = (pids / 'pid-0').read_text()\n"
        "        kill = f'tail --pid={first} -f /dev/null; kill -KILL {os.getpid()}'\n"
        "        subprocess.Popen(['sh', '-c', kill], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "Watchdog.on_step_end, Watchdog.exchange = on_step_end, exchange_and_stop\n"
        "train.main()\n"
    )
    config = write_config(tmp_path, training_args={"eval_strategy": "no", "ddp_timeout": 5})
    output = tmp_path / "output"
    done = rank_server.run(script, data_dir, small_checkpoint, config, "--output-dir", output, nprocs=2)
    assert done.returncode == 2, done
    (line,) = (line for line in done.stderr.splitlines() if line)
    host = socket.gethostname()
    assert line.startswith(f"error: rank 1 on {host} (last step 3): silent for 5 s"), line
    assert re.search(r"; rank 0 waits at transformers/\w+\.py:\d+ \(\w+\), in (all_gather|a collective)", line), line
    assert line.endswith("; continue from checkpoint-2 with --resume")
    run = json.loads((output / "run.json").read_text())
    assert run["status"] == "failed" and line.removeprefix("error: ") in run["error"]
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)
