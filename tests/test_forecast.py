"""A job's memory before its weights are loaded: printed, refused if it cannot fit, compared with NVML at the end."""

import dataclasses
import json
import re

import pytest
from small_finetune import ONE_RANK, prepare, write_config, write_rows

from helpers.errors import UserError
from helpers.finetune import forecast as forecasts
from helpers.finetune import train
from helpers.finetune.forecast import forecast, forecast_or_reason
from helpers.finetune.row_lengths import read_row_lengths, row_lengths
from helpers.finetune.run_folder import RunFile, peaks_and_phase
from helpers.hardware import Gpu
from helpers.memory.predict import ModelShape, machine, predict
from helpers.memory.predict.lengths import StepLengths, step_lengths
from helpers.memory.timeline import GpuCurve, Timeline
from helpers.memory.units import GIB


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch):
    """The constants of H100s, whatever was measured on this machine."""
    monkeypatch.setattr(machine, "machine_name", lambda: None)


@pytest.fixture
def job_on(tmp_path, small_checkpoint, monkeypatch):
    """A job with the 6B model's sizes on a GPU of so many GiB; None for no GPU."""
    monkeypatch.setattr(forecasts, "read_shape", lambda _: ModelShape())

    def make(gib, **changes):
        data = write_rows(tmp_path, train=30, dev=1)
        prepared = prepare(data, small_checkpoint, write_config(tmp_path, max_output_length=512, **changes))
        gpus = () if gib is None else (Gpu("a GPU", int(gib * GIB), (9, 0)), Gpu("a larger one", 2**40, (9, 0)))
        machine = dataclasses.replace(prepared.machine, gpus=gpus)
        return dataclasses.replace(prepared, machine=machine, precision="bf16")

    return make


@pytest.mark.parametrize(
    ("lengths", "rows", "wanted"),
    [
        ([7], 4, StepLengths(7, 7)),
        (range(1, 101), 1, StepLengths(50, 100)),
        (range(1, 101), 2, StepLengths(71, 100)),  # 0.71 squared is a half
        (range(1, 101), 100, StepLengths(100, 100)),
        ([90, 10, 10, 10], 1, StepLengths(10, 90)),
    ],
)
def test_a_typical_micro_batch_is_as_long_as_half_of_them(lengths, rows, wanted):
    assert step_lengths(lengths, rows) == wanted


def test_worst_and_typical_step_come_from_the_rows(job_on):
    job = job_on(80)
    lengths = row_lengths(job.data.train)
    assert lengths == list(map(len, job.data.train["input_ids"][:]))
    found = forecast(job, world_size=2)
    assert found.worst.sequence_length == max(lengths) > found.typical.sequence_length
    assert found.worst.strategy.world_size == 2
    assert found.prediction.total > predict(found.typical).total
    assert found.gpu_bytes == 80 * GIB  # the smallest


def test_packs_are_all_alike(job_on):
    found = forecast(job_on(80, speed={"packing": 4096}), 1)
    assert found.worst == found.typical and found.worst.sequence_length == 4096


@pytest.mark.parametrize(("gib", "place"), [(80, "the smallest GPU has 80.0 GiB"), (None, "no GPU here")])
def test_the_prediction_is_printed_next_to_the_gpu(gib, place, job_on):
    found, lines = forecast_or_reason(job_on(gib), 1, force=False)
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"GPU memory: {number} GiB predicted \({number} to {number}\) in the worst step, of \d+ tokens per row; "
        rf"{number} in a typical one, of \d+; {place}",
        lines[0],
    )
    assert lines[1].startswith("GPU memory: parameters 11.6, ")
    content = found.content()
    assert content["total_gib"] == pytest.approx(sum(content["items_gib"].values()))
    assert content["least_gib"] < content["total_gib"] < content["most_gib"] and content["gpu_gib"] == gib


def test_use_cpu_looks_at_no_gpu(job_on):
    assert forecast(job_on(1, training_args={"use_cpu": True}), 1).gpu_bytes is None


