"""A DeepSpeed file: its shape, its values, and the line of ``training_args`` that names it."""

import json
from pathlib import Path

import pytest

from helpers.config.compatibility import check_gpu_options
from helpers.config.deepspeed import choose_deepspeed_file, read_deepspeed_config
from helpers.config.deepspeed_schema import check_deepspeed_values
from helpers.errors import UserError

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("configs/ds_*.json"), *ROOT.glob("tests/data/*ds_*.json")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_that_people_use_are_accepted(path):
    check_deepspeed_values(read_deepspeed_config(path), path)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"fp16": False}, 'fp16 must be a block of keys, such as {"enabled": "auto"}, not false'),
        ({"optimizer": "AdamW"}, "optimizer must be a block of keys"),
        ({"optimizer": {"params": {}}}, 'optimizer must name its "type"'),
        ({"zero_optimization": 2}, 'zero_optimization must be a block of keys, such as {"stage": 2}, not 2'),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage must be 0, 1, 2 or 3, not 5"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage must be 0, 1, 2 or 3, not 'auto'"),
        ({"zero_optimization": {"stage": True}}, "stage must be 0, 1, 2 or 3, not True"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size must be a number, not '5e8'"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size is -1: Input should be greater than 0"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com is not a key of DeepSpeed"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer must be a block of keys"),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, "offload_optimizer.device is 'disk'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param on nvme needs nvme_path",
        ),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not supported"),
        ({"elasticity": {"enabled": False}}, "elasticity is not supported, remove it; DeepSpeed no longer has it"),
        ({"fp8": {"enabled": True}}, "fp8 is not supported, remove it; give fp8: true under speed"),
        ({"communication_data_type": "fp31"}, 'communication_data_type must be one of fp32, fp16, bf16, not "fp31"'),
        ({"data_types": {"grad_accum_dtype": "float8"}}, "grad_accum_dtype must be one of fp32, fp16, bf16"),
        ({"wandb": {"enabled": True}}, "wandb is not supported; remove it, and give report_to under training_args"),
        ({"checkpoint": {"tag_validation": "Maybe"}}, "tag_validation must be Ignore, Warn or Fail, not 'Maybe'"),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "legacy_stage1 is not supported"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow is not supported"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "offload_optimizer.super_offload is not supported",
        ),
        ({"compile": {"backend": "inductor"}}, "give compile_layers: true under speed"),
        ({"zero_optimization": {"stage": 2.0}}, "stage must be 0, 1, 2 or 3, not 2.0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping must be a number of at least 0, not NaN"),
        ({"amp": {"enabled": True}}, "fp16 and bf16 took its place"),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel is not supported, remove it; the job is data parallel, and configs/ds_zero_3.json shards",
        ),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is not supported, remove it; the job is data parallel"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            'older names: instead of cpu_offload write "offload_optimizer": {"device": "cpu"}',
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_params": True, "cpu_offload_use_pin_memory": True}},
            'instead of cpu_offload_params write "offload_param": {"device": "cpu"}; instead of cpu_offload_use_pin',
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": False}}, "older names: remove cpu_offload"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled must be true or false, not 'true'; remove the quotes"),
        ({"train_micro_batch_size_per_gpu": "4"}, 'must be a whole number of at least 1, not "4"'),
        ({"gradient_accumulation_steps": 0}, "must be a whole number of at least 1, not 0"),
        ({"gradient_clipping": -1}, "must be a number of at least 0, not -1"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_place(content, wanted, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        check_deepspeed_values(read_deepspeed_config(path), path)
    message = str(caught.value)
    assert wanted in message and str(path) in message and "\n" not in message


def test_what_only_a_gpu_can_is_refused_without_one():
    quantised = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    check_gpu_options(quantised, "bf16")
    check_gpu_options(None, "no")
    with pytest.raises(UserError, match="zero_quantized_weights needs a GPU"):
        check_gpu_options(quantised, "no")


def test_keys_that_are_comments_are_left_out(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"_comment": "which models", "//": "a note", "zero_optimization": {"stage": 2}}')
    assert read_deepspeed_config(path) == {"zero_optimization": {"stage": 2}}


def test_a_key_that_occurs_twice_is_not_the_last_one(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match=r"ds.json is not JSON \(the key 'zero_optimization' occurs twice\)"):
        read_deepspeed_config(path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{\n  "train_batch_size": "auto", // all\n  "zero_optimization": {}\n}', "line 2 has a comment, '// all'"),
        ('{\n  "train_batch_size": "auto"\n\n  // all\n}', "line 4 has a comment, '// all'"),
        ('{\n  /* all */ "train_batch_size": "auto"\n}', "line 2 has a comment, '/* all */'"),
        ('# DeepSpeed\n{"train_batch_size": "auto"}', "line 1 has a comment, '# DeepSpeed'"),
        ('{"zero_optimization": {"stage": 2},\n}', "a comma too many before it"),
        ("{\n'zero_optimization': {}}", "line 2 has a single quote"),
        ('{"zero_optimization":\n {"overlap_comm": True}}', "line 2 has True, as in Python; write true, false or null"),
        ("\n", "it is empty"),
        ('{"train_batch_size" 8}', "at line 1, column 21"),
    ],
)
def test_what_is_almost_json_is_named_by_line(text, wanted, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_deepspeed_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not JSON (") and wanted in message and "\n" not in message


def test_what_deepspeed_has_removed_is_refused(tmp_path):
    from deepspeed.runtime import config

    path = tmp_path / "ds.json"
    for key in config._REMOVED_TOP_LEVEL_CONFIG_KEYS:  # DeepSpeed would refuse them after loading
        path.write_text(json.dumps({key: {"enabled": False}}))
        with pytest.raises(UserError, match=f"{key} is not supported, remove it"):
            read_deepspeed_config(path)
    for key in config._REMOVED_ZERO_CONFIG_KEYS:
        path.write_text(json.dumps({"zero_optimization": {key: 1}}))
        with pytest.raises(UserError, match=f"{key} is not a key of DeepSpeed"):
            check_deepspeed_values(read_deepspeed_config(path), path)


def test_the_line_of_training_args_is_like_the_argument(tmp_path, monkeypatch):
    config = tmp_path / "configs" / "lora.yaml"
    config.parent.mkdir()
    for folder in (tmp_path, config.parent):
        (folder / "ds.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert choose_deepspeed_file(None, config, None) is None
    assert choose_deepspeed_file(None, config, Path("other.json")) == Path("other.json")
    assert choose_deepspeed_file("ds.json", config, None) == config.parent / "ds.json"
    assert choose_deepspeed_file("other.json", config, None) == Path("other.json")
    assert choose_deepspeed_file("other.json", config, tmp_path / "other.json") == Path("other.json")
    with pytest.raises(UserError, match="keep one"):
        choose_deepspeed_file("ds.json", config, Path("other.json"))
    with pytest.raises(UserError, match=r"deepspeed .none\.json. does not exist"):
        choose_deepspeed_file("none.json", config, None)
