"""The benchmark of predictions, on the CPU: its training function in a group of one rank, and what it records."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from load_benchmark import load_benchmark

from helpers.hardware import Gpu, describe_machine
from helpers.launch import RankError
from helpers.memory.predict import ModelShape, predict

TINY = ModelShape(hidden=64, layers=2, heads=4, kv_groups=2, head_dim=16, intermediate=96, vocab=512)
# DeepSpeed would change torch for the whole test process; the benchmark starts it in processes of their own.
NAMES = (
    "full, fp32",
    "full, autocast, checkpointing",
    "full, 16-bit weights",
    "full, autocast, DDP",
    "LoRA, autocast, rows differ",
    "6B LoRA, DDP, checkpointing",
)


@pytest.fixture(scope="module")
def script():
    return load_benchmark("prediction")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny(configuration):
    return dataclasses.replace(configuration, shape=TINY, micro_batch_size=2, sequence_length=32)


def test_at_least_fourteen_configurations_that_can_all_be_predicted(script):
    chosen = script.configurations(world_size=2)
    assert len(chosen) >= 14
    assert len({predict(c).peak_phase for c in chosen.values()}) > 2
    assert max(predict(c).total for c in chosen.values()) < 40 * 2**30


@pytest.mark.parametrize("name", NAMES)
def test_training_takes_its_steps(script, one_rank, name):
    configuration = tiny(script.configurations(world_size=1)[name])
    outcome = script.train(configuration)
    assert len(outcome["losses"]) == (len(script.VARYING) if configuration.padded else script.STEPS)
    assert all(0.5 < loss / math.log(TINY.vocab) < 2 for loss in outcome["losses"])
    assert outcome["trained_parameters"] == configuration.trainable_parameters
    assert outcome["expandable"] is False


def test_rows_differ_where_they_should(script):
    configuration = tiny(script.configurations(world_size=1)["LoRA, autocast, rows differ"])
    lengths = [script.batch(configuration, step, "cpu")["input_ids"].shape[1] for step in range(6)]
    assert max(lengths) == 32 and len(set(lengths)) > 3
    mask = script.batch(configuration, 1, "cpu")["attention_mask"]
    assert mask[0].sum() > mask[1].sum()


def test_the_record_compares_with_the_fullest_rank(script):
    configuration = script.configurations(world_size=2)["full, autocast, DDP"]
    total = predict(configuration).total
    measured = [{"allocated": 1, "reserved": 1, "nvml": size} for size in (total // 4, total // 2)]
    outcome = {"losses": [], "trained_parameters": configuration.trainable_parameters, "expandable": False}
    entry = script.record(configuration, measured, outcome)
    assert entry["error_percent"] == pytest.approx(100, abs=0.01)
    assert sum(entry["predicted"].values()) == entry["predicted_total"] == total
    assert "NVML" in script.line("full", entry)


def test_ranks_inherit_the_allocator_that_is_measured(script, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    for expandable, value in ((True, "expandable_segments:True"), (False, None)):
        with script.allocator(expandable):
            assert [os.environ.get(name) for name in script.ALLOCATOR_VARIABLES] == [value, value]
        assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_a_failure_does_not_lose_the_other_configurations(script, monkeypatch, tmp_path, capsys):
    def run(function, ranks, configuration=None, timeout=None):
        if configuration is None:
            return None
        if configuration.lora is None and configuration.expandable_segments:
            raise RankError("rank 0 of 1 raised", rank=0, details="OutOfMemoryError")
        rank = SimpleNamespace(allocated=2**30, reserved=2**30, nvml=2**30)
        outcome = {"losses": [1.0], "trained_parameters": configuration.trainable_parameters}
        outcome["expandable"] = configuration.expandable_segments
        return SimpleNamespace(results=[outcome], memory=SimpleNamespace(ranks=[rank]))

    path = tmp_path / "prediction.json"
    machine = dataclasses.replace(describe_machine(), gpus=(Gpu("a GPU", 80 * 2**30, (9, 0)),))
    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "describe_machine", lambda: machine)
    monkeypatch.setattr("sys.argv", ["prediction.py", "--results", str(path)])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    entries = json.loads(path.read_text(encoding="utf-8"))["configurations"]
    failed = [entry for entry in entries.values() if "failed" in entry]
    assert failed and len(failed) < len(entries)
    assert all(entry["default_allocator"]["measured"] for entry in entries.values())
    passed = next(entry for entry in entries.values() if "failed" not in entry)
    assert passed["expandable"] and not passed["default_allocator"]["expandable"]
    assert "failed: OutOfMemoryError" in capsys.readouterr().out
