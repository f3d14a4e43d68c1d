"""Starting the job as a shell would, and the main job itself on the embedded model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_finetune import TRAIN

from helpers.assets import TINY_DATA, TINY_MODEL
from helpers.files import fresh_folder
from helpers.finetune import demo, torchrun
from helpers.finetune.demo import CONFIGS
from helpers.finetune.torchrun import format_command, run_command, torchrun_command
from helpers.hardware import describe_machine


def test_the_command_is_what_one_would_type(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[1])
    config = Path("configs/lora.yaml").resolve()
    command = torchrun_command(TINY_DATA, "THUDM/chatglm3-6b", config, output_dir=tmp_path / "out", nprocs=3)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    data, model, yaml, flag, out = command[7:12]
    assert (data, model, yaml) == (os.path.relpath(TINY_DATA), "THUDM/chatglm3-6b", "configs/lora.yaml")
    assert flag == "--output-dir" and Path(out).resolve() == (tmp_path / "out").resolve()
    assert format_command(command).startswith("torchrun --standalone --nproc_per_node=3 -m helpers.finetune.train ")
    resumed = torchrun_command(TINY_DATA, TINY_MODEL, config, config, output_dir=tmp_path, nprocs=1, resume=True)
    assert resumed[-1] == "--resume" and resumed.count("configs/lora.yaml") == 2


def test_lines_come_through_and_the_status_comes_back(capfd):
    status = run_command(
        [sys.executable, "-c", "import sys; print('鱼尾裙'); print('oops', file=sys.stderr); sys.exit(3)"]
    )
    assert status == 3
    out = capfd.readouterr().out
    assert out.startswith("$ ") and "鱼尾裙\n" in out and "oops\n" in out


@pytest.mark.slow
def test_an_interrupt_lets_the_command_end_by_itself():
    child = textwrap.dedent("""
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
        print("ready", flush=True)
        signal.pause()
    """)
    parent = textwrap.dedent(f"""
        import sys
        from helpers.finetune.torchrun import run_command
        print("status", run_command([sys.executable, "-c", {child!r}]), flush=True)
    """)
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("ready"):
                process.send_signal(signal.SIGINT)
    assert lines[-2:] == ["saved", "status 0"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_then_ends_this_process(number):
    child = textwrap.dedent("""
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
        print("ready", os.getpid(), flush=True)
        signal.pause()
    """)
    parent = f"""import sys
from helpers.finetune.torchrun import run_command
run_command([sys.executable, "-c", {child!r}])
print("not reached", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("ready"):
                process.send_signal(number)
    assert lines[-1] == "saved" and process.returncode == -number
    (pid,) = (int(line.split()[1]) for line in lines if line.startswith("ready"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_second_run_gets_a_folder_of_its_own(tmp_path):
    assert fresh_folder(tmp_path, "tiny") == tmp_path / "tiny"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny-2").mkdir()
    assert fresh_folder(tmp_path, "tiny") == tmp_path / "tiny-3"


@pytest.mark.slow
def test_the_main_job_changes_what_the_model_says(
    tmp_path, monkeypatch, capsys, rank_server, on_the_cpu, progress_bars_afterwards
):
    # A quarter of the steps and a tenth of the answers are enough: chapter 14 runs the job as it is, under torchrun.
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    config = yaml.safe_load((configs / "lora_tiny.yaml").read_text(encoding="utf-8")) | {"max_eval_samples": 24}
    config["training_args"] |= {"max_steps": 36, "eval_strategy": "steps", "eval_steps": 36}
    (configs / "lora_tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def fork_ranks(command):
        assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        assert command[4:7] == ["--nproc_per_node=2", "-m", "helpers.finetune.train"]
        finished = rank_server.run(TRAIN, *command[7:], nprocs=2)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.returncode

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "CONFIGS", configs)
    monkeypatch.setattr(demo, "run_command", fork_ranks)
    monkeypatch.setattr(torchrun, "describe_machine", lambda: replace(describe_machine(), gpus=()))
    demo.main()
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "output" / "tiny" / "run.json").read_text())
    assert run["world_size"] == 2 and run["deepspeed"]["zero_optimization"]["stage"] == 2
    scores = run["scores"]
    assert scores["tuned"]["rouge-l"] > scores["base"]["rouge-l"] + 20
    answers = dict(
        line.split(maxsplit=1)
        for line in printed.splitlines()
        if line.startswith(("base  ", "tuned  ")) and "." not in line
    )
    assert answers["base"] and answers["tuned"] and answers["base"] != answers["tuned"]
    for shown in ("loss_and_memory.png", "predictions.jsonl", "checkpoint-"):
        assert shown in printed
