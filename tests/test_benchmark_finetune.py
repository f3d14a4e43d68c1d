"""The benchmark of the 6B fine-tune: what it plans, and that every planned configuration is one the job accepts."""

import signal
import subprocess

import pytest
from load_benchmark import load_benchmark

from helpers.config.compatibility import check_quantization, check_speed
from helpers.config.deepspeed import read_deepspeed_config
from helpers.config.finetune import read_finetune_config


@pytest.fixture(scope="module")
def script():
    return load_benchmark("finetune_6b")


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_way_runs_on_one_gpu_and_on_all(script, gpus):
    runs = script.planned_runs(gpus)
    labels = [script.label_of(run, gpus) for run in runs]
    assert len(set(labels)) == len(labels)
    for way in script.WAYS:
        assert f"{way.name}, 1 GPU" in labels
        assert gpus == 1 or f"{way.name}, {gpus} GPUs" in labels
    batches = list(script.batches(runs, gpus))
    assert [run for batch in batches for run in batch] == runs
    assert all(len(batch) <= gpus and (len(batch) == 1 or {run.ranks for run in batch} == {1}) for batch in batches)


def test_an_interrupted_benchmark_leaves_no_job_behind(script):
    job = subprocess.Popen(["sh", "-c", "sleep 600 & wait"], stdout=subprocess.PIPE, start_new_session=True)
    script.RUNNING.append(job)
    script.kill_all()
    assert job.stdout.read() == b""  # the end of the file: nobody holds it any more
    assert job.wait() == -signal.SIGKILL and not script.RUNNING


def test_the_job_accepts_every_configuration(script, tmp_path):
    for run in script.planned_runs(2):
        config = read_finetune_config(
            script.write_config(tmp_path / "run.yaml", run.config, {"max_steps": 5} | run.training, run.speed)
        )
        deepspeed = read_deepspeed_config(run.deepspeed) if run.deepspeed else None
        check_quantization(config.quantization_bit, deepspeed)
        check_speed(config, deepspeed)
        assert (config.data.val_file is not None) == (run is script.RECORDED_RUN)
        if run.speed is script.PLAIN:
            assert config.speed.loss_chunk is None and config.speed.padding_mask
