"""Tokens, keys and passwords reach neither run.json nor a message."""

import json

import pytest
from small_finetune import ONE_RANK, merged

from helpers.config.deepspeed import read_deepspeed_config
from helpers.config.finetune import parse_finetune_config, read_finetune_config
from helpers.config.secrets import find_secret, is_secret, without_secrets
from helpers.errors import UserError
from helpers.finetune.run_folder import RunFile

TOKEN = "hf_aBcDeF"
SECRET_KEYS = (
    "hub_token",
    "token",
    "api_key",
    "apiKey",
    "API-KEY",
    "access_key",
    "client_secret",
    "Password",
    "db.passwd",
)
OTHER_KEYS = (
    "max_new_tokens",
    "trainable_token_indices",
    "include_num_input_tokens_seen",
    "key",
    "monkey",
    "tokenizer",
)


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_a_key_that_names_a_secret(key):
    assert is_secret(key) and find_secret({"a": [{key: TOKEN}]}) == f"a.{key}"
    assert without_secrets({"a": [{key: TOKEN, "b": 1}]}) == {"a": [{key: "***", "b": 1}]}
    for nothing in (None, "", True):
        assert find_secret({key: nothing}) is None and without_secrets({key: nothing}) == {key: nothing}


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_a_key_that_only_sounds_like_one(key):
    assert not is_secret(key) and without_secrets({key: TOKEN}) == {key: TOKEN} and find_secret({key: [1]}) is None


def test_a_password_in_an_address():
    address = {"url": "https://me:secret@host/path", "plain": "https://host/a@b"}
    assert without_secrets(address) == {"url": "https://***@host/path", "plain": "https://host/a@b"}
    assert find_secret(address) == "url"


def test_run_json_has_none(tmp_path):
    content = {
        "config": {"training": {"hub_token": TOKEN}},
        "deepspeed": {"comet": {"api_key": TOKEN}, "monitors": [{"password": TOKEN}]},
        "training_arguments": {"deepspeed": {"comet": {"api_key": TOKEN}}, "push_to_hub_token": TOKEN},
        "error": f"https://me:{TOKEN}@host does not answer",
    }
    RunFile(tmp_path / "run.json", ONE_RANK, content).update()
    assert TOKEN not in (tmp_path / "run.json").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["config"]["training"] == {"hub_token": "***"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"comet": {"api_key": TOKEN}},
            "comet.api_key would be saved with each checkpoint; remove it, and set COMET",
        ),
        ({"wandb": {"token": TOKEN}}, "wandb.token would be saved with each checkpoint; remove it, and set it as a"),
        ({"hub_token": TOKEN}, "hub_token would be saved"),
    ],
)
def test_a_deepspeed_file_with_one_is_refused(content, said, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_deepspeed_config(tmp_path / "ds.json")
    assert said in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "training",
    [
        {"hub_token": [TOKEN]},
        {"hub_token": {"a": TOKEN}},
        {"deepspeed": {"comet": {"api_key": TOKEN}}},
        {"hub_tokn": TOKEN},
    ],
)
def test_a_message_about_a_configuration_has_none(training):
    with pytest.raises(UserError) as caught:
        parse_finetune_config(merged({"peft_config": {"r": 1}}, {"training_args": training}), "lora.yaml")
    assert TOKEN not in str(caught.value)


def test_a_token_that_is_not_used_is_not_kept():
    config = parse_finetune_config({"peft_config": {"r": 1}, "training_args": {"hub_token": TOKEN}}, "lora.yaml")
    assert TOKEN not in repr(config) and any("hub_token is ignored" in note for note in config.notes)


@pytest.mark.parametrize("line", ["'", "\t", ": :", "@", ", ]"])
def test_a_line_that_is_no_yaml_is_named_and_not_shown(line, tmp_path):
    (tmp_path / "lora.yaml").write_text(f"training_args:\n  hub_token: {line}{TOKEN}\n  b: [\n")
    with pytest.raises(UserError, match=r"is not YAML: .*, line \d, column \d+$") as caught:
        read_finetune_config(tmp_path / "lora.yaml")
    assert TOKEN not in str(caught.value)
