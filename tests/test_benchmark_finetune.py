"""The benchmarks of the 6B fine-tune: what they plan, and that every planned configuration is one the job accepts."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from load_benchmark import load_benchmark
from small_finetune import TRAIN

from helpers.assets import TINY_MODEL
from helpers.config.compatibility import check_quantization, check_speed
from helpers.config.deepspeed import read_deepspeed_config
from helpers.config.finetune import read_finetune_config
from helpers.errors import UserError
from helpers.finetune.recorder import read_metrics
from helpers.finetune.results import RESULTS, TIMELINE


@pytest.fixture(scope="module")
def script():
    return load_benchmark("finetune_6b")


@pytest.fixture(scope="module")
def speed():
    return load_benchmark("speed_6b")


@pytest.fixture(scope="module")
def jobs():
    return load_benchmark("jobs_6b")


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_way_runs_on_one_gpu_and_on_all(script, jobs, gpus):
    runs = script.planned_runs(gpus)
    labels = [script.label_of(run) for run in runs]
    assert len(set(labels)) == len(labels)
    for way in script.WAYS:
        assert f"{way.name}, 1 GPU" in labels
        assert gpus == 1 or f"{way.name}, {gpus} GPUs" in labels
    assert gpus == 1 or {f"{run.name}, {gpus} GPUs" for run in script.ON_ALL_GPUS} <= set(labels)
    groups = jobs.side_by_side(runs, gpus)
    assert [run for group in groups for run in group] == runs
    assert all(sum(run.ranks for run in group) <= gpus for group in groups)


def test_the_recorded_run_goes_beside_the_results_where_its_readers_look(script):
    assert script.timeline_of(RESULTS) == TIMELINE


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_the_speed_benchmark_divides_the_same_packs_between_all_gpus(speed, gpus):
    runs = {run.name: run for run in speed.planned_runs(gpus)}
    assert len(runs) == len(speed.planned_runs(gpus))
    for name in ("8 packs a step, every GPU", "fp8, 8 packs a step, every GPU"):
        assert runs[name].ranks * runs[name].training["gradient_accumulation_steps"] == 8
    assert all(run.ranks == 1 for name, run in runs.items() if "every GPU" not in name)
    assert set(speed.PROFILED) <= set(runs)


@pytest.mark.slow
def test_fsdp2_trains_as_ddp_does(jobs, rank_server, tmp_path):
    jobs.write_rows(tmp_path)
    few = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    config = jobs.write_config(tmp_path / "run.yaml", "lora_tiny.yaml", few, {})
    losses = []
    for script in (TRAIN, Path(jobs.__file__).with_name("fsdp2_train.py")):
        output = tmp_path / script.stem
        done = rank_server.run(script, tmp_path, TINY_MODEL, config, "--output-dir", output, nprocs=2)
        assert done.returncode == 0, done.stderr
        losses.append([record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_name_that_is_in_no_label_is_refused(jobs):
    runs = {"DDP, 1 GPU": jobs.Run("DDP"), "DDP, 2 GPUs": jobs.Run("DDP", ranks=2)}
    assert jobs.choose(runs, None) == runs and list(jobs.choose(runs, ["2 GPUs"])) == ["DDP, 2 GPUs"]
    with pytest.raises(UserError, match=r"--only 'ZeRO' is in no label of a run; the labels are: DDP, 1 GPU; DDP, 2"):
        jobs.choose(runs, ["DDP", "ZeRO"])


def test_what_an_interrupted_benchmark_measured_is_kept_unless_the_code_is_another(jobs, tmp_path):
    path = tmp_path / "results.json"
    assert jobs.kept_runs(path, "abc") == {}
    runs = {"a": {"rate": 1.5, "machine": {"gpus": 2}}, "b": {"rate": 2.5, "machine": {"gpus": 2}}}
    jobs.write_results(path, TINY_MODEL, runs, commit="abc")
    assert jobs.kept_runs(path, "abc") == runs and json.loads(path.read_text(encoding="utf-8"))["random_weights"]
    with pytest.raises(UserError, match="is of commit abc; start again without --resume"):
        jobs.kept_runs(path, "def")


def test_an_interrupted_benchmark_leaves_no_job_behind(jobs):
    job = subprocess.Popen(["sh", "-c", "sleep 600 & wait"], stdout=subprocess.PIPE, start_new_session=True)
    jobs.RUNNING.append(job)
    jobs.kill_all()
    assert job.stdout.read() == b""  # the end of the file: nobody holds it any more
    assert job.wait() == -signal.SIGKILL and not jobs.RUNNING


def test_the_job_accepts_every_configuration(script, speed, jobs, tmp_path):
    for run in (*script.planned_runs(2), *speed.planned_runs(2), *speed.LONG):
        config = read_finetune_config(
            jobs.write_config(tmp_path / "run.yaml", run.config, {"max_steps": 5} | run.training, run.speed)
        )
        deepspeed = read_deepspeed_config(run.deepspeed) if run.deepspeed else None
        check_quantization(config.quantization_bit, deepspeed)
        check_speed(config, deepspeed)
        assert (config.data.val_file is not None) == (run.name == script.RECORDED)
        if run.speed == jobs.PLAIN:
            assert config.speed.loss_chunk is None and config.speed.padding_mask
