"""The benchmark of scaling: two CPU ranks are correct, the job accepts its runs, the pages wait for its results."""

import json
from types import SimpleNamespace

import pytest
from load_benchmark import load_benchmark

from helpers.config.compatibility import check_quantization, check_speed
from helpers.config.deepspeed import read_deepspeed_config
from helpers.config.finetune import read_finetune_config
from helpers.errors import UserError
from helpers.finetune.scaling import scaling_figure, scaling_table

GPU_BYTES = 80 * 10**9


@pytest.fixture(scope="module")
def script():
    return load_benchmark("scaling")


@pytest.fixture(scope="module")
def course(script, tmp_path_factory):
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    only = ["ZeRO-3, N = 2", "FSDP2, N = 2", "meshes"]
    script.main(["--part", "course", "--dry", "2", "--only", *only, "--results", str(path), "--commit", "abc"])
    return path


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_computes(course):
    entries = json.loads(course.read_text(encoding="utf-8"))["course"]
    assert set(entries) == {"ZeRO-3, N = 2", "FSDP2, N = 2", "meshes, N = 2"}
    assert all(entry["largest_difference"] <= 1e-6 for entry in entries.values())
    assert len(entries["meshes, N = 2"]["meshes"]) == 3
    for name in ("ZeRO-3, N = 2", "FSDP2, N = 2"):
        assert entries[name]["states_counted"] == pytest.approx([entries[name]["states_formula"]] * 2, rel=1e-3)


@pytest.mark.slow
def test_resuming_keeps_what_is_there_and_refuses_another_commit(script, course, capsys):
    before = course.read_text(encoding="utf-8")
    options = ["--part", "course", "--dry", "2", "--only", "meshes", "--resume", "--results", str(course)]
    script.main([*options, "--commit", "abc"])
    assert course.read_text(encoding="utf-8") == before and "meshes" not in capsys.readouterr().out
    script.main([*options[:4], "--only", "pipelines", "--resume", *options[-2:], "--commit", "abc", "--seconds", "0"])
    assert "The time is up" in capsys.readouterr().out
    with pytest.raises(UserError, match="is of commit abc, this is def"):
        script.main([*options, "--commit", "def"])


def test_one_line_for_what_cannot_run(script, monkeypatch):
    with pytest.raises(UserError, match="--dry 3: choose 1, 2, 4 or 8"):
        script.main(["--part", "course", "--dry", "3"])
    monkeypatch.setattr(script, "describe_machine", lambda: SimpleNamespace(gpus=[]))
    with pytest.raises(UserError, match="no GPU here; add --dry"):
        script.main(["--part", "job", "checkpoint"])


def test_the_job_accepts_every_run_and_none_shares_a_gpu(script, tmp_path):
    runs = script.scaling_job.planned_runs([1, 2, 4, 8], GPU_BYTES)
    assert len({script.scaling_job.label_of(run) for run in runs}) == len(runs) == 12
    groups = script.side_by_side(runs, 8)
    assert sorted(id(run) for group in groups for run in group) == sorted(map(id, runs))
    assert all(sum(run.ranks for run in group) <= 8 for group in groups)
    tokens = set()
    for run in runs + script.scaling_job.dry_runs(2):
        config = read_finetune_config(
            load_benchmark("jobs_6b").write_config(tmp_path / "run.yaml", run.config, run.training, run.speed)
        )
        deepspeed = read_deepspeed_config(run.deepspeed) if run.deepspeed else None
        check_quantization(config.quantization_bit, deepspeed)
        check_speed(config, deepspeed)
        if config.speed.packing:
            training = run.training
            rows = training.get("per_device_train_batch_size", 1) * training["gradient_accumulation_steps"] * run.ranks
            tokens.add(rows * config.speed.packing)
    assert tokens == {32768}


def test_first_losses_that_differ_are_an_error(script):
    entries = {f"LoRA, N = {n}": {"name": "LoRA", "loss": [loss]} for n, loss in ((1, 2.0), (2, 2.001), (4, 3.0))}
    with pytest.raises(UserError, match=r"LoRA, N = 4: first loss 3\.0000, LoRA, N = 1: 2\.0000"):
        script.scaling_job.check_equality(entries)


def job_run(name, ranks, rate):
    return {
        "name": name,
        "ranks": ranks,
        "tokens_per_second_per_gpu": rate,
        "tokens_per_second_per_gpu_range": [rate - 1, rate + 1],
        "share_of_product_rate": 0.5,
        "nvml_before_gib": [0.5] * ranks,
        "nvml_peak_gib": [20.5] * ranks,
    }


def test_the_line_of_a_run_shows_gpu_memory_only_where_there_is_a_gpu(script):
    assert script.line_of("LoRA", job_run("LoRA", 1, 1000.0)).endswith("matmul's rate; NVML 20.50 GiB")
    assert "NVML" not in script.line_of("LoRA", job_run("LoRA", 0, 1000.0))


def test_the_table_and_the_figure_show_what_was_measured():
    runs = [job_run("LoRA, bf16", 1, 1000.0), job_run("LoRA, bf16", 4, 900.0)]
    runs.append(job_run("full fine-tuning, published recipe", 4, 300.0))
    machine = {"gpus": [{"name": "a GPU"}] * 4, "versions": {"torch": "2"}}
    results = {"machine": machine, "random_weights": True, "product_tflops": 700.0}
    results["job"] = {f"{run['name']}, N = {run['ranks']}": run for run in runs} | {"broken": {"failed": "why"}}
    table = scaling_table(results)
    assert "| LoRA, bf16 | 4 | 900 (899 to 901) | 90% | 50% | 20.00 |" in table
    assert "48,346 MiB on each of four GPUs; here 20,480" in table
    left, right = scaling_figure(results).axes
    (curve,) = (line for line in left.lines if line.get_label() == "LoRA, bf16")
    assert list(curve.get_xdata()) == [1, 4] and list(curve.get_ydata()) == [1000.0, 900.0]
    assert [line.get_label() for line in right.lines] == ["LoRA, bf16", "full fine-tuning, published recipe"]


def test_nothing_is_drawn_before_the_job_was_measured():
    results = {"job": {"LoRA, N = 1": {"failed": "why"}}}
    assert scaling_table(results).startswith("Not measured yet")
    with pytest.raises(UserError, match="no run of the job"):
        scaling_figure(results)
