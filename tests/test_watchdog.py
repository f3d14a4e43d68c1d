"""The watchdog: who is silent, who waits where, and the end of a rank that waits for a stopped one."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import LIMIT
from small_finetune import ONE_RANK, write_config

from helpers.finetune import watchdog
from helpers.finetune.beats import LONGEST_BEAT, Beat, Judge, where
from helpers.finetune.last_resort import LastResort
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


def test_one_long_pause_of_its_own_is_no_verdict():
    judge = Judge(0, 2, limit=2)
    judge.pass_time(3600)
    assert judge.verdict() is None


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
    dog = Watchdog(ranks, {}, tmp_path, ended.append)
    dog.run_file = RunFile(tmp_path / "run.json", ranks, {"status": "running"})
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
        dogs.append(Watchdog(ranks, {"ddp_timeout": 5}, tmp_path))
    dogs[1].step = 3
    dogs[0].exchange(store)
    assert dogs[0].judge.beats[1] is None
    dogs[1].exchange(store)
    dogs[0].exchange(store)
    assert dogs[0].judge.beats[1].step == 3 and dogs[1].judge.beats[0].number == 1


def test_alone_it_does_nothing(tmp_path):
    with Watchdog(ONE_RANK, {}, tmp_path) as dog:
        assert not dog._talker.is_alive() and dog._last_resort is None


def test_a_rank_that_never_came_is_named():
    judge = Judge(0, 2, LIMIT_OF_SILENCE)
    for number in range(LIMIT_OF_SILENCE + 1):
        judge.pass_time(1)
        judge.hear(0, Beat(number, "host0", 0, "at line 0", number))
        judge.answered = judge.now
    assert judge.verdict().startswith("rank 1 (never heard of): silent for 10 s")


def test_a_rank_that_asks_again_and_again_for_another_stands_still(tmp_path):
    store = dist.HashStore()
    ranks = dataclasses.replace(ONE_RANK, rank=1, world_size=2, store=store)
    waiting = threading.Thread(target=ranks.share, args=["plan", ""])
    waiting.start()
    seen = set()
    while len(seen) < 2 and not store.check(["plan"]):
        frame = sys._current_frames().get(waiting.ident)
        for _ in range(1000):  # in any of its lines
            frame = sys._current_frames().get(waiting.ident) or frame
            places = []
            while frame is not None and frame.f_back is not None:
                places.append(frame.f_code.co_name)
                if "_wait_for" in places:
                    seen.add(where(frame)[1])
                    break
                frame = frame.f_back
        store.set("plan", "x")
    waiting.join()
    assert len(seen) == 1


def test_processes_that_work_for_a_rank_count_as_its_own_movement(tmp_path):
    ranks = dataclasses.replace(ONE_RANK, world_size=2, store=dist.HashStore())
    dog = Watchdog(ranks, {"ddp_timeout": 1}, tmp_path)
    before = dog._busy()
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert dog._busy() > before
        child.communicate(b"\n")


# --- the process beside a rank


@pytest.fixture
def silent_rank():
    """A process that never says that it lives, and what is beside it; the pipe between them is this test's."""
    read, write = os.pipe()
    code = (
        "import os, signal, subprocess, sys\n"
        "from helpers.finetune import last_resort\n"
        "command = [sys.executable, '-I', '-S', last_resort.__file__, str(os.getpid()), '1']\n"
        "print(subprocess.Popen(command, stdin=int(sys.argv[1])).pid, flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", code, str(read)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[read]) as rank:
        os.close(read)
        yield rank, int(rank.stdout.readline()), write
        rank.kill()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for_end_of(pid: int) -> None:
    until = time.monotonic() + LIMIT
    while not ended(pid):
        assert time.monotonic() < until
        os.sched_yield()


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGSTOP])
def test_a_rank_that_is_silent_for_too_long_is_killed(number, silent_rank):
    rank, beside, write = silent_rank
    os.write(write, b".")
    left = bytearray(b"1")
    while any(left):  # until it reads
        left = bytearray(4)
        fcntl.ioctl(write, termios.FIONREAD, left)
    if number:
        rank.send_signal(number)
    for ignored in (signal.SIGTERM, signal.SIGINT):  # torchrun signals the whole group
        os.kill(beside, ignored)
    assert rank.wait(LIMIT) == -signal.SIGKILL
    wait_for_end_of(beside)
    os.close(write)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the pipe is closed", "the rank is killed"])
def test_what_is_beside_a_rank_ends_with_it(how, silent_rank):
    rank, beside, write = silent_rank
    if how == "the rank is killed":
        rank.kill()
        rank.wait()
        wait_for_end_of(beside)
        os.close(write)
    else:
        os.close(write)
        wait_for_end_of(beside)
        assert rank.poll() is None


def test_a_rank_that_says_so_lives(monkeypatch):
    beside = LastResort(3600)
    assert not ended(beside._process.pid)
    for _ in range(100_000):  # more than the pipe takes: it is stopped, say
        beside.live()
    beside.end()
    assert ended(beside._process.pid)


# --- launches

HANGS = """
import os, pathlib, signal, sys
from helpers.finetune import train, watchdog
from helpers.finetune.watchdog import Watchdog

watchdog.END_SECONDS = 1.0
(pathlib.Path({folder!r}) / f"pid-{{os.environ['RANK']}}").write_text(str(os.getpid()))
where = {where!r}
if os.environ["RANK"] == "1":
    if where == "never arrives":
        signal.pause()
    elif where == "while the model is loaded":
        train._load_model = lambda *_: signal.pause()
    elif where == "stopped":
        step_end, exchange = Watchdog.on_step_end, Watchdog.exchange

        def on_step_end(self, *args, **kwargs):
            step_end(self, *args, **kwargs)
            if self.step == 3:
                signal.pause()

        def exchange_and_stop(self, store):
            step = self.step
            exchange(self, store)
            if step == 3:
                os.kill(os.getpid(), signal.SIGSTOP)

        Watchdog.on_step_end, Watchdog.exchange = on_step_end, exchange_and_stop
train.main()
"""
LINES = {
    "never arrives": r"error: rank 1 \(never heard of\): silent for 5 s .*; rank 0 waits at helpers/\S+ \(\w+\)",
    "while the model is loaded": r"error: no rank has moved for 5 s: rank 0 on {host} \(last step 0\) at \S+ \(",
    "stopped": r"error: rank 1 on {host} \(last step 3\): silent for 5 s .*; rank 0 waits at transformers/\w+\.py:\d+ "
    r"\(\w+\), in (all_gather|a collective)",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", LINES)
def test_a_rank_that_hangs_ends_the_job_with_one_line(place, tmp_path, data_dir, small_checkpoint, rank_server):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS.format(folder=str(tmp_path), where=place))
    config = write_config(tmp_path, training_args={"eval_strategy": "no", "ddp_timeout": 5})
    output = tmp_path / "output"
    done = rank_server.run(script, data_dir, small_checkpoint, config, "--output-dir", output, nprocs=2)
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines and all("Traceback" not in line for line in lines)
    assert re.match(LINES[place].format(host=re.escape(socket.gethostname())), lines[0]), lines
    trained = place == "stopped"
    assert lines[0].endswith("; continue from checkpoint-2 with --resume" if trained else "; start again")
    if (output / "run.json").exists():
        run = json.loads((output / "run.json").read_text())
        assert run["status"] == "failed" and lines[0].removeprefix("error: ") in run["error"]
    for rank in (0, 1):
        wait_for_end_of(int((tmp_path / f"pid-{rank}").read_text()))
