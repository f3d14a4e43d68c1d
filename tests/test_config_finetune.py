"""The configuration files: the published ones unchanged, mistakes named, contradictions found."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_finetune import write_config

from helpers.config.compatibility import check_speed, choose_precision, contradictions
from helpers.config.deepspeed import bucket_warning, read_deepspeed_config
from helpers.config.finetune import TOP_KEYS, SpeedOptions, parse_finetune_config, read_finetune_config
from helpers.errors import UserError

DATA = Path(__file__).parent / "data"
CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = yaml.safe_load((DATA / "published_lora.yaml").read_text())
MINIMAL = {"peft_config": {"r": 8}}


def test_published_yaml_is_read_unchanged_and_each_default_is_said():
    read = read_finetune_config(DATA / "published_lora.yaml")
    assert read.training["eval_strategy"] == "steps"
    assert read.training["learning_rate"] == 5e-5
    assert "evaluation_strategy" not in read.training and "predict_with_generate" not in read.training
    assert read.lora["target_modules"] == ["q_proj", "k_proj", "v_proj"]
    assert "peft_type" not in read.lora
    assert (read.max_input_length, read.max_output_length, read.max_new_tokens) == (256, 512, 512)
    assert read.predict_with_generate and read.training["seed"] == 42
    said = "\n".join(read.notes)
    for default in ("eval_strategy", "seed 42", "q_proj, k_proj, v_proj"):
        assert default in said


def test_own_configs_are_read_without_a_decision_left_to_state():
    for path in CONFIGS.glob("*.yaml"):
        read = read_finetune_config(path)
        check_speed(read, None)
        assert read.notes == [], path
    for path in CONFIGS.glob("ds_*.json"):
        assert read_deepspeed_config(path)["zero_optimization"]["stage"] in (0, 1, 2, 3), path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training_args": {"learning_rat": 1}}, ["learning_rat", "'learning_rate'"]),
        ({"training_args": {"evaluation_stratgy": "no"}}, ["evaluation_stratgy", "evaluation_strategy"]),
        ({"data_config": {"train_fil": "x"}}, ["train_fil", "'train_file'"]),
        ({"max_inputlength": 3}, ["max_inputlength", "'max_input_length'"]),
        ({"peft_config": {"lora_alfa": 3}}, ["lora_alfa", "'lora_alpha'"]),
        ({"peft_config": {"peft_type": "IA3"}}, ["IA3", "LORA", "PREFIX_TUNING"]),
        ({"peft_config": {"peft_type": "PREFIX_TUNING"}}, ["PREFIX_TUNING", "num_virtual_tokens"]),
        ({"peft_config": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}}, ["num_virtual_tokens", "1", "0"]),
        ({"peft_config": {"peft_type": "PREFIX_TUNING", "r": 8}}, ["unknown key 'r'"]),
        ({"max_steps": 5}, ["'max_steps'", "it belongs under training_args"]),
        ({"lora_alpha": 5}, ["'lora_alpha'", "it belongs under peft_config"]),
        ({"training_args": {"lora_dropout": 0.1}}, ["'lora_dropout'", "it belongs under peft_config"]),
        ({"model_name_or_path": "THUDM/chatglm3-6b"}, ["'model_name_or_path'", "MODEL_DIR"]),
        ({"cutoff_len": 2048}, ["'cutoff_len'", "max_input_length and max_output_length"]),
        ({"load_in_4bit": True}, ["'load_in_4bit'", "quantization_bit: 4"]),
        ({"training_args": {"packing": True}}, ["'packing'", "packing: 2048 under speed"]),
        ({"training_args": {"adafactor": True}}, ["'adafactor'", "give optim: adafactor"]),
        ({"peft_config": {"lora_rank": 8}}, ["'lora_rank'", "give r under peft_config"]),
        ({"training_args": {"save_strategy": "best"}}, ["save_strategy best needs metric_for_best_model"]),
        ({"peft_config": {}}, ["peft_config", "lora_alpha"]),
        ({"training_args": {"learning_rate": "fast"}}, ["learning_rate", "'fast'"]),
        ({"max_output_length": 0}, ["max_output_length", "0"]),
        ({"training_args": ["a"]}, ["training_args", "['a']"]),
        ({"speed": {"paking": 2048}}, ["speed", "paking", "'packing'"]),
        ({"speed": {"packing": -1}}, ["speed", "packing", "-1"]),
        ({"speed": {"packing": True}}, ["speed", "packing", "True"]),
        ({"speed": {"compile_layers": "yes"}}, ["speed", "compile_layers", "'yes'"]),
        ({"speed": {"offload_checkpoints": 1}}, ["speed", "offload_checkpoints", "1"]),
        (
            {"training_args": {"label_smoothing_factor": 0.1}, "speed": {"loss_chunk": 64}},
            ["label_smoothing_factor", "loss_chunk 64", "remove one"],
        ),
        ({"training_args": {"gradient_checkpointing": "on demand"}}, ["gradient_checkpointing", "auto", "on demand"]),
    ],
)
def test_a_mistake_is_named_in_one_line_with_its_place_and_the_nearest_known_key(change, named):
    with pytest.raises(UserError) as caught:
        parse_finetune_config({**MINIMAL, **change}, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml") and "\n" not in message
    for text in named:
        assert text in message


def test_of_speed_only_what_changes_no_result_is_on_where_nothing_is_said():
    said = parse_finetune_config(MINIMAL, "my.yaml").speed
    assert said.loss_chunk and not said.padding_mask
    assert not (said.packing or said.compile_layers or said.offload_checkpoints)
    off = parse_finetune_config({**MINIMAL, "speed": {"packing": False, "loss_chunk": 0}}, "my.yaml").speed
    assert off == SpeedOptions(loss_chunk=None)
    read = read_finetune_config(CONFIGS / "lora_fast.yaml").speed
    assert read.packing and read.compile_layers and read.loss_chunk


@pytest.mark.parametrize(
    ("speed", "training", "stage", "named"),
    [
        ({"compile_layers": True}, {}, 3, None),
        ({"offload_checkpoints": True}, {}, 0, ["offload_checkpoints", "gradient_checkpointing: true"]),
        ({"offload_checkpoints": True}, {"gradient_checkpointing": True}, 0, None),
        ({"offload_checkpoints": True}, {"gradient_checkpointing": "auto"}, 3, None),
        ({"compile_layers": True}, {}, 2, None),
        ({"compile_layers": True, "recompute_inputs": True}, {}, 0, None),
        ({"recompute_inputs": True}, {}, 0, ["recompute_inputs", "compile_layers: true"]),
        ({"fp8_transposed": True}, {}, 0, ["fp8_transposed", "fp8: true"]),
    ],
)
def test_what_does_not_go_together_is_named(speed, training, stage, named):
    read = parse_finetune_config({**MINIMAL, "speed": speed, "training_args": training}, "my.yaml")
    deepspeed = {"zero_optimization": {"stage": stage}} if stage else None
    if named is None:
        check_speed(read, deepspeed)
        return
    with pytest.raises(UserError) as caught:
        check_speed(read, deepspeed)
    assert all(text in str(caught.value) for text in named) and "\n" not in str(caught.value)


@given(st.text(min_size=1).filter(lambda key: key not in TOP_KEYS))
def test_no_unknown_top_level_key_passes(key):
    with pytest.raises(UserError, match="unknown key"):
        parse_finetune_config({**MINIMAL, key: 1}, "my.yaml")


def test_fused_target_and_renamed_keys_are_translated():
    raw = {
        "peft_config": {"r": 4, "target_modules": ["query_key_value", "o_proj"]},
        "training_args": {"warmup_ratio": 0.1, "group_by_length": True, "overwrite_output_dir": True},
    }
    read = parse_finetune_config(raw, "my.yaml")
    assert read.lora["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert read.training["warmup_steps"] == 0.1
    assert read.training["train_sampling_strategy"] == "group_by_length"
    assert "overwrite_output_dir" not in read.training
    assert any("overwrite_output_dir" in note for note in read.notes)


def test_older_names_and_ways_of_writing_are_understood():
    raw = {
        "peft_config": {"peft_type": "lora", "task_type": "causal_lm", "r": 4},
        "training_args": {
            "per_gpu_train_batch_size": 3,
            "fp16_opt_level": "O1",
            "adafactor": False,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": "1e-6"},  # what YAML makes of 1e-6
            "output_dir": "~/output",
        },
    }
    read = parse_finetune_config(raw, "my.yaml")
    assert read.lora["task_type"] == "CAUSAL_LM"
    assert read.training["per_device_train_batch_size"] == 3
    assert read.training["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert read.training["output_dir"] == str(Path.home() / "output")
    assert "fp16_opt_level no longer has an effect and is ignored" in read.notes
    assert not {"adafactor", "per_gpu_train_batch_size"} & read.training.keys()


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        read_finetune_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match="not YAML") as caught:
        read_finetune_config(broken)
    assert "\n" not in str(caught.value)
    text = tmp_path / "text.yaml"
    text.write_text("just words")
    with pytest.raises(UserError, match="must hold keys"):
        read_finetune_config(text)
    with pytest.raises(UserError, match="no DeepSpeed file"):
        read_deepspeed_config(tmp_path / "none.json")
    text.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_deepspeed_config(text)


def test_published_deepspeed_file_contradicts_nothing():
    published = read_deepspeed_config(DATA / "published_ds_zero_2.json")
    training = parse_finetune_config(PUBLISHED, "lora.yaml").training
    for world_size in (1, 2, 8):
        assert contradictions(published, training, world_size) == []


def test_each_contradiction_names_both_sides():
    deepspeed = {
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 8,
        "gradient_clipping": 0.5,
        "optimizer": {"params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
    }
    training = {"per_device_train_batch_size": 4, "learning_rate": 5e-5, "bf16": False}
    found = contradictions(deepspeed, training, world_size=2)
    assert len(found) == 4  # 4 rows x 2 ranks is 8: train_batch_size agrees
    assert any("train_micro_batch_size_per_gpu is 8 but per_device_train_batch_size is 4" in text for text in found)
    assert any("0.5" in text and "1.0" in text for text in found)
    assert any("0.001" in text and "5e-05" in text for text in found)
    assert any("bf16.enabled is True but bf16 is False" in text for text in found)


@pytest.mark.parametrize("hardware", ["bf16", "fp16", "no"])
def test_precision_follows_the_hardware_unless_asked_for(hardware):
    assert choose_precision({}, None, hardware) == hardware
    assert choose_precision({}, read_deepspeed_config(DATA / "published_ds_zero_2.json"), hardware) == hardware


def test_a_precision_that_cannot_work_is_refused():
    assert choose_precision({"fp16": True}, None, "bf16") == "fp16"
    assert choose_precision({}, {"bf16": {"enabled": True}}, "bf16") == "bf16"
    with pytest.raises(UserError, match="fp16"):
        choose_precision({"bf16": True}, None, "fp16")
    with pytest.raises(UserError, match="no GPU here; remove the line to train in fp32"):
        choose_precision({"fp16": True}, None, "no")
    with pytest.raises(UserError, match="does not support bf16; remove the line to train in fp32"):
        choose_precision({"bf16": True}, None, "no")
    with pytest.raises(UserError, match="keep one"):
        choose_precision({"fp16": True}, {"bf16": {"enabled": True}}, "bf16")
    # Never unscaled fp16.
    with pytest.raises(UserError, match="loss_scale"):
        choose_precision({}, {"fp16": {"enabled": True, "loss_scale": 1}}, "bf16")


def test_published_buckets_cost_what_the_warning_says():
    published = read_deepspeed_config(DATA / "published_ds_zero_2.json")
    line = bucket_warning(published, trainable=3_784_704, element_bytes=2)
    assert "2 x 954 MiB" in line and "7.2 MiB" in line
    own = read_deepspeed_config(CONFIGS / "ds_zero_2.json")
    assert bucket_warning(own, trainable=3_784_704, element_bytes=2) is None
    assert bucket_warning({"zero_optimization": {"stage": 3}}, 1, 2) is None


def test_a_token_is_in_no_setting_and_no_note():
    training = {"hub_token": "hf_secret", "push_to_hub": False}
    config = parse_finetune_config({**MINIMAL, "training_args": training}, "lora.yaml")
    assert "hf_secret" not in repr(config) and any("hub_token is ignored" in note for note in config.notes)


def test_a_beta_of_zero_is_a_number_with_decimals_as_torch_wants_it(tmp_path):
    config = read_finetune_config(write_config(tmp_path, training_args={"adam_beta1": 0}))
    beta = config.training["adam_beta1"]
    assert beta == 0 and type(beta) is float
