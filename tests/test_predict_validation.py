"""The committed errors of predictions, as chapter 01 reads them."""

import json

import pytest

from helpers.errors import UserError
from helpers.memory.predict.validation import ADDED_LATER, item_errors, read_validation

TENSORS = {"parameters": 40, "optimizer states": 20, "CUDA context": 5, "NCCL": 3, "allocator allowance": 2}


def entry(**changes):
    """A configuration on two GPUs, the second of which is fuller than predicted."""
    rank = {"allocated": 60, "reserved": 65, "nvml": 73}
    fuller = {"allocated": 61, "reserved": 70, "nvml": 80, "parameters": 40, "optimizer states": 22}
    return {
        "configuration": {"strategy": {"kind": "ddp"}},
        "predicted": TENSORS,
        "predicted_total": 76,
        "predicted_allocated": 66,
        "measured": [rank, fuller],
        "held_out": True,
    } | changes


def write(folder, name, configurations):
    (folder / name).write_text(json.dumps({"configurations": configurations}))


def test_the_fullest_gpu_and_every_item_count(tmp_path):
    write(tmp_path, "prediction_validation.json", {"a": entry(), "b": {"failed": "Traceback"}})
    (run,) = read_validation(tmp_path)
    assert (run.name, run.ranks, run.held_out, run.predicted, run.measured) == ("a", 2, True, 76, 80)
    assert run.error_percent == pytest.approx(-5)
    assert run.item_errors == {
        "parameters": 0,
        "optimizer states": -2,
        "all tensors": 5,
        "allocator allowance": -7,
        "CUDA context and NCCL": -2,
    }
    assert run.worst_item == "allocator allowance" and run.traced_error_percent is None


def test_a_traced_run_has_a_second_error(tmp_path):
    write(tmp_path, "prediction_validation.json", {"a": entry(predicted_reserved=68), "b": entry()})
    write(tmp_path, "prediction_traced.json", {"a": {"allocated": 60, "reserved": 70}, "not measured": {"reserved": 1}})
    run, untraced = read_validation(tmp_path)
    # 8 are outside of torch.
    assert (run.error_percent, run.traced_error_percent) == (pytest.approx(-5), pytest.approx(-2.5))
    assert untraced.traced is None


def test_under_zero_the_fp32_weights_are_not_among_the_measured_states():
    sharded = entry(configuration={"strategy": {"kind": "zero-2"}}, predicted=TENSORS | {"optimizer states": 33})
    assert item_errors(sharded)["optimizer states"] == 0  # 22 were measured


def test_without_a_validation_the_older_file_counts(tmp_path):
    with pytest.raises(UserError, match=r"no measurements in .*prediction.json"):
        read_validation(tmp_path)
    older = {key: value for key, value in entry().items() if key != "held_out"}
    older["measured"] = older["measured"][:1]
    write(tmp_path, "prediction.json", {"plain": older, ADDED_LATER[0]: older})
    plain, later = read_validation(tmp_path)
    assert (plain.held_out, later.held_out, plain.ranks) == (False, True, 1)
    assert "parameters" not in item_errors(older)


def test_a_run_without_a_gpu_says_nothing(tmp_path):
    rank = {"allocated": None, "reserved": None, "nvml": None}
    write(tmp_path, "prediction_validation.json", {"dry": entry(measured=[rank])})
    assert read_validation(tmp_path) == []
