"""A merged model on disk: the same answers, two layouts, whole or not at all."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_chatglm import random_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from helpers.assets import TINY_DATA, TINY_MODEL
from helpers.chatglm3 import ChatGLM3ForCausalLM, ChatGLMTokenizer
from helpers.chatglm3.checkpoint import check_checkpoint
from helpers.errors import UserError, exit_with_one_line
from helpers.finetune import export as export_module
from helpers.finetune import whole_model
from helpers.finetune.export import export
from helpers.finetune.generate import answer
from helpers.finetune.loading import load_for_inference

pytestmark = pytest.mark.usefixtures("on_the_cpu", "progress_bars_afterwards")

PROMPTS = ["鱼尾裙", "类型#裤*版型#宽松", "Hello <|user|>", ""]
IDS = torch.arange(3, 43)[None]

# Run without this package: what somebody does who has transformers alone, and only the folder.
VANILLA = """
import json, sys, torch
sys.modules["helpers"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, asked, result = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
asked = json.load(open(asked, encoding="utf-8"))
found = {"ids": [tokenizer(text)["input_ids"] for text in asked["texts"]]}
found["chats"] = [
    tokenizer.apply_chat_template(**chat, add_generation_prompt=True)["input_ids"] for chat in asked["chats"]
]
if asked["model"]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "transformers.models.glm.modeling_glm", type(model)
    with torch.no_grad():
        found["logits"] = model(torch.arange(3, 43)[None]).logits
    found["stops"] = model.generation_config.eos_token_id
    found["answers"] = []
    for ids in found["chats"]:
        said = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids):]
        found["answers"].append((said.tolist(), tokenizer.decode(said, skip_special_tokens=True)))
