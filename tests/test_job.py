"""The fine-tune before it starts: what is decided, what is refused, all before a weight is loaded."""

import dataclasses
import shutil

import pytest
import torch
from small_chatglm import random_model, small_config
from small_finetune import ROOT, prepare, write_config

from helpers.errors import UserError
from helpers.finetune import job
from helpers.finetune.ranks import Ranks
from helpers.hardware import Gpu, describe_machine
from helpers.memory.predict.planner import fits
from helpers.memory.units import GIB


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_checkpointing_is_decided_with_the_mask_that_an_old_card_needs(
    capability, monkeypatch, tmp_path, data_dir, small_checkpoint
):
    asked = []
    monkeypatch.setattr(
        job, "fits", lambda configuration, size: asked.append(configuration) or fits(configuration, size)
    )
    card = Gpu("a card", 16 * GIB, capability)
    monkeypatch.setattr(job, "describe_machine", lambda: dataclasses.replace(describe_machine(), gpus=(card,)))
    prepare(data_dir, small_checkpoint, write_config(tmp_path, training_args={"gradient_checkpointing": "auto"}))
    (configuration,) = asked
    assert configuration.masked == (capability < (8, 0))


@pytest.mark.parametrize(("gib", "wanted"), [(80, False), (0.5, True), (None, False)])
def test_checkpointing_is_turned_on_where_the_card_needs_it(
    gib, wanted, monkeypatch, tmp_path, data_dir, small_checkpoint
):
    gpus = () if gib is None else (Gpu("a card", int(gib * GIB), (9, 0)), Gpu("a larger one", 2**40, (9, 0)))
    monkeypatch.setattr(job, "describe_machine", lambda: dataclasses.replace(describe_machine(), gpus=gpus))
    prepared = prepare(
        data_dir, small_checkpoint, write_config(tmp_path, training_args={"gradient_checkpointing": "auto"})
    )
    assert prepared.config.checkpointing is wanted
    (note,) = [note for note in prepared.notes if note.startswith("gradient_checkpointing auto")]
    assert str(wanted).lower() in note and ("GiB predicted" in note) == (gib is not None)


def test_bad_input_is_one_line_before_a_weight_is_loaded(tmp_path, data_dir, small_checkpoint, monkeypatch):
    config = write_config(tmp_path)

    def refused(*arguments, **options) -> str:
        with pytest.raises(UserError) as caught:
            prepare(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refused(data_dir, empty, config)
    assert "train.json does not exist" in refused(empty, small_checkpoint, config)
    assert "is no folder" in refused(data_dir, tmp_path / "nowhere", config)
    contradictory = tmp_path / "ds.json"
    contradictory.write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}')
    message = refused(data_dir, small_checkpoint, config, contradictory)
    assert "train_micro_batch_size_per_gpu is 2 but per_device_train_batch_size is 4" in message
    packed = write_config(empty, speed={"packing": 60})
    assert "packing 60 is shorter than the longest row of 1" in refused(data_dir, small_checkpoint, packed)
    assert "holds no finished checkpoint" in refused(data_dir, small_checkpoint, config, resume=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    four = Ranks(rank=0, local_rank=0, world_size=4, local_world_size=4, store=None)
    assert "--nproc_per_node=2" in refused(data_dir, small_checkpoint, config, ranks=four)


def test_a_6b_vocabulary_with_another_tokenizer_is_a_warning_in_one_line(tmp_path, data_dir, tokenizer):
    folder = tmp_path / "model"
    random_model(small_config(vocab_size=65024, hidden_size=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prepared = prepare(data_dir, folder, write_config(tmp_path))
    (note,) = [note for note in prepared.notes if note.startswith("warning:")]
    assert "tokenizer.model is not the tokenizer published with ChatGLM3-6B" in note and "\n" not in note


def test_the_deepspeed_file_that_training_args_names_is_used(tmp_path, data_dir, small_checkpoint):
    shutil.copy(ROOT / "configs" / "ds_zero_2.json", tmp_path / "ds.json")
    prepared = prepare(data_dir, small_checkpoint, write_config(tmp_path, training_args={"deepspeed": "ds.json"}))
    assert prepared.zero_stage == 2
    with pytest.raises(UserError, match=r"deepspeed 'none\.json' does not exist"):
        prepare(data_dir, small_checkpoint, write_config(tmp_path, training_args={"deepspeed": "none.json"}))


def test_what_is_overruled_and_a_rate_that_is_too_high_are_notes(tmp_path, data_dir, small_checkpoint):
    training = {"learning_rate": 1.0e6, "num_train_epochs": 1, "warmup_steps": 9}
    config = write_config(tmp_path, training_args=training, data_config={"val_file": None})
    said = "\n".join(prepare(data_dir, small_checkpoint, config).notes)
    assert "num_train_epochs is ignored: max_steps 4 decides" in said
    assert "warning: learning_rate 1e+06 is very high" in said and "warning: warmup_steps 9 does not end" in said
    assert "no val_file given: evaluation is skipped" in said


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_any_number_of_dev_rows_will_do(rows, tmp_path, data_dir, small_checkpoint):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_bytes((data_dir / "train.json").read_bytes())
    if rows:
        lines = (data_dir / "dev.json").read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / "dev.json").write_text("".join(lines), encoding="utf-8")
    prepared = prepare(folder, small_checkpoint, write_config(tmp_path))
    if rows is None:
        assert prepared.data.dev is None and any("evaluation is skipped" in note for note in prepared.notes)
    else:
        assert len(prepared.data.dev) == len(prepared.data.answers) == rows
