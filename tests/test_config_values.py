"""Values of a configuration: kinds and limits, options without an effect, what a library would notice too late."""

from pathlib import Path

import pytest
import yaml

from helpers.config.finetune import parse_finetune_config, read_finetune_config
from helpers.errors import UserError

MINIMAL = {"peft_config": {"r": 8}, "training_args": {"seed": 1}}


def parsed(text: str):
    """Read lines as people write them: what YAML makes of a value is half of the fault."""
    changes = yaml.safe_load(text)
    return parse_finetune_config(MINIMAL | changes, "my.yaml")


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(text)
    message = str(caught.value)
    assert message.startswith("my.yaml") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("max_steps: 3e3", "a whole number, not '3e3'; write 3000 without quotes"),
        ("max_steps: 2.0", "a whole number, not 2.0; write 2"),
        ("max_steps: -2", "at least -1, not -2"),
        ("max_steps: 0", "nothing would be trained"),
        ("warmup_ratio: 1.0", "warmup_ratio must be at least 0 and below 1, not 1.0; or give warmup_steps"),
        ("accelerator_config: {split_batches: true}", "split_batches would divide the batch of a rank"),
        ('per_device_train_batch_size: "4"', "a whole number, not '4'; write 4 without quotes"),
        ("per_device_train_batch_size: 4.0", "a whole number, not 4.0; write 4"),
        ("per_device_train_batch_size: 0", "at least 1, not 0"),
        ("per_device_train_batch_size: true", "a whole number, not True"),
        ('gradient_accumulation_steps: "2"', "a whole number, not '2'"),
        ("gradient_accumulation_steps: 0", "at least 1, not 0"),
        ("seed: abc", "a whole number, not 'abc'"),
        ("seed: -1", "at least 0, not -1"),
        ("weight_decay: null", "a number, not None; leave the line out for 0.0"),
        ("learning_rate: -1e-4", "at least 0, not -0.0001"),
        ("learning_rate: .nan", "finite, not nan"),
        ("learning_rate: nan", "finite, not nan"),
        ("learning_rate: [1.0e-4]", "a number, not [0.0001]"),
        ("lr_scheduler_type: cosinus", "one of linear, cosine, "),
        ("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_type cosine_with_min_lr with lr_scheduler_kwargs {}"),
        ("eval_strategy: sometimes", "one of no, steps, epoch, not 'sometimes'"),
        ("adam_beta2: 1.0", "below 1, not 1.0"),
        ("logging_steps: 0", "above 0, not 0"),
        ("logging_steps: 1.5", "a whole number of steps, or a share below 1, not 1.5"),
        ("num_train_epochs: 0", "above 0, not 0"),
        ("num_train_epochs: 2024-01-01", "a number, not datetime.date(2024, 1, 1)"),
        ("bf16: 'true'", "true or false, not 'true'; write true without quotes"),
        ("predict_with_generate: 1", "true or false, not 1"),
        ("generation_config: 512", "a block of keys, not 512"),
        ("group_by_length: 1", "true or false, not 1"),
        ("gradient_checkpointing: 1", "true, false or auto, not 1"),
        ("train_sampling_strategy: shuffle", "random, sequential or group_by_length"),
    ],
)
def test_a_value_of_the_wrong_kind_under_training_args(line, wanted):
    message = refused(f"training_args: {{{line}}}")
    assert line.split(":")[0] in message and wanted in message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('peft_config: {r: "8"}', "peft_config: r must be a whole number, not '8'; write 8 without quotes"),
        ("peft_config: {r: 0}", "r must be at least 1, not 0"),
        ("peft_config: {r: 8, lora_dropout: 1.0}", "lora_dropout must be below 1, not 1.0"),
        ("peft_config: {r: 8, bias: some}", "bias must be one of none, all, lora_only, not 'some'"),
        ("peft_config: {r: 8, target_modules: [1]}", "target_modules must be a list of texts or text, not [1]"),
        ("peft_config: {r: 8, rank_pattern: 4}", "rank_pattern must be a block of keys, not 4"),
        ("peft_config: {r: 8, init_lora_weights: pisa}", "init_lora_weights must be true or false or one of gaussian"),
        ("peft_config: {r: 8, init_lora_weights: loftq}", "init_lora_weights 'loftq' needs steps before training"),
        ("peft_config: {r: 8, inference_mode: true}", "inference_mode is not supported; remove it"),
        ("peft_config: {r: 8, task_type: SEQ_CLS}", "task_type 'SEQ_CLS' is not supported; use CAUSAL_LM"),
        ('data_config: {num_proc: "16"}', "data_config: num_proc must be a whole number, not '16'"),
        ("data_config: {num_proc: 0}", "num_proc must be at least 1, not 0"),
        ("data_config: {train_file: null}", "train_file must be text, not None; leave the line out for train.json"),
        ("data_config: {train_file: [a]}", "train_file must be text, not ['a']"),
        ("data_config: {val_file: 5}", "val_file must be text, not 5"),
    ],
)
def test_a_value_of_the_wrong_kind_elsewhere(text, wanted):
    assert wanted in refused(text)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("metric_for_best_model: accuracy", ["metric_for_best_model", "accuracy", "rouge-l"]),
        ("metric_for_best_model: rouge-l", ["rouge-l", "predict_with_generate: true"]),
        ("report_to: wandb", ["report_to wandb needs the package wandb"]),
        ("report_to: [tensorboard]", ["report_to tensorboard needs the package tensorboard"]),
        ("report_to: wand", ["report_to 'wand' is unknown", "wandb"]),
        ("optim: galore_adamw", ["optim galore_adamw needs the package galore_torch"]),
        ("use_liger_kernel: true", ["use_liger_kernel", "loss_chunk"]),
        ("dataloader_persistent_workers: true", ["dataloader_persistent_workers", "dataloader_num_workers above 0"]),
        ("dataloader_prefetch_factor: 2", ["dataloader_prefetch_factor", "dataloader_num_workers above 0"]),
        ("dataloader_multiprocessing_context: threads", ["'threads'", "forkserver"]),
        ("fsdp: full_shard", ["fsdp", "configs/ds_zero_3.json"]),
        ("push_to_hub: true", ["push_to_hub", "helpers.finetune.export"]),
        ("torch_compile: true", ["torch_compile", "compile_layers: true"]),
        ("log_level: loud", ["log_level 'loud' is unknown", "passive"]),
        ("log_level_replica: loud", ["log_level_replica 'loud' is unknown", "passive"]),
        ("optim_args: fast", ["optim_args", "'fast'", "key=value"]),
        ("accelerator_config: accelerate.json", ["accelerator_config", "'accelerate.json'", "a block of keys"]),
        ("auto_find_batch_size: true", ["auto_find_batch_size", "per_device_train_batch_size"]),
    ],
)
def test_what_only_a_library_would_notice_later(line, named, monkeypatch):
    monkeypatch.setattr("helpers.config.options.find_spec", lambda name: None)  # none of the packages is installed
    message = refused(f"training_args: {{{line}}}")
    assert all(text in message for text in named)


