"""Values of a configuration: kinds and limits, options without an effect, what a library would notice too late."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

from helpers.config.finetune import parse_finetune_config, read_finetune_config
from helpers.config.optimizer import READ
from helpers.config.overruled import overruled_options, rate_notes
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
        ("max_steps: 0", "max_steps is 0, so nothing would be trained; give a number of steps"),
        ("save_total_limit: two", "save_total_limit must be a whole number, not 'two'"),
        ("logging_steps: 1.5", "a whole number of steps, or a share below 1, not 1.5"),
        ("num_train_epochs: 0", "above 0, not 0"),
        ("num_train_epochs: 2024-01-01", "a number, not datetime.date(2024, 1, 1)"),
        ("bf16: 'true'", "true or false, not 'true'; write true without quotes"),
        ("predict_with_generate: 1", "true or false, not 1"),
        ("generation_config: 512", "a block of keys, not 512"),
        ("group_by_length: 1", "true or false, not 1"),
        ("gradient_checkpointing: 1", "true, false or auto, not 1"),
        ("max_steps: 100000000000000000000", "below 2,147,483,648, not 100000000000000000000"),
        ("ddp_timeout: 1000000000000", "below 2,147,483,648"),
        ("logging_steps: 1.0e+18", "below 2,147,483,648"),
        ("adam_epsilon: 1.0e+10", "adam_epsilon must be below 1"),
        ("seed: 99999999999", "below 4,294,967,296, not 99999999999"),
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
        ("peft_config: {r: 100000000000000000000}", "r must be below 2,147,483,648"),
        ("max_input_length: 100000000000", "max_input_length must be below 2,147,483,648"),
        ("speed: {packing: 1000000000000}", "packing must be below 2,147,483,648"),
        ("1: 2", "unknown key 1; known are"),
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
        ("optim_args: fast=1", ["optim_args", "reads no 'fast'", "remove optim_args"]),
        ("optim_args: eps=1e-7", ["optim_args eps has no effect", "give adam_epsilon instead"]),
        ("optim: sgd, optim_args: weight_decay=0.1", ["optim_args weight_decay", "give weight_decay instead"]),
        ("optim: sgd, optim_args: momentun=0.9", ["sgd reads no 'momentun'", "did you mean 'momentum'?"]),
        ("optim: sgd, optim_args: momentum=abc", ["optim_args momentum must be a number, not 'abc'"]),
        ("optim: sgd, optim_args: momentum=nan", ["optim_args momentum must be a number, not 'nan'"]),
        ("optim: sgd, optim_args: momentum=-1", ["'momentum=-1' do not fit sgd: Invalid momentum value: -1.0"]),
        ("optim: sgd, optim_args: nesterov=maybe", ["optim_args nesterov must be true or false, not 'maybe'"]),
        ("optim: sgd, optim_args: nesterov=true", ["do not fit sgd: Nesterov momentum requires a momentum"]),
        ("optim: sgd, optim_args: 'momentum=0.9,momentum=0.8'", ["has a key twice"]),
        ("optim: sgd, optim_args: momentum=", ["key=value"]),
        ("optim: adafactor, optim_args: clip_threshold=1.0", ["adafactor reads no 'clip_threshold'"]),
        ("accelerator_config: accelerate.json", ["accelerator_config", "'accelerate.json'", "a block of keys"]),
        ("auto_find_batch_size: true", ["auto_find_batch_size", "per_device_train_batch_size"]),
    ],
)
def test_what_only_a_library_would_notice_later(line, named, monkeypatch):
    monkeypatch.setattr("helpers.config.options.find_spec", lambda name: None)  # none of the packages is installed
    message = refused(f"training_args: {{{line}}}")
    assert all(text in message for text in named)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("sgd", "momentum=0.9, nesterov=True,dampening=0"),
        ("rmsprop", "alpha=0.9,centered=false"),
        ("adagrad", "lr_decay=0.1"),
    ],
)
def test_arguments_that_an_optimizer_reads_are_accepted(optimizer, arguments):
    read = parsed(f"training_args: {{optim: {optimizer}, optim_args: '{arguments}'}}")
    assert read.training["optim_args"] == arguments


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adagrad", "adamw_torch", "adafactor"])
def test_the_names_are_those_that_transformers_reads(optimizer):
    read = set()

    class Recorded(dict):
        def __contains__(self, key):
            read.add(key)
            return False

        def get(self, key, default=None):
            read.add(key)
            return default

    context = OptimizerContext(
        args=SimpleNamespace(optim=optimizer), model=None, optimizer_kwargs={}, adam_kwargs={}, optim_args=Recorded(a=1)
    )
    _OPTIMIZER_HANDLERS[optimizer](context)
    assert read - {"weight_decay"} == READ.get(optimizer, {}).keys()


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
        ("training_args: {save_strategy: 'no'}", "save_strategy no: what is trained is not kept"),
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


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("max_steps: 5, num_train_epochs: 2", "num_train_epochs is ignored: max_steps 5 decides"),
        ("num_train_epochs: 2", None),
        ("eval_steps: 5", "eval_steps is ignored: eval_strategy is no"),
        ("eval_steps: 5, eval_strategy: steps", None),
        ("save_strategy: epoch, save_steps: 5", "save_steps is ignored: save_strategy is epoch"),
        ("save_strategy: epoch, save_steps: 500", None),  # the default
        ("lr_scheduler_type: constant, warmup_steps: 5", "warmup_steps is ignored: lr_scheduler_type is constant"),
        ("optim: sgd, adam_beta1: 0.5", "adam_beta1 is ignored: optim is sgd"),
    ],
)
def test_a_key_that_another_one_overrules_is_said_to_be_ignored(line, note):
    notes = overruled_options(parsed(f"training_args: {{{line}}}").training)
    assert [text[: len(note)] for text in notes] == [note] if note else notes == []


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("learning_rate: 1.0e+6", "learning_rate 1e+06 is very high"),
        ("learning_rate: 0", "learning_rate 0 trains nothing"),
        ("weight_decay: 1.0e+9", "each step removes the whole weight"),
        ("warmup_steps: 5", "warmup_steps 5 does not end within the 5 steps"),
        ("warmup_steps: 0.5", None),
        ("warmup_steps: 4, learning_rate: 3.0e-3", None),
    ],
)
def test_a_rate_with_which_little_can_be_learned_is_a_warning(line, note):
    notes = rate_notes(parsed(f"training_args: {{{line}}}").training, planned=5)
    assert len(notes) == (note is not None) and all(note in text for text in notes)


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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("peft_config: {r: 8}\nmax_input_length: 64\nmax_input_length: 70\n", ":3: the key 'max_input_length' occurs"),
        ("training_args:\n  seed: 1\n  max_steps: 2\n  seed: 1\n", ":4: the key 'seed' occurs twice .* in line 2"),
        ("peft_config: {r: 8, r: 8}", ":1: the key 'r' occurs twice"),
        ("peft_config: {r: 8, 'r': 4}", ":1: the key 'r' occurs twice"),
        ("", "must hold keys and values, it is empty"),
        ("- a", "must hold keys and values, not a list"),
        ("peft_config:\n\tr: 8", r"is not YAML: .* line 2"),
        ("training_args: {seed: 2024-13-45}", "is not YAML: month must be in"),
        ("[" * 3000, "nested too deeply"),
        ("training_args\uff1a\n  max_steps: 5\n", "line 1 has a full-width colon, write : instead"),
    ],
)
def test_a_yaml_file_with_a_fault_is_one_line(text, wanted, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=wanted) as caught:
        read_finetune_config(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_block_may_replace_what_it_merges(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("speed: &speed {packing: 64}\ntraining_args: {<<: &more {seed: 1}, seed: 2}\npeft_config: {r: 8}\n")
    assert read_finetune_config(path).training["seed"] == 2


def test_files_that_cannot_be_read_as_text_are_one_line(tmp_path):
    path = tmp_path / "gbk.yaml"
    path.write_bytes("# 配置\npeft_config: {r: 8}\n".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8") as caught:
        read_finetune_config(path)
    assert "iconv -f GB18030" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_finetune_config(Path(tmp_path))