def test_what_cannot_fit_is_refused_with_what_would(job_on):
    job = job_on(24, training_args={"per_device_train_batch_size": 64})
    with pytest.raises(UserError, match=r"cannot fit: .* activations .*what would fit: gradient_check.*--force tries"):
        forecast_or_reason(job, 1, force=False)
    found, lines = forecast_or_reason(job, 1, force=True)
    assert found and lines[-1].startswith("warning: this job cannot fit")


def test_within_the_error_bar_it_is_tried(job_on):
    needed = forecast(job_on(80), 1)
    found, lines = forecast_or_reason(job_on((needed.least + 2**20) / GIB), 1, force=False)
    assert found and len(lines) == 2
    with pytest.raises(UserError, match="cannot fit"):
        forecast_or_reason(job_on((needed.least - 2**20) / GIB), 1, force=False)


def test_a_job_that_no_prediction_covers_is_named(job_on):
    found, (line,) = forecast_or_reason(
        job_on(1, peft_config={"target_modules": ["q_proj", "lm_head"]}), 1, force=False
    )
    assert found is None and line.startswith("GPU memory: not predicted: Lora: target 'lm_head'")


def test_the_end_compares_with_the_fullest_gpu(job_on):
    found = forecast(job_on(80), 1)
    predicted = found.prediction.total / GIB
    line = found.compared_with([predicted / 2, predicted / 1.1])
    assert line == f"GPU memory: {predicted:.2f} GiB predicted, {predicted / 1.1:.2f} at NVML's peak (+10.0 %)"
    assert found.compared_with([predicted / 2, predicted / 1.1], "train") == line
    evaluated = found.compared_with([predicted / 2, predicted / 1.1], "evaluate")
    assert evaluated == f"{line}; the peak came in the phase 'evaluate', and the prediction is for training steps"


@pytest.mark.parametrize(("training", "peak"), [({}, 1), ({"use_cpu": True}, 9)])
def test_a_job_that_took_no_memory_of_a_gpu_is_not_compared(training, peak, job_on, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw_figures", lambda *_: None)
    job = dataclasses.replace(job_on(80, training_args=training), output_dir=tmp_path)
    timeline = Timeline(100.0, 10.0, [GpuCurve(0, "H100", 80, [1.0, 5.0], [1, peak])], None)
    run_file = RunFile(tmp_path / "run.json", ONE_RANK, {"status": "interrupted"})
    train._finish(job, run_file, timeline, None, forecast(job, 1))
    assert capsys.readouterr().out.startswith(f"written to {tmp_path}: ")


def test_the_phase_of_the_peak_is_the_innermost_one_of_the_fullest_gpus_rank(tmp_path):
    def mark(rank, *marks):
        lines = [{"event": e, "name": n, "rank": rank, "time": t, "pid": 1} for e, n, t in marks]
        (tmp_path / f"phases-{rank:03}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    mark(0, ("begin", "train", 100), ("end", "train", 110))
    mark(1, ("begin", "train", 100), ("begin", "evaluate", 104), ("end", "evaluate", 106), ("end", "train", 110))
    curves = [GpuCurve(0, "H100", 80, [1.0, 5.0], [1, 2]), GpuCurve(1, "H100", 80, [1.0, 5.0, 7.0], [1, 9, 9])]
    timeline = Timeline(100.0, 10.0, curves, None)
    assert peaks_and_phase(tmp_path, timeline) == ([1 / GIB, 8 / GIB], "evaluate")
    assert peaks_and_phase(tmp_path, dataclasses.replace(timeline, gpus=curves[:1]))[1] == "train"
    assert peaks_and_phase(tmp_path, dataclasses.replace(timeline, start=200.0))[1] is None


def test_row_lengths_of_a_folder_are_those_of_the_job(tmp_path, data_dir, small_checkpoint):
    config = write_config(tmp_path)
    lengths = row_lengths(prepare(data_dir, small_checkpoint, config).data.train)
    assert read_row_lengths(data_dir, config, small_checkpoint) == (lengths, None)
    counted, note = read_row_lengths(data_dir, config, None)
    assert len(counted) == len(lengths) and "--model" in note