@pytest.mark.parametrize("name", ["rouge-l", "eval_rouge_l", "rouge_l", "ROUGE-L"])
def test_a_metric_may_be_written_as_it_is_printed(name):
    read = parsed(f"training_args: {{metric_for_best_model: {name}, predict_with_generate: true}}")
    assert read.training["metric_for_best_model"] == "rouge_l"
    assert parsed("training_args: {metric_for_best_model: eval_loss}").training["metric_for_best_model"] == "loss"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("training_args: {resume_from_checkpoint: x}", "resume_from_checkpoint is ignored: --resume"),
        ("training_args: {do_train: false}", "do_train is ignored"),
        ("training_args: {do_train: true}", None),
        ("training_args: {disable_tqdm: false}", "disable_tqdm is ignored"),
        ("training_args: {ddp_find_unused_parameters: true}", "ddp_find_unused_parameters is ignored"),
        ("training_args: {ddp_find_unused_parameters: false}", None),
        ("training_args: {generation_num_beams: 4}", "generation_num_beams is ignored"),
        ("training_args: {generation_max_length: 4}", "generation_max_length is ignored: give max_new_tokens"),
        ("training_args: {fsdp: '', push_to_hub: false}", None),
        ("data_config: {test_file: nonexistent.json}", "test_file is ignored"),
        ("peft_config: {r: 8, revision: main}", "revision is ignored"),
        ("training_args: {eval_strategy: no}", None),
    ],
)
def test_a_key_without_an_effect_is_said_to_be_ignored(text, note):
    notes = [line for line in parsed(text).notes if "no seed" not in line and "no target_modules" not in line]
    assert [line[: len(note)] for line in notes] == [note] if note else notes == []


def test_values_that_files_really_have_are_accepted():
    read = parsed("training_args: {learning_rate: 5e-5, eval_strategy: no, lr_scheduler_kwargs: {}, warmup_steps: 0}")
    assert read.training["learning_rate"] == 5e-5 and read.training["eval_strategy"] == "no"
    assert parsed("peft_config: {r: 8, init_lora_weights: orthogonal}").lora["init_lora_weights"] == "orthogonal"


def test_a_yaml_file_that_grows_without_end_is_refused_at_once(tmp_path):
    levels = "\n".join(f"    k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    grown = f"training_args:\n  lr_scheduler_kwargs:\n    k0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n{levels}\n"
    endless = "training_args:\n  lr_scheduler_kwargs: &a\n    k: *a\n"
    for text in (grown, endless):
        path = tmp_path / "my.yaml"
        path.write_text(f"peft_config: {{r: 8}}\n{text}")
        with pytest.raises(UserError, match="refers to itself, or to so much"):
            read_finetune_config(path)
    path.write_text("peft_config: {r: &r 8, lora_alpha: *r}\ntraining_args: {seed: *r}\n")
    assert read_finetune_config(path).lora["lora_alpha"] == 8


def test_files_that_cannot_be_read_as_text_are_one_line(tmp_path):
    path = tmp_path / "gbk.yaml"
    path.write_bytes("# 配置\npeft_config: {r: 8}\n".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8") as caught:
        read_finetune_config(path)
    assert "iconv -f GB18030" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_finetune_config(Path(tmp_path))
