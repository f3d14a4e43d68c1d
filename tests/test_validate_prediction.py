"""The validation of predictions: its list is fixed, and it runs from end to end on a CPU."""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from load_benchmark import load_benchmark

from helpers.hardware import Gpu, describe_machine
from helpers.memory.measured import RankMemory
from helpers.memory.predict.error_bar import error_bar

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import prediction_cases
from prediction_cases import CONFIGS, as_json, cases

CASES = cases()


@pytest.fixture(scope="module")
def script():
    return load_benchmark("validate_prediction")


def test_the_list_is_the_one_that_was_committed_before_anything_was_measured():
    assert json.loads(CONFIGS.read_text()) == as_json(CASES)


def test_the_list_covers_what_it_should():
    drawn = [case.configuration for case in CASES.values()]
    assert len(drawn) >= 60
    assert sum(c.strategy.world_size == 2 for c in drawn) >= len(drawn) / 2
    assert sum(case.held_out for case in CASES.values()) >= 15
    assert [case.capacity for case in CASES.values() if case.capacity] and max(
        abs(share - 1) for share in prediction_cases.CAPACITIES
    ) <= 0.03 + 1e-9
    assert {c.strategy.kind for c in drawn} == {"single", "ddp", "zero-1", "zero-2", "zero-3"}
    for one in (
        lambda c: c.lora is None,
        lambda c: c.checkpointing,
        lambda c: c.compiled,
        lambda c: c.packed,
        lambda c: c.padded,
        lambda c: c.loss_chunk is not None,
        lambda c: c.strategy.offload_optimizer,
        lambda c: c.expandable_segments,
        lambda c: c.precision == "autocast",
    ):
        assert any(map(one, drawn)) and not all(map(one, drawn))
    assert {c.micro_batch_size for c in drawn} == {1, 2, 4, 8, 16}
    assert {c.sequence_length for c in drawn} >= {256, 512, 1024, 2048, 4096, 8192}


