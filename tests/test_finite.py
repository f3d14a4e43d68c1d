"""A loss or an adapter that is not finite ends the training at once, and the last good checkpoint stays."""

import json
import math
import re
import sys

import pytest
import torch
from rank_server import RankServer
from small_chatglm import random_lora
from small_finetune import ROOT, TRAIN, write_config
from transformers import TrainerControl, TrainerState, TrainingArguments

from helpers.assets import TINY_MODEL
from helpers.errors import UserError
from helpers.finetune import generate, train
from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.finite import MOST_BATCHES, FiniteCheck
from helpers.finetune.loading import load_for_inference
from helpers.finetune.recorder import read_metrics


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5, report_to="none", use_cpu=True)


def log(check, arguments, **logs):
    check.on_log(arguments, TrainerState(global_step=3), TrainerControl(), logs=logs)


def batch(tokenizer, *texts):
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def test_the_step_the_rank_and_the_rows_of_the_first_bad_loss_are_named(tokenizer, arguments):
    check = FiniteCheck(tokenizer)
    check.add(1, torch.tensor(2.0), batch(tokenizer, "类型#裙", "类型#裤"))
    check.add(
        2, torch.tensor(math.inf), batch(tokenizer, "版型#宽松 这款裙子采用柔软的面料，宽松的版型显瘦", "风格#性感")
    )
    check.add(3, torch.tensor(math.nan), batch(tokenizer, "图案#线条", "明星"))
    with pytest.raises(UserError) as caught:
        log(check, arguments, loss=math.nan, grad_norm=1.0)
    message = str(caught.value)
    assert message.startswith("the loss is inf at step 2 on rank 0, whose rows begin '版型#宽松")
    assert "'风格#性感'; no checkpoint was written before; look at these rows" in message
    assert "below 0.5" in message and "\n" not in message


def test_a_gradient_without_end_is_named_but_not_that_of_loss_scaling(tokenizer, arguments):
    check = FiniteCheck(tokenizer)
    check.add(3, torch.tensor(2.0), batch(tokenizer, "类型#裙"))
    log(check, arguments, eval_loss=math.nan)  # not a training step
    log(check, arguments, loss=2.0, grad_norm=1.0)
    arguments.fp16 = True
    log(check, arguments, loss=2.0, grad_norm=math.inf)
    arguments.fp16 = False
    with pytest.raises(UserError, match="the norm of the gradients is inf at step 3"):
        log(check, arguments, loss=2.0, grad_norm=math.inf)


def test_at_the_first_step_the_learning_rate_is_not_the_cause(tokenizer, arguments):
    check = FiniteCheck(tokenizer)
    check.add(1, torch.tensor(math.nan), batch(tokenizer, "类型#裙"))
    with pytest.raises(
        UserError, match=r"nan at step 1 on rank 0, .* look at these rows, and at the base model's weights"
    ):
        log(check, arguments, loss=math.nan, grad_norm=1.0)


def test_the_first_of_very_many_batches_is_named(tokenizer, arguments):
    check = FiniteCheck(tokenizer)
    ids = batch(tokenizer, "类型#裙")
    for step in range(1, 3 * MOST_BATCHES):
        check.add(step, torch.tensor(math.nan if step >= 7 else 2.0), ids)
    with pytest.raises(UserError, match="the loss is nan at step 7 on rank 0"):
        log(check, arguments, loss=math.nan, grad_norm=1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu", "progress_bars_afterwards")
def test_a_rate_of_a_million_ends_the_job_with_one_line_and_no_checkpoint_of_it(tmp_path, data_dir, monkeypatch):
    def failed(_, error):
        raise error  # instead of ending this process

    monkeypatch.setattr(train.Ranks, "exit_with_error", failed)
    monkeypatch.setattr(train, "draw_figures", lambda *_: None)
    monkeypatch.setattr(train, "quiet_libraries", lambda: None)
    training = {"learning_rate": 1.0e6, "adam_epsilon": 1e-8, "max_steps": 5, "save_steps": 2, "eval_strategy": "no"}
    training["use_cpu"] = True
    config = write_config(tmp_path, training_args=training, data_config={"val_file": None})
    with pytest.raises(
        UserError, match=r"(is nan|is inf|no longer finite).*; .*try a learning_rate below 1e\+06"
    ) as caught:
        train.main([str(data_dir), str(TINY_MODEL), str(config), "--output-dir", str(tmp_path / "output")])
    assert "\n" not in str(caught.value)
    run = json.loads((tmp_path / "output" / "run.json").read_text())
    assert run["status"] == "failed" and str(caught.value) in run["error"]
    for checkpoint in complete_checkpoints(tmp_path / "output"):
        load_for_inference(checkpoint)


def test_nothing_answers_with_an_adapter_that_holds_nan(tmp_path, small_checkpoint, monkeypatch):
    adapted = random_lora(small_checkpoint, seed=0)
    next(p for name, p in adapted.named_parameters() if "lora_B" in name).data.fill_(math.nan)
    adapted.save_pretrained(tmp_path / "adapter")
    for option in ([], ["--sample"]):
        monkeypatch.setattr(sys, "argv", ["generate", str(tmp_path / "adapter"), "--prompt", "鱼尾裙", *option])
        with pytest.raises(UserError, match="holds nan or infinite numbers; use an earlier checkpoint"):
            generate.main()


@pytest.mark.slow
def test_a_rate_that_is_too_high_ends_the_job_and_keeps_what_was_good(
    tmp_path, rank_server: RankServer, data_dir, small_checkpoint
):
    # Saved more often than logged: the save must notice.
    training = {"learning_rate": 1e30, "max_steps": 8, "save_steps": 1, "logging_steps": 4, "eval_strategy": "no"}
    config = write_config(tmp_path, training_args=training)
    deepspeed = ROOT / "configs" / "ds_zero_2.json"
    output = tmp_path / "output"
    finished = rank_server.run(
        *(TRAIN, data_dir, small_checkpoint, config, deepspeed, "--output-dir", output), nprocs=2
    )
    assert finished.returncode == 2
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in finished.stderr
    assert re.match(
        r"error: (the loss is (nan|inf) at step \d on rank [01], whose|what is trained is no longer finite after)",
        lines[0],
    )
    run = json.loads((output / "run.json").read_text())
    assert run["status"] == "failed" and run["error"].endswith(lines[0].removeprefix("error: "))
    for checkpoint in complete_checkpoints(output):
        load_for_inference(checkpoint)  # refuses an adapter with nan
    assert all(record["step"] < 8 for record in read_metrics(output / "metrics.jsonl"))