torch.save(found, result)
"""
CHATS = [
    *({"conversation": [{"role": "user", "content": text}]} for text in PROMPTS if "<|" not in text),
    {
        "conversation": [{"role": "system", "content": "简约"}, {"role": "user", "content": "鱼尾裙"}],
        "tools": [{"n": "裙"}],
    },
    {
        "conversation": [
            {"role": "user", "content": "天气"},
            {"role": "tool", "name": "look", "parameters": {"of": "裙", "n": 1.5}, "observation": {"found": None}},
            {"role": "assistant", "content": " 好 "},
            {"role": "user", "content": "谢谢"},
        ]
    },
]


def ask_vanilla(tmp_path, folder, texts=(), model=True):
    (tmp_path / "vanilla.py").write_text(VANILLA)
    (tmp_path / "asked.json").write_text(json.dumps({"texts": list(texts), "chats": CHATS, "model": model}))
    done = subprocess.run(
        [sys.executable, "vanilla.py", folder, "asked.json", "result.pt"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "token" not in done.stderr, done.stderr  # no warning about the tokenizer
    return torch.load(tmp_path / "result.pt")


def greedy(model, ids):
    return model.generate(input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()


def expected_chats(tokenizer):
    return [tokenizer.apply_chat_template(**chat, add_generation_prompt=True)["input_ids"] for chat in CHATS]


@pytest.fixture(scope="module")
def adapter(small_run):
    return small_run / "checkpoint-10"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.slow
def test_the_published_layout_answers_like_the_adapter(tmp_path, adapter, small_checkpoint):
    export(adapter, tmp_path / "out")
    check_checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (small_checkpoint / "tokenizer.model").read_bytes()
    written, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", small_checkpoint)
    )
    assert written == original
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}  # as readable as anything else that is written here
    merged, tokenizer = load_for_inference(tmp_path / "out")
    tuned, _ = load_for_inference(adapter)
    assert type(merged) is ChatGLM3ForCausalLM
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")) is ChatGLMTokenizer
    assert merged.generation_config.eos_token_id == tokenizer.stop_token_ids
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=0, atol=1e-5)
    base, _ = load_for_inference(small_checkpoint)
    answers = {
        name: [answer(model, tokenizer, [{"role": "user", "content": prompt}], 16) for prompt in PROMPTS]
        for name, model in (("merged", merged), ("tuned", tuned), ("base", base))
    }
    assert answers["merged"] == answers["tuned"]
    assert answers["merged"] != answers["base"]


def test_only_what_the_adapter_trained_is_changed(tmp_path, adapter, small_checkpoint):
    export(adapter, tmp_path / "out")
    before, after = load_file(small_checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.encoder.layers.{n}.self_attention.query_key_value.weight" for n in (0, 1)}


@pytest.mark.slow
def test_transformers_alone_loads_the_glm_layout(tmp_path, adapter):
    """Same ids, logits, answers and text, with this package blocked: what a server does that has the folder only."""
    export(adapter, tmp_path / "out", layout="glm")
    found = ask_vanilla(tmp_path, tmp_path / "out", PROMPTS[:2])
    tuned, tokenizer = load_for_inference(adapter)
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in PROMPTS[:2]]
    assert found["chats"] == expected_chats(tokenizer)
    assert found["stops"] == tokenizer.stop_token_ids
    torch.testing.assert_close(found["logits"], logits(tuned), rtol=0, atol=1e-5)
    for ids, (said, _) in zip(found["chats"], found["answers"], strict=True):
        assert said == greedy(tuned, ids)  # noise, half characters among it, which libraries show in different ways


@pytest.mark.slow
def test_transformers_alone_answers_like_the_embedded_model(tmp_path):
    """With words for answers: the same text, and the same ids of every text of the data set."""
    random_lora(TINY_MODEL, seed=1, scale=0.01).save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", layout="glm", dtype=torch.float32)
    rows = [json.loads(line) for file in sorted(TINY_DATA.glob("*.json")) for line in file.open(encoding="utf-8")]
    texts = [text for row in rows for text in row.values()]
    assert len(texts) >= 1000
    found = ask_vanilla(tmp_path, tmp_path / "out", texts)
    tuned, tokenizer = load_for_inference(tmp_path / "adapter")
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in texts]
    assert found["chats"] == expected_chats(tokenizer)
    assert found["answers"] == [
        (said, tokenizer.decode_ids(said, skip_special_tokens=True))
        for said in (greedy(tuned, ids) for ids in found["chats"])
    ]
    assert len({text for _, text in found["answers"]}) > 2


@pytest.mark.slow
def test_transformers_alone_reads_the_tokenizer_of_the_published_layout(tmp_path, adapter):
    export(adapter, tmp_path / "out")
    found = ask_vanilla(tmp_path, tmp_path / "out", PROMPTS[:2], model=False)
    _, tokenizer = load_for_inference(adapter)
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in PROMPTS[:2]]
    assert found["chats"] == expected_chats(tokenizer)


def test_the_glm_layout_names_what_servers_look_for(tmp_path, adapter, small_checkpoint):
    """vLLM and SGLang choose the code by ``architectures`` and stop at generation_config.json's ids.

    vllm/model_executor/models/registry.py has GlmForCausalLM; SGLang runs it with transformers' own code. Both may come
    with transformers 4, whose GlmConfig reads the rotary base and the dtype under other names than version 5.
    """
    long = tmp_path / "long"
    shutil.copytree(small_checkpoint, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"rope_ratio": 50}))
    export(adapter, tmp_path / "out", layout="glm", base=str(long))
    config, generation, tokenizer = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert (config["architectures"], config["model_type"]) == (["GlmForCausalLM"], "glm")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert len(config["eos_token_id"]) == 3 and generation["eos_token_id"] == config["eos_token_id"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in tokenizer
    assert "auto_map" not in config and tokenizer["chat_template"]


@pytest.mark.slow
def test_this_package_asks_the_glm_layout_too(tmp_path, adapter):
    export(adapter, tmp_path / "out", layout="glm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "glm"
    model, tokenizer = load_for_inference(tmp_path / "out")
    assert type(model) is GlmForCausalLM
    tuned, _ = load_for_inference(adapter)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        assert answer(model, tokenizer, messages, 16) == answer(tuned, tokenizer, messages, 16)


def test_rope_ratio_reaches_both_layouts(tmp_path, adapter, small_checkpoint):
    long = tmp_path / "long"
    shutil.copytree(small_checkpoint, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"rope_ratio": 50}))
    expected = logits(load_for_inference(adapter, base=str(long))[0])
    for layout in ("published", "glm"):
        export(adapter, tmp_path / layout, layout=layout, base=str(long))
        torch.testing.assert_close(logits(load_for_inference(tmp_path / layout)[0]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["published", "glm"])
def test_the_dtype_is_the_base_models_or_the_one_asked_for(tmp_path, adapter, small_checkpoint, layout):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(small_checkpoint, dtype=torch.float16).save_pretrained(half)
    shutil.copy(small_checkpoint / "tokenizer.model", half)
    for dtype, expected in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        out = tmp_path / str(expected)
        export(adapter, out, layout=layout, dtype=dtype, base=str(half))
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {expected}
        assert AutoModelForCausalLM.from_pretrained(out).dtype == expected


def test_a_large_model_is_written_in_shards(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr(whole_model, "SHARD_SIZE", "150KB")
    export(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    check_checkpoint(tmp_path / "out")
    assert torch.equal(logits(load_for_inference(tmp_path / "out")[0]), logits(load_for_inference(tmp_path / "out")[0]))


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_free_stays_as_it_is(tmp_path, adapter):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out is not empty; name a new folder"):
        export(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"mine.txt is a file; name a new folder"):
        export(adapter, tmp_path / "out" / "mine.txt")


def test_an_empty_folder_is_free(tmp_path, adapter):
    export(adapter, tmp_path)
    check_checkpoint(tmp_path)


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(tmp_path, adapter, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    monkeypatch.setattr(export_module, "load_for_inference", None)
    with pytest.raises(UserError, match=r"out needs 0\.01 GiB, and .* has 0\.00 GiB left; choose another disk"):
        export(adapter, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_a_write_that_fails_leaves_nothing(tmp_path, adapter, monkeypatch, failure):
    def fails(self, folder):
        assert list(Path(folder).glob("*.safetensors"))  # after the weights
        raise failure

    monkeypatch.setattr(ChatGLMTokenizer, "save_vocabulary", fails)
    with pytest.raises((UserError, KeyboardInterrupt)) as error:
        export(adapter, tmp_path / "out")
    if not isinstance(failure, KeyboardInterrupt):
        assert f"{tmp_path / 'out'} cannot be written: " in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_named(tmp_path, adapter, small_checkpoint, small_run):
    with pytest.raises(UserError, match=r"is a whole model and not an adapter of .*; remove --model"):
        export(small_checkpoint, tmp_path / "out", base=str(small_checkpoint))
    export(adapter, tmp_path / "glm", layout="glm")
    with pytest.raises(UserError, match=r"glm is not in the published layout; name one that is with --model"):
        export(adapter, tmp_path / "out", base=str(tmp_path / "glm"))
    with pytest.raises(UserError, match=r"there is no checkpoint-3 in .*; there are checkpoint-2, checkpoint-10"):
        export(small_run / "checkpoint-3", tmp_path / "out")


def test_an_adapter_with_nan_is_not_merged(tmp_path, adapter):
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"the adapter in .*broken holds nan or infinite numbers; use an earlier checkpoint"
    ):
        export(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def base(tmp_path, small_checkpoint):
    """A copy of the base model, to be changed."""
    return shutil.copytree(small_checkpoint, tmp_path / "base")


@pytest.mark.parametrize("layout", ["published", "glm"])
def test_sampling_values_of_a_base_that_does_not_sample_are_left_out(tmp_path, adapter, base, capsys, layout):
    greedy = {"do_sample": False, "temperature": 0.8, "top_p": 0.8, "max_length": 8192, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(greedy))
    export(adapter, tmp_path / "out", layout=layout, base=str(base))
    assert "these are left out: temperature = 0.8, top_p = 0.8" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["max_length"] == 8192 and not written.keys() & {"temperature", "top_p"}
    assert len(written["eos_token_id"]) == 3


def test_sampling_values_of_a_base_that_samples_stay(tmp_path, adapter, base, capsys):
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.8}))
    export(adapter, tmp_path / "out", base=str(base))
    assert "left out" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.8


def test_a_base_without_generation_config_is_exported_with_its_stop_tokens(tmp_path, adapter, base):
    (base / "generation_config.json").unlink()
    export(adapter, tmp_path / "out", base=str(base))
    assert len(json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", "{", r"generation_config.json is not JSON .*; correct or remove it"),
        ("generation_config.json", '{"max_new_tokens": 0}', r"generation_config.json: .*max_new_tokens.* correct or"),
        ("generation_config.json", '{"early_stopping": "soon"}', r"generation_config.json: .*early_stopping.* correct"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not JSON .*; copy it again, or remove it"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json holds no JSON object but a list; copy it again"),
        ("special_tokens_map.json", "", r"special_tokens_map.json is not JSON .*; copy it again, or remove it"),
    ],
)
def test_a_damaged_file_of_the_base_is_named(tmp_path, adapter, base, name, content, message):
    (base / name).write_text(content)
    with pytest.raises(UserError, match=message):
        export(adapter, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["published", "glm"])
def test_the_command_says_what_to_do_next(tmp_path, small_run, monkeypatch, capsys, layout):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export", str(small_run), str(out), "--layout", layout, "--dtype", "bfloat16"])
    exit_with_one_line(export_module.main)
    said = capsys.readouterr().out
    assert f"python -m helpers.finetune.generate {out}" in said
    assert (f"vllm serve {out}" in said) == (layout == "glm")
    assert load_for_inference(out, dtype="auto")[0].dtype == torch.bfloat16
    with pytest.raises(SystemExit) as leaving:
        exit_with_one_line(export_module.main)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"error: {out} is not empty; name a new folder\n"
