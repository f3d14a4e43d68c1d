"""PEFT's prefix tuning, as in ChatGLM3's published ``ptuning_v2.yaml``: trained, resumed, answered with, not merged."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from small_chatglm import random_model, small_config
from small_finetune import ROOT, adapter, largest_difference, prepare, train_beside, write_config

from helpers.config.compatibility import check_method
from helpers.config.finetune import parse_finetune_config
from helpers.errors import UserError
from helpers.finetune.evaluate import generate_answers
from helpers.finetune.export import export
from helpers.finetune.loading import find_scored, load_for_inference
from helpers.finetune.method import add_adapter
from helpers.finetune.recorder import read_metrics
from helpers.memory.predict import ModelShape
from helpers.memory.predict.jobs import configuration_of

TOKENS = 5
PREFIX = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
PUBLISHED = yaml.safe_load((ROOT / "tests" / "data" / "published_lora.yaml").read_text())


def write_prefix_config(folder: Path, **training: object) -> Path:
    path = write_config(folder, training_args={"eval_steps": 4, "learning_rate": 1e-1} | training)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"peft_config": PREFIX}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finetune(rank_server, data_dir, small_checkpoint):
    """Train prefixes on some ranks; returns the output folder, which is beside the configuration."""

    def run(nprocs: int, folder: Path, *arguments: object, rows: int = 4) -> Path:
        config = write_prefix_config(folder, per_device_train_batch_size=rows)
        return train_beside(rank_server, config, data_dir, small_checkpoint, *arguments, nprocs=nprocs)

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, finetune) -> Path:
    """Output folder of one process."""
    return finetune(1, tmp_path_factory.mktemp("prefix_alone"), rows=8)


@pytest.mark.slow
def test_two_ranks_under_zero_3_train_what_one_process_trains(alone, finetune, tmp_path):
    output = finetune(2, tmp_path, ROOT / "configs" / "ds_zero_3.json")
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(alone / "checkpoint-4")) < 1e-6
    assert largest_difference(adapter(alone / "checkpoint-2"), adapter(alone / "checkpoint-4")) > 1e-3
    losses = [[r["loss"] for r in read_metrics(o / "metrics.jsonl") if "loss" in r] for o in (output, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_bits(alone, finetune, tmp_path):
    shutil.copytree(alone, tmp_path / "output")
    shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    output = finetune(1, tmp_path, "--resume", rows=8)
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(alone / "checkpoint-4")) == 0


@pytest.mark.slow
def test_it_answers_a_batch_as_each_prompt_by_itself_and_the_base_model_without_it(alone, small_checkpoint, tmp_path):
    assert find_scored(alone) == alone / "checkpoint-4"
    model, tokenizer = load_for_inference(alone, device="cpu")
    base, _ = load_for_inference(small_checkpoint, device="cpu")
    assert isinstance(model, PeftModel)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]

    def answers(of, batch_size):
        options = {"max_new_tokens": 6, "batch_size": batch_size, "label": "test"}
        return generate_answers(of, tokenizer, prompts, **options)

    tuned = answers(model, 3)
    assert tuned == answers(model, 1) != answers(base, 3)
    with model.disable_adapter():
        assert answers(model, 3) == answers(base, 3)
    with pytest.raises(UserError, match="holds a prefix, which belongs to no weight and cannot be merged; use it as"):
        export(alone, tmp_path / "out")


def test_the_prefix_is_keys_and_values_that_every_token_sees():
    config = parse_finetune_config({"peft_config": dict(PREFIX), "training_args": {"seed": 1}}, "my.yaml")
    base = random_model(small_config())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        alone = base(ids).logits
        model = add_adapter(base, config)
        tuned = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # A row of the batch that is padded on the right, as in training, gets the same logits.
        padded = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 9, 9, 9, 9, 9]])
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
        together = model(input_ids=padded, attention_mask=mask).logits[:1, :4]
    assert (tuned - alone).abs().amax(-1).min() > 1e-3  # the first token's as well
    torch.testing.assert_close(together, tuned)
    shape = base.config
    values = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TOKENS * values


def test_the_published_file_is_read_unchanged():
    peft = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 128}
    read = parse_finetune_config(PUBLISHED | {"peft_config": peft}, "ptuning_v2.yaml")
    assert read.prefix == {"task_type": "CAUSAL_LM", "num_virtual_tokens": 128}
    assert read.method == "prefix tuning" and not read.lora and not read.trains_all
    with pytest.raises(UserError, match="the memory of PREFIX_TUNING is not predicted"):
        configuration_of(read, None, shape=ModelShape(), world_size=1, sequence_length=None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speed": {"packing": 256}}, "does not go with speed: packing, whose rows would not see the prefix"),
        ({"speed": {"compile_layers": True}}, "does not go with speed: compile_layers"),
        (
            {"training_args": {"load_best_model_at_end": True, "save_strategy": "no"}},
            "does not go with load_best_model_at_end",
        ),
        ({"training_args": {"gradient_checkpointing": True}}, "does not go with gradient_checkpointing, which drops"),
    ],
)
def test_what_contradicts_a_prefix_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        check_method(parse_finetune_config({"peft_config": dict(PREFIX), **changes}, "my.yaml"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix_projection": True}, "prefix_projection is not supported; remove it"),
        ({"inference_mode": True}, "inference_mode is not supported; remove it"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported; use CAUSAL_LM"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens must be a whole number"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, said):
    with pytest.raises(UserError, match=f"my.yaml, peft_config: {said}"):
        parse_finetune_config({"peft_config": PREFIX | options}, "my.yaml")


def test_a_prefix_leaves_room_for_the_rows(tmp_path, data_dir, small_checkpoint):
    path = write_prefix_config(tmp_path, gradient_checkpointing="auto")
    job = prepare(data_dir, small_checkpoint, path)
    assert "gradient_checkpointing auto -> false: PREFIX_TUNING does not go with it" in job.notes
    path.write_text(path.read_text().replace(f"num_virtual_tokens: {TOKENS}", "num_virtual_tokens: 32768"))
    with pytest.raises(UserError, match="num_virtual_tokens 32768 and rows of up to 193 tokens are more than the"):
        prepare(data_dir, small_checkpoint, path)