def in_this_process(fn, nprocs, timeout, **arguments):
    """What ``run`` does, for one rank, without starting it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        result = fn(**arguments)
    finally:
        dist.destroy_process_group()
    rank = RankMemory(allocated=None, reserved=None, nvml=None, resident=0)
    return SimpleNamespace(results=[result], memory=SimpleNamespace(ranks=[rank]), seconds=1.0, start_seconds=0.0)


def test_it_runs_from_end_to_end_and_goes_on_where_it_was(script, tmp_path, capsys, monkeypatch):
    path = tmp_path / "results.json"
    packed, padded = (
        next(
            n
            for n, c in CASES.items()
            if n.startswith("1 x single") and c.configuration.lean and found(c.configuration)
        )
        for found in (lambda c: c.packed, lambda c: c.padded)
    )
    monkeypatch.setattr(script, "run", in_this_process)
    script.main(["--dry", "--results", str(path), "--commit", "abc", "--cases", packed, padded])
    entries = json.loads(path.read_text())["configurations"]
    assert entries.keys() == {packed, padded}
    for name, entry in entries.items():
        assert entry["commit"] == "abc"
        assert entry["held_out"] == CASES[name].held_out and entry["error_percent"] is None  # no GPU
        assert all(rank["parameters"] > rank["optimizer states"] > 0 for rank in entry["measured"])
        assert sum(entry["predicted"].values()) == entry["predicted_total"]
    capsys.readouterr()
    monkeypatch.delattr(script, "run")
    script.main(["--dry", "--resume", "--results", str(path), "--cases", packed])
    assert capsys.readouterr().out == ""  # nothing left to do


def measured(script, name, factor):
    """An entry whose fullest rank needed ``factor`` of the prediction."""
    configuration = CASES[name].configuration
    predicted = script.benchmark.predict(configuration)
    rank = {
        "allocated": predicted.allocated,
        "reserved": int(predicted.reserved * factor),
        "nvml": int(predicted.total * factor),
        "parameters": 0,
        "optimizer states": 0,
    }
    outcome = {"losses": [], "expandable": True, "trained_parameters": configuration.trainable_parameters}
    return script.benchmark.record(configuration, [rank], outcome) | {"held_out": CASES[name].held_out}


def test_the_summary_names_errors_and_verdicts(script):
    names = list(CASES)[:4]
    factors = (1.0, 0.98, 1.01, 1.05)
    entries = {name: measured(script, name, factor) for name, factor in zip(names, factors, strict=True)}
    limit = entries[names[0]]["predicted_reserved"]
    entries[names[0]]["limited"] = {"limit": limit + 1, "fitted": True}
    entries[names[1]]["limited"] = {"limit": limit * 2, "fitted": False}
    lines = script.summary(entries | {"broken": {"failed": "Traceback\nRuntimeError: no"}})
    errors = [100 / factor - 100 for factor in factors]
    assert lines[0].startswith(f"all: 4 cases, median error {statistics.median(map(abs, errors)):.2f} %")
    assert "near the capacity: 1 of 2 verdicts right" in lines
    assert lines[-1] == "  failed: broken: RuntimeError: no"


@pytest.mark.parametrize("kind", ["zero-2, offload", "zero-3"])
def test_error_bars_cover_full_training_that_left_many_free_blocks(kind):
    results = json.loads(CONFIGS.with_name("prediction_validation.json").read_text())["configurations"]
    chosen = {n: e for n, e in results.items() if kind in n and "full" in n and "failed" not in e}
    assert chosen
    for name, entry in chosen.items():
        bar, needed = error_bar(CASES[name].configuration), max(rank["nvml"] for rank in entry["measured"])
        assert bar.least(entry["predicted_total"]) <= needed <= bar.most(entry["predicted_total"])


def test_parts_are_joined(script, tmp_path):
    whole, parts = tmp_path / "all.json", [tmp_path / "0.json", tmp_path / "1.json"]
    for number, part in enumerate(parts[:1]):
        script.benchmark.write(part, {"configurations": {f"case {number}": {}}})
    script.benchmark.write(whole, {"configurations": {"before": {}}})
    script.join(whole, parts)
    assert script.read(whole) == {"before": {}, "case 0": {}}
    assert not any(part.exists() for part in parts)


def test_an_interrupted_run_goes_on_with_the_held_out_cases_first(script, tmp_path, monkeypatch):
    path, asked = tmp_path / "all.json", []
    first, *_ = script.parts_of(path, 2)
    done, failed = [n for n, case in script.held_out_first(CASES).items() if n.startswith("1 x") and case.held_out][:2]
    script.benchmark.write(first, {"configurations": {done: {}, failed: {"failed": "x"}}})
    two_gpus(script, monkeypatch)
    monkeypatch.setattr(script, "side_by_side", lambda cases, *_: asked.extend(cases.values()))
    monkeypatch.setattr(script, "work_through", lambda cases, *_: asked.extend(cases.values()))
    script.main(["--resume", "--results", str(path)])
    assert script.read(path).keys() == {done, failed} and not first.exists()
    assert len(asked) == len(CASES) - 1 and CASES[done] not in asked
    for ranks in (1, 2):
        of_ranks = [case for case in asked if case.configuration.strategy.world_size == ranks]
        if ranks == 1:
            assert of_ranks.pop() == CASES[failed]  # it may fail again
        order = [(not case.held_out, case.configuration.compiled) for case in of_ranks]
        assert order == sorted(order)


def two_gpus(script, monkeypatch):
    gpus = (Gpu("H100", 80 * 2**30, (9, 0)),) * 2
    monkeypatch.setattr(script, "describe_machine", lambda: dataclasses.replace(describe_machine(), gpus=gpus))


def test_a_gpu_for_which_no_case_is_left_gets_no_process(script, tmp_path, monkeypatch):
    path, started = tmp_path / "all.json", []
    two_gpus(script, monkeypatch)
    monkeypatch.setattr(script, "start_server", lambda: None)

    def start(command, env):
        started.append((env["CUDA_VISIBLE_DEVICES"], command[command.index("--commit") + 1 :]))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(Popen=start))
    one = next(n for n in CASES if n.startswith("1 x"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    script.side_by_side({one: CASES[one]}, 2, path, 1.0, "abc")
    assert started == [("4", ["abc", "--cases", one])]
    together = []
    monkeypatch.setattr(script, "work_through", lambda cases, *_: together.extend(cases))
    script.benchmark.write(path, {"configurations": {n: {} for n in CASES if n.startswith("1 x")}})
    monkeypatch.setattr(script, "summary", lambda _: [])
    script.main(["--resume", "--results", str(path)])
    assert len(started) == 1 and together == [n for n in script.held_out_first(CASES) if n.startswith("2 x")]


def test_a_case_that_fails_unexpectedly_does_not_end_the_others(script, monkeypatch):
    def run(*_, **__):
        raise AssertionError("not the number of parameters that was predicted")

    monkeypatch.setattr(script, "run", run)
    case = next(case for case in CASES.values() if case.capacity)
    entry = script.measure(case)
    assert entry == {
        "failed": "AssertionError: not the number of parameters that was predicted",
        "held_out": case.held_out,
    }


def test_recorded_runs_are_predicted_again(script):
    configuration = script.tiny(CASES[next(n for n in CASES if n.startswith("1 x single, 2 layers"))].configuration)
    predicted = script.benchmark.predict(configuration)
    rank = {"allocated": predicted.allocated, "reserved": predicted.reserved, "nvml": predicted.total}
    entry = {"losses": [], "expandable": True, "measured": [rank], "error_percent": 2.0}
    found = script.again(entry, configuration)
    assert (found["error_percent"], found["first_error_percent"]) == (0, 2.0)
    assert script.again({"failed": "x"}, configuration) == {"failed": "x"}


def test_the_allocator_is_simulated_where_it_can_be(script, tmp_path, capsys):
    alone = next(n for n in CASES if n.startswith("1 x single, 2 layers"))
    plain = dataclasses.replace(CASES[alone], configuration=script.tiny(CASES[alone].configuration))
    compiled = dataclasses.replace(plain, configuration=dataclasses.replace(plain.configuration, compiled=True))
    script.write_traces({"plain": plain, "compiled": compiled}, tmp_path / "traces.json")
    (found,) = json.loads((tmp_path / "traces.json").read_text())["configurations"].values()
    assert found["reserved"] >= found["allocated"] > 0
    assert "plain" in capsys.readouterr().out
