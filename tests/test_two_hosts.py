"""The fine-tune on two hosts: two network namespaces with a cable between them, torchrun in each."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
from conftest import LIMIT
from small_finetune import ROOT, TRAIN, write_config

from helpers.finetune.recorder import read_metrics

pytestmark = pytest.mark.slow

STEPS, LIMIT_SECONDS, OUTAGE_SECONDS = 120, 10, 5
TRAINING = {
    "max_steps": STEPS,
    "save_steps": 40,
    "logging_steps": 1,
    "eval_strategy": "no",
    "ddp_timeout": LIMIT_SECONDS,
}
TRAINING |= {"learning_rate": 1e-3, "predict_with_generate": False}


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


def may_make_networks() -> str | None:
    """Why not; None if this process may."""
    name = f"may-{os.getpid()}"
    try:
        made = ip("netns", "add", name)
        linked = ip("link", "add", f"v{os.getpid()}", "type", "veth", "peer", "name", f"w{os.getpid()}")
    except FileNotFoundError:
        return "there is no ip command here"
    ip("netns", "del", name)
    ip("link", "del", f"v{os.getpid()}")
    return None if made.returncode == linked.returncode == 0 else "this process may not make network namespaces"


class Hosts:
    """Two namespaces; ``cable(False)`` pulls the cable out."""

    def __init__(self):
        self.names = [f"host-{letter}-{os.getpid()}" for letter in "ab"]
        self.cards = [f"v{letter}{os.getpid()}" for letter in "ab"]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", self.cards[0], "type", "veth", "peer", "name", self.cards[1])
        for number, (name, card) in enumerate(zip(self.names, self.cards, strict=True), start=1):
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            ip("netns", "del", name)

    def cable(self, plugged):
        ip("-n", self.names[0], "link", "set", self.cards[0], "up" if plugged else "down")

    def die(self, number):
        """Kill every process of a host."""
        for process in ip("netns", "pids", self.names[number]).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def start(self, number, arguments):
        """One rank of the job on one host, as its user would start it there."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={number}"]
        command += ["--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29511", TRAIN, *arguments]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": self.cards[number], "PYTHONPATH": str(ROOT)}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def hosts():
    reason = may_make_networks()
    if reason:
        pytest.skip(reason)
    with Hosts() as found:
        yield found


@contextmanager
def job(hosts, *arguments):
    """The job on both hosts; whatever is left of it is killed at the end."""
    processes = [hosts.start(number, arguments) for number in (0, 1)]
    try:
        yield processes
    finally:
        for number, process in enumerate(processes):
            hosts.die(number)
            process.wait()
        hosts.cable(plugged=True)


def read_until(process, text, seen):
    for line in process.stdout:
        seen.append(line)
        if line.startswith(text):
            return
    raise AssertionError("".join(seen))


def test_a_short_outage_changes_nothing_and_a_long_one_ends_both_hosts(
    hosts, tmp_path, data_dir, small_checkpoint, rank_server
):
    config = write_config(tmp_path, training_args=TRAINING)
    seen, other = [], []
    with job(hosts, data_dir, small_checkpoint, config, "--output-dir", tmp_path / "two") as (first, second):
        drain = threading.Thread(target=lambda: other.extend(second.stdout))
        drain.start()
        read_until(first, "step 20/", seen)
        hosts.cable(plugged=False)
        threading.Event().wait(OUTAGE_SECONDS)  # how long the outage lasts; nothing could announce its end
        hosts.cable(plugged=True)
        read_until(first, "step 60/", seen)
        hosts.cable(plugged=False)
        seen += first.stdout
        assert first.wait(LIMIT) != 0 and second.wait(LIMIT) != 0
        drain.join(LIMIT)
    line = next(line for line in seen if "error: " in line)
    assert re.search(r"rank 1 on \S+ \(last step \d+\): silent for 10 s|has gone", line), line
    assert "continue from checkpoint-40 with --resume" in line
    assert any("error: " in line for line in other), "".join(other)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "failed"

    alone = rank_server.run(*(TRAIN, data_dir, small_checkpoint, config, "--output-dir", tmp_path / "one"), nprocs=2)
    assert alone.returncode == 0, alone.stderr
    two, one = ([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")][:60] for name in ("two", "one"))
    assert two == one and len(two) == 60


def test_a_host_that_dies_ends_the_other(hosts, tmp_path, data_dir, small_checkpoint):
    config = write_config(tmp_path, training_args=TRAINING)
    seen = []
    with job(hosts, data_dir, small_checkpoint, config, "--output-dir", tmp_path / "output") as (first, second):
        threading.Thread(target=second.stdout.read).start()
        read_until(first, "step 45/", seen)
        hosts.die(1)
        seen += first.stdout
        assert first.wait(LIMIT) != 0
    assert any("error: " in line and "checkpoint-40" in line for line in seen), "".join(seen)
    assert json.loads((tmp_path / "output" / "run.json").read_text())["status"] == "failed"
