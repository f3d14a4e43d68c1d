"""What a machine's libraries take of a GPU: measured once, stored by the machine's name, used by predictions."""

import dataclasses

import pytest

from helpers.finetune import calibrate
from helpers.memory.predict import Configuration, Strategy, machine, predict
from helpers.memory.predict.__main__ import main
from helpers.memory.predict.machine import MachineConstants, cache_file, calibrated, store
from helpers.memory.units import GIB

MEASURED = MachineConstants(cuda_context=GIB // 2, nccl_one_rank=3, nccl_several_ranks=GIB, cublas_workspace=2**20)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A machine with a GPU, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "machine_name", lambda: "host: a GPU")
    monkeypatch.setattr(calibrate, "machine_name", lambda: "host: a GPU")


def test_without_a_calibration_the_constants_are_those_of_h100s(on_a_gpu):
    assert calibrated() == MachineConstants() == Configuration().machine


def test_a_calibration_is_used_on_its_own_machine_only(on_a_gpu, monkeypatch):
    store("another: a GPU", MEASURED)
    assert calibrated() == MachineConstants()
    store("host: a GPU", MEASURED)
    assert calibrated() == MEASURED
    monkeypatch.setattr(machine, "machine_name", lambda: None)
    assert calibrated() == MachineConstants()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host: a GPU": {"older": 1}}'])
def test_a_file_that_cannot_be_used_is_as_good_as_none(on_a_gpu, text):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text, encoding="utf-8")
    assert calibrated() == MachineConstants()


@pytest.mark.parametrize(("strategy", "nccl"), [(Strategy(), 0), (Strategy("ddp"), 3), (Strategy("ddp", 2), GIB)])
def test_predictions_take_them(strategy, nccl):
    usual = predict(Configuration(strategy=strategy))
    items = predict(Configuration(strategy=strategy, machine=MEASURED)).items
    assert items["CUDA context"] == GIB // 2 and items["NCCL"] == nccl
    assert usual.items["buffers"] - items["buffers"] == 2 * (32 * 2**20 - 2**20)
    assert usual.items["activations"] == items["activations"]


def test_the_command_predicts_with_them(on_a_gpu, capsys):
    store("host: a GPU", MEASURED)
    main(["--gpus", "2"])
    assert f"  {'NCCL':<24}{1:>8.2f}" in capsys.readouterr().out


def test_the_calibration_is_written_and_shown(on_a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "calibrate", lambda world_size: MEASURED)
    calibrate.main([])
    out = capsys.readouterr().out
    assert "cuda context              512 MiB" in out and str(cache_file()) in out
    assert calibrated() == MEASURED
    assert dataclasses.asdict(calibrated()).keys() == dataclasses.asdict(MachineConstants()).keys()


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "machine_name", lambda: None)
    calibrate.main([])
    assert capsys.readouterr().out == "no GPU here: nothing to calibrate\n"
