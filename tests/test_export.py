"""A merged model on disk: the same answers, two layouts, whole or not at all."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from helpers.chatglm3 import ChatGLM3ForCausalLM, ChatGLMTokenizer
from helpers.chatglm3.checkpoint import check_checkpoint
from helpers.errors import UserError, exit_with_one_line
from helpers.finetune import export as export_module
from helpers.finetune.export import export
from helpers.finetune.generate import answer
from helpers.finetune.loading import load_for_inference

pytestmark = pytest.mark.usefixtures("on_the_cpu", "progress_bars_afterwards")

PROMPTS = ["鱼尾裙", "类型#裤*版型#宽松", "Hello <|user|>", ""]
IDS = torch.arange(3, 43)[None]

# Run without this package: what somebody does who has transformers alone.
VANILLA = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "transformers.models.glm.modeling_glm", type(model)
with torch.no_grad():
    logits = model(torch.arange(3, 43)[None]).logits
generated = model.generate(torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False)
torch.save({"logits": logits, "generated": generated, "stops": model.generation_config.eos_token_id}, sys.argv[2])
try:
    AutoTokenizer.from_pretrained(sys.argv[1])
except Exception:
    pass
else:
    sys.exit("there is a tokenizer that transformers alone would get wrong")
assert not any(name.split(".")[0] == "helpers" for name in sys.modules)
"""


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
    export(adapter, tmp_path / "out", layout="glm")
    (tmp_path / "vanilla.py").write_text(VANILLA)
    done = subprocess.run(
        [sys.executable, tmp_path / "vanilla.py", tmp_path / "out", tmp_path / "result.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = torch.load(tmp_path / "result.pt")
    tuned, tokenizer = load_for_inference(adapter)
    torch.testing.assert_close(result["logits"], logits(tuned), rtol=0, atol=1e-5)
    expected = tuned.generate(input_ids=torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False)
    assert torch.equal(result["generated"], expected)
    assert result["stops"] == tokenizer.stop_token_ids


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
    monkeypatch.setattr(export_module, "SHARD_SIZE", "150KB")
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
    def fails(self, folder, **_):
        assert list(folder.glob("*.safetensors"))  # after the weights
        raise failure

    monkeypatch.setattr(ChatGLMTokenizer, "save_pretrained", fails)
    with pytest.raises((UserError, KeyboardInterrupt)) as error:
        export(adapter, tmp_path / "out")
    if not isinstance(failure, KeyboardInterrupt):
        assert f"{tmp_path / 'out'} cannot be written: " in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_named(tmp_path, adapter, small_checkpoint, small_run):
    with pytest.raises(UserError, match=r"holds no adapter; there is nothing to merge"):
        export(small_checkpoint, tmp_path / "out")
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
    with pytest.raises(UserError, match=r"the adapter in .*broken cannot be merged: NaNs"):
        export(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["published", "glm"])
def test_the_command_says_what_to_do_next(tmp_path, small_run, monkeypatch, capsys, layout):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export", str(small_run), str(out), "--layout", layout, "--dtype", "bfloat16"])
    exit_with_one_line(export_module.main)
    said = capsys.readouterr().out
    assert f"python -m helpers.finetune.generate {out}" in said
    assert (f"ChatGLMTokenizer.from_pretrained('{out / 'tokenizer'}')" in said) == (layout == "glm")
    assert load_for_inference(out, dtype="auto")[0].dtype == torch.bfloat16
    with pytest.raises(SystemExit) as leaving:
        exit_with_one_line(export_module.main)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"error: {out} is not empty; name a new folder\n"
