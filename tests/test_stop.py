"""Signals: a checkpoint while training, the end before and after it; a dead worker of a data loader."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import LIMIT
from small_finetune import ONE_RANK, write_config

from helpers.errors import UserError
from helpers.finetune import train
from helpers.finetune.run_folder import RunFile
from helpers.finetune.stop import (
    SIGNALS,
    StopOnSignal,
    StoppedBySignal,
    end_at_signals,
    ignore_signals_in_worker,
    restored_signals,
)


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test installs is gone after it."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_and_after_training_a_signal_ends_the_rank_at_once(number, tmp_path):
    end_at_signals(ONE_RANK)
    run_file = RunFile(tmp_path / "run.json", ONE_RANK, {"status": "trained", "step": 4})
    with pytest.raises(StoppedBySignal) as stopped:
        signal.raise_signal(number)
    signal.raise_signal(number)  # torchrun passes on what everybody has got already
    assert stopped.value.status == 128 + number and str(stopped.value) == f"stopped by {number.name}"
    run_file.fail(stopped.value)
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "interrupted", "step": 4}


def test_a_job_inside_of_another_program_leaves_its_handlers_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(StoppedBySignal), restored_signals():
        end_at_signals(ONE_RANK)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_rank_that_ends_with_its_error_is_not_disturbed_by_the_signal_for_the_others(monkeypatch, capsys):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    class Store(dist.HashStore):
        def compare_set(self, *_):
            signal.raise_signal(signal.SIGTERM)  # another rank has ended first

    monkeypatch.setattr(os, "_exit", end)
    end_at_signals(ONE_RANK)
    with pytest.raises(Ended, match="2"):
        dataclasses.replace(ONE_RANK, store=Store()).exit_with_error(UserError("no such key"))
    assert capsys.readouterr().err == "error: no such key\n"


def test_while_training_a_signal_is_only_noted(capsys):
    stop = StopOnSignal(ONE_RANK)
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().out.count("saving a checkpoint after this step") == 1


def test_a_worker_leaves_signals_to_its_rank():
    started = []
    ignore_signals_in_worker(started.append, 3)
    for number in SIGNALS:
        signal.raise_signal(number)
    ignore_signals_in_worker(None, 4)
    assert started == [3]


@pytest.mark.slow
def test_a_signal_while_the_model_loads_is_one_line(tmp_path, data_dir, small_checkpoint, rank_server):
    script = tmp_path / "stopped_early.py"
    script.write_text(
        "import os, signal\n"
        "from helpers.finetune import train\n"
        "train._load_model = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "train.main()\n"
    )
    output = tmp_path / "output"
    done = rank_server.run(script, data_dir, small_checkpoint, write_config(tmp_path), "--output-dir", output)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout.splitlines()[-1] == "stopped by SIGTERM" and "Traceback" not in done.stderr
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"


def test_a_signal_for_a_rank_that_has_finished_is_no_traceback(monkeypatch, capsys, tmp_path):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    def finished(_, ranks):
        end_at_signals(ranks)
        return 130

    # Seed 305 of the fault campaign: the other rank ends first, and torchrun ends this one in its last lines.
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(train, "_run_or_explain", finished)
    monkeypatch.setattr(train, "quiet_libraries", lambda: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: signal.raise_signal(signal.SIGTERM))
    config = write_config(tmp_path)
    with pytest.raises(Ended, match="143"):
        train.main([str(tmp_path), str(tmp_path), str(config)])
    assert capsys.readouterr().out == "\nstopped by SIGTERM\n"


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_job_and_run_json_says_so(tmp_path, data_dir, small_checkpoint, rank_server):
    script = tmp_path / "killed_worker.py"
    script.write_text(
        "import os, signal\n"
        "from helpers.finetune import train, trainer\n"
        "trainer.ignore_signals_in_worker = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.main()\n"
    )
    config = write_config(tmp_path, training_args={"dataloader_num_workers": 1})
    output = tmp_path / "output"
    done = rank_server.run(script, data_dir, small_checkpoint, config, "--output-dir", output, nprocs=1)
    assert done.returncode != 0 and "DataLoader worker" in done.stderr
    run = json.loads((output / "run.json").read_text())
    assert run["status"] == "failed" and "DataLoader worker" in run["error"]


@pytest.mark.slow
def test_an_error_ends_the_rank_although_its_workers_ignore_signals(tmp_path, data_dir, small_checkpoint):
    """The traceback holds the loader until Python ends, and Python waits for workers. The rank server does not."""
    script = tmp_path / "error_in_a_step.py"
    script.write_text(
        "from helpers.finetune import train, trainer\n"
        "trainer.LoraTrainer.floating_point_ops = lambda *_: 1 / 0\n"
        "train.main()\n"
    )
    config = write_config(tmp_path, training_args={"dataloader_num_workers": 1, "eval_strategy": "no"})
    output = tmp_path / "output"
    done = subprocess.run(
        [sys.executable, script, data_dir, small_checkpoint, config, "--output-dir", output],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert json.loads((output / "run.json").read_text())["status"] == "failed"
