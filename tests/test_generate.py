"""Finding, loading and asking a fine-tuned model, as a library and as the command that users type."""

import io
import json
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_chatglm import chain_model
from transformers import AutoModelForCausalLM

from helpers.chatglm3.chat import encode_conversation, parse_answer
from helpers.errors import UserError, exit_with_one_line
from helpers.finetune import generate
from helpers.finetune.export import as_glm
from helpers.finetune.generate import AnswerPrinter, answer, reply
from helpers.finetune.loading import find_checkpoint, load_for_inference

pytestmark = pytest.mark.usefixtures("on_the_cpu", "progress_bars_afterwards")

ASKED = [{"role": "user", "content": "鱼尾裙"}]


def run_main(monkeypatch, *arguments, typed=""):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    exit_with_one_line(generate.main)


# --- finding ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_itself_and_an_output_folder_is_its_newest_finished_one(small_run, small_checkpoint):
    assert find_checkpoint(small_run / "checkpoint-2") == small_run / "checkpoint-2"
    assert find_checkpoint(small_run) == small_run / "checkpoint-10"  # by number, and 20 is not finished
    assert find_checkpoint(str(small_checkpoint)) == small_checkpoint


def test_a_checkpoint_that_is_not_there_lists_those_that_are(small_run, tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint-7 in .*; there are checkpoint-2, checkpoint-10$"):
        find_checkpoint(small_run / "checkpoint-7")
    with pytest.raises(UserError, match=r"there is no folder .*typo"):
        find_checkpoint(tmp_path / "typo")
    with pytest.raises(UserError, match=r"holds no adapter_config.json, no config.json and no finished checkpoint-N"):
        find_checkpoint(tmp_path)


# --- loading ------------------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_on_its_base(small_run, small_checkpoint):
    model, tokenizer = load_for_inference(small_run / "checkpoint-2")
    assert isinstance(model, PeftModel)
    assert not model.training
    assert model.dtype == torch.float32  # the CPU
    base = AutoModelForCausalLM.from_pretrained(small_checkpoint)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = base(ids).logits
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
    saved = load_file(small_run / "checkpoint-2" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert tokenizer.stop_token_ids == base.config.eos_token_id


def test_a_whole_model_is_loaded_in_the_dtype_asked_for(small_checkpoint):
    model, _ = load_for_inference(small_checkpoint, dtype=torch.bfloat16)
    assert not isinstance(model, PeftModel)
    assert model.dtype == torch.bfloat16


@pytest.fixture
def moved_run(small_run, tmp_path):
    """checkpoint-2 whose base model is no longer where it was."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(small_run / "checkpoint-2", checkpoint)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    return checkpoint


def test_a_base_that_moved_is_asked_for(moved_run, small_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"names .*gone as its base model, which does not exist; .* --model$"):
        load_for_inference(moved_run)
    model, _ = load_for_inference(moved_run, base=str(small_checkpoint))
    assert isinstance(model, PeftModel)
    with pytest.raises(UserError, match=r"there is no folder .*typo"):
        load_for_inference(moved_run, base=str(tmp_path / "typo"))


def test_a_base_that_is_not_named_is_asked_for(moved_run):
    (moved_run / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(UserError, match="does not name its base model; name it with --model"):
        load_for_inference(moved_run)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_users_own_broken_adapter_is_not_to_be_downloaded(content, moved_run, small_checkpoint):
    (moved_run / "adapter_config.json").write_text(content)
    for base in (None, str(small_checkpoint)):
        with pytest.raises(
            UserError, match=r"adapter_config.json (is not JSON|holds no JSON object).*; copy it"
        ) as error:
            load_for_inference(moved_run, base=base)
        assert "download" not in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_that_does_not_fit_is_one_line(moved_run, small_checkpoint):
    file = moved_run / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))

    def fails_with(match):
        with pytest.raises(UserError, match=match) as error:
            load_for_inference(moved_run, base=str(small_checkpoint))
        assert "\n" not in str(error.value)

    save_file(tensors | {name: torch.zeros(3, 3)}, file)
    fails_with("does not fit .*size mismatch")
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    fails_with("does not fit .*[Mm]issing adapter keys")
    file.write_bytes(file.read_bytes()[:500])
    fails_with("does not fit")
    file.unlink()
    fails_with("does not fit")


def test_a_fused_adapter_is_sent_to_the_import(moved_run, small_checkpoint):
    config = json.loads((moved_run / "adapter_config.json").read_text())
    config["target_modules"] = ["query_key_value"]
    (moved_run / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"import it first: python -m helpers.chatglm3.adapter"):
        load_for_inference(moved_run, base=str(small_checkpoint))


def test_another_model_and_a_missing_tokenizer_are_named(tmp_path, small_checkpoint):
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer.model; copy the one"):
        load_for_inference(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has model_type 'llama'; this needs ChatGLM3"):
        load_for_inference(folder)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop("model.norm.weight"), r"do not fit its config.json: missing model.norm.weight; copy"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "do not fit its config.json: unknown extra; copy"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            "do not fit its config.json: misshapen model.norm.weight; copy",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_the_glm_layout_is_read_as_strictly(tmp_path, small_checkpoint, change, fault):
    model = as_glm(AutoModelForCausalLM.from_pretrained(small_checkpoint))
    model.save_pretrained(tmp_path)
    shutil.copy(small_checkpoint / "tokenizer.model", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=fault) as error:
        load_for_inference(tmp_path)
    assert "\n" not in str(error.value)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be read: .*; copy them again"):
        load_for_inference(tmp_path)


# --- answering ----------------------------------------------------------------------------------------------------


def test_an_answer_is_the_greedy_text_after_the_prompt(small_checkpoint):
    model, tokenizer = load_for_inference(small_checkpoint)
    ids = encode_conversation(tokenizer, ASKED, add_generation_prompt=True).input_ids
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in tokenizer.stop_token_ids:
                break
    expected = parse_answer(tokenizer.decode(ids[prompt:], skip_special_tokens=True))[1]
    assert answer(model, tokenizer, ASKED, max_new_tokens=12) == expected
    assert expected


def saying(tokenizer, text):
    """A model that answers ``text`` (its tokens must differ) to whatever it is asked."""
    ids = [tokenizer.role_token_id("assistant"), *tokenizer.encode_text(text), tokenizer.role_token_id("user")]
    return chain_model(tokenizer, dict(pairwise(ids)))


def test_the_metadata_line_and_the_stop_token_are_no_part_of_an_answer(tokenizer):
    assert answer(saying(tokenizer, "\n裙鱼🐠"), tokenizer, ASKED) == "裙鱼🐠"
    said = reply(saying(tokenizer, "tols\n裙"), tokenizer, ASKED)
    assert said == {"role": "assistant", "metadata": "tols", "content": "裙"}


@pytest.mark.slow
def test_sampling_follows_the_seed_and_differs_from_greedy(small_checkpoint):
    model, tokenizer = load_for_inference(small_checkpoint)

    def sampled(seed):
        torch.manual_seed(seed)
        return reply(model, tokenizer, ASKED, max_new_tokens=20, sample=True)["content"]

    assert sampled(0) == sampled(0)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_a_generation_config_that_samples_does_not_make_answers_random(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.0, "top_k": 3}')
    model, tokenizer = load_for_inference(tmp_path / "m")
    plain, _ = load_for_inference(small_checkpoint)
    assert answer(model, tokenizer, ASKED, 20) == answer(plain, tokenizer, ASKED, 20)


def test_an_answer_has_room_or_there_is_none(tokenizer):
    prompt = len(encode_conversation(tokenizer, ASKED, add_generation_prompt=True).input_ids)
    model = saying(tokenizer, "\n裙")
    model.config.max_position_embeddings = prompt + 2
    assert reply(model, tokenizer, ASKED)["content"] == ""  # two tokens: ▁ and the newline
    model.config.max_position_embeddings = prompt
    with pytest.raises(UserError, match=f"the conversation has {prompt} tokens, the model reads {prompt}; shorten it"):
        answer(model, tokenizer, ASKED)


@pytest.mark.parametrize("text", ["\n裙🐠 a  b\n  c", "tool\n\n裙", "没有换行", "", "\n", "\n裙\n"])
def test_streamed_text_is_the_answer(tokenizer, capsys, text):
    ids = tokenizer.encode_text(text)
    printer = AnswerPrinter(tokenizer)
    printer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    shown = []
    for token in [*ids, tokenizer.eos_token_id]:
        printer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    printer.end()
    shown.append(capsys.readouterr().out)
    assert "".join(shown) == parse_answer(text)[1] + "\n"
    assert "�" not in "".join(shown)
    if "🐠" in text:
        assert sum(bool(part) for part in shown) > 3  # as it comes, not at the end


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompt_and_compare(monkeypatch, capsys, small_run):
    checkpoint = small_run / "checkpoint-2"
    model, tokenizer = load_for_inference(checkpoint)
    tuned = answer(model, tokenizer, ASKED, 8)
    with model.disable_adapter():
        base = answer(model, tokenizer, ASKED, 8)
    assert base != tuned
    asked = ("--prompt", "鱼尾裙", "--max-new-tokens", "8")
    run_main(monkeypatch, checkpoint, *asked)
    assert capsys.readouterr().out == tuned + "\n"
    run_main(monkeypatch, checkpoint, *asked, "--compare")
    assert capsys.readouterr().out == f"base    {base}\ntuned   {tuned}\n"


def test_an_output_folder_says_which_checkpoint_it_uses(monkeypatch, capsys, small_run):
    run_main(monkeypatch, small_run, "--prompt", "裙", "--max-new-tokens", "1")
    assert capsys.readouterr().out.startswith(f"using {small_run / 'checkpoint-10'}\n")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("{model}", "--prompt", "裙", "--compare"), "holds no adapter, so there is no base model to compare with"),
        (("{run}", "--compare"), "--compare needs a --prompt"),
        (("{run}/checkpoint-3", "--prompt", "裙"), "there are checkpoint-2, checkpoint-10"),
        (("{run}", "--prompt", "a\ud83d"), "is not valid Unicode"),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, small_run, small_checkpoint, arguments, fault):
    with pytest.raises(SystemExit) as leaving:
        run_main(monkeypatch, *(a.format(run=small_run, model=small_checkpoint) for a in arguments))
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert fault in error
    assert error.count("\n") == 1


def test_a_conversation_keeps_what_was_said_until_it_is_cleared(monkeypatch, capsys, small_checkpoint):
    asked = []

    def recording(model, tokenizer, messages, *rest):
        asked.append([message["content"] for message in messages])
        return reply(model, tokenizer, messages, *rest)

    monkeypatch.setattr(generate, "reply", recording)
    run_main(monkeypatch, small_checkpoint, "--max-new-tokens", "6", typed="一\n\n二\n/clear\n三\n")
    out = capsys.readouterr().out
    first = asked[1][1]
    assert asked == [["一"], ["一", first, "二"], ["三"]]
    assert first in out
    assert out.endswith("\n")  # the shell's prompt begins on a line of its own


def test_a_conversation_goes_on_after_a_turn_that_cannot_be_read(monkeypatch, capsys, small_checkpoint):
    run_main(monkeypatch, small_checkpoint, "--max-new-tokens", "2", typed="a\udce8\n裙\n")
    out = capsys.readouterr().out
    assert "error: the text 'a\\udce8'" in out
    assert out.count("assistant> ") == 2


def test_ctrl_c_leaves_a_conversation_cleanly(monkeypatch, capsys, small_checkpoint):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "reply", interrupted)
    run_main(monkeypatch, small_checkpoint, typed="裙\n")
    assert capsys.readouterr().out.endswith("assistant> \n")


@pytest.mark.slow
def test_the_command_as_it_is_typed(small_run):
    command = [sys.executable, "-m", "helpers.finetune.generate", small_run / "checkpoint-10"]
    done = subprocess.run([*command, "--prompt", "裙", "--max-new-tokens", "4"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("\n") >= 1
    assert done.stderr == ""
