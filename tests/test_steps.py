"""The number of steps, before training and after it."""

import json
from pathlib import Path

import pytest

from helpers.errors import UserError
from helpers.finetune.steps import check_completed, check_rows_fill_a_batch, check_scored, finished_line, planned_steps


@pytest.mark.parametrize(
    ("training", "rows", "ranks", "wanted"),
    [
        ({"max_steps": 5, "per_device_train_batch_size": 4}, 40, 1, 5),
        ({"max_steps": 5, "per_device_train_batch_size": 64, "dataloader_drop_last": True}, 40, 1, 0),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 4, "dataloader_drop_last": True}, 7, 2, 0),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 4}, 7, 2, 1),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4}, 41, 2, 12),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": True}, 47, 2, 10),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 40, 1, 8),
    ],
)
def test_steps_are_counted_as_the_trainer_makes_them(training, rows, ranks, wanted):
    assert planned_steps(training, rows, ranks) == wanted
    if wanted:
        check_rows_fill_a_batch(wanted, training, rows, ranks)
    else:
        with pytest.raises(
            UserError, match=rf"{rows} rows fill no batch of \d+ on each of {ranks} rank\(s\); remove it"
        ):
            check_rows_fill_a_batch(wanted, training, rows, ranks)


def test_a_training_that_ended_early_is_an_error():
    check_completed(4, 4)
    with pytest.raises(UserError, match="ended after step 3 of 4"):
        check_completed(3, 4)


def test_a_finished_run_has_nothing_to_do():
    last = Path("output/checkpoint-4")
    assert finished_line(None, {"max_steps": 4}, 4) is None
    assert finished_line(Path("output/checkpoint-2"), {"max_steps": 4}, 4) is None
    line = finished_line(last, {"max_steps": 4}, 4)
    assert line == f"finished: {last} is the last of 4 steps, so there is nothing to do; raise max_steps to go on"
    assert "raise num_train_epochs" in finished_line(last, {"num_train_epochs": 1}, 4)


@pytest.mark.parametrize("status", ["finished", "trained", "failed", "running", "interrupted"])
def test_exit_status_and_run_json_agree_for_a_run_that_made_all_steps(status, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": status}))
    if status == "finished":
        check_scored(tmp_path / "checkpoint-4")
        return
    with pytest.raises(UserError, match=f"the run ended as '{status}' after them: score the checkpoint with"):
        check_scored(tmp_path / "checkpoint-4")
