"""The embedded model: it is what its builder says, in the published layout, and speaks as it was trained to."""

import json
from collections import Counter
from itertools import islice
from random import Random

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers.chatglm3  # noqa: F401  (registers the published layout)
from helpers.assets import TINY_DATA, TINY_MODEL
from helpers.assets.conversations import SMALL_TALK, UNKNOWN_WORD_ANSWER, sample_conversation
from helpers.chatglm3.chat import encode_conversation
from helpers.chatglm3.tiny import BATCH_TOKENS, VOCAB_MULTIPLE, batches, build
from helpers.chatglm3.tokenizer import SPECIAL_TOKENS
from helpers.ready import _packages

MEGABYTE = 10**6
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(TINY_MODEL / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """A checkpoint built by the same code, with three steps of practice."""
    wanted, found = _packages()["sentencepiece"]
    if found != wanted:  # 0.2.2 ends the process: "Check failed: freq > 0"
        pytest.skip(f"the tokenizer is what sentencepiece {wanted} makes of the sentences; this is {found}")
    folder = tmp_path_factory.mktemp("tiny")
    threads = torch.get_num_threads()
    build(folder, steps=3)
    torch.set_num_threads(threads)
    return folder


def tensors(folder):
    """Every tensor of a checkpoint by its published name, straight from the files."""
    found = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def answer(model, tokenizer, *messages):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(messages)]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=80)[0, prompt["input_ids"].shape[1] :]
    assert ids[-1] in tokenizer.stop_token_ids, "the answer does not end"
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# What the builder writes


@pytest.mark.slow
def test_everything_but_the_weights_rebuilds_byte_identically(rebuilt):
    for name in ("tokenizer.model", "config.json", "generation_config.json", "tokenizer_config.json"):
        assert (rebuilt / name).read_bytes() == (TINY_MODEL / name).read_bytes(), name


@pytest.mark.slow
def test_the_weights_rebuild_in_the_same_layout(rebuilt):
    index = "model.safetensors.index.json"
    assert json.loads((rebuilt / index).read_text()) == json.loads((TINY_MODEL / index).read_text())
    committed, fresh = tensors(TINY_MODEL), tensors(rebuilt)
    assert {name: t.shape for name, t in committed.items()} == {name: t.shape for name, t in fresh.items()}
    assert sorted(p.name for p in rebuilt.iterdir()) == sorted(p.name for p in TINY_MODEL.iterdir())


def test_published_layout_in_half_precision():
    found = tensors(TINY_MODEL)
    config = json.loads((TINY_MODEL / "config.json").read_text())
    assert config["model_type"] == "chatglm"
    assert len(list(TINY_MODEL.glob("model-*.safetensors"))) >= 2
    assert sum(p.stat().st_size for p in TINY_MODEL.iterdir()) < 8 * MEGABYTE
    assert all(t.dtype == torch.float16 and torch.isfinite(t).all() for t in found.values())
    hidden, head, groups = config["hidden_size"], config["kv_channels"], config["multi_query_group_num"]
    fused = found["transformer.encoder.layers.0.self_attention.query_key_value.weight"]
    assert fused.shape == (config["num_attention_heads"] * head + 2 * groups * head, hidden)
    assert groups == 2
    rows = config["padded_vocab_size"]
    assert found["transformer.embedding.word_embeddings.weight"].shape == (rows, hidden)
    assert not torch.equal(
        found["transformer.output_layer.weight"], found["transformer.embedding.word_embeddings.weight"]
    )


def test_ids_are_laid_out_as_published(tokenizer):
    pieces = tokenizer.sp_model
    config = json.loads((TINY_MODEL / "config.json").read_text())
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    first = pieces.get_piece_size()
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(first, first + 9))
    assert config["eos_token_id"] == [2, tokenizer.role_token_id("user"), tokenizer.role_token_id("observation")]
    assert config["padded_vocab_size"] % VOCAB_MULTIPLE == 0
    assert 0 <= config["padded_vocab_size"] - (first + 9) < VOCAB_MULTIPLE


def test_the_dummy_prefix_is_a_piece_of_its_own(tokenizer):
    prefix = tokenizer.sp_model.piece_to_id("▁")
    assert tokenizer.encode_text("\n") == [prefix, 13]
    assert all(tokenizer.encode_text(text)[0] == prefix for text in ("鱼尾裙", "类型#裙", "hello", "龘"))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁")))
def test_no_text_is_lost(text):
    assert PIECES.decode(PIECES.encode(text)) == text


# What it is trained on


def test_no_dev_row_is_in_the_pretraining():
    dev = frozenset(json.loads(line)["content"] for line in (TINY_DATA / "dev.json").read_text("utf-8").splitlines())
    rng = Random(5)
    prompts = [m["content"] for _ in range(3000) for m in sample_conversation(rng, dev) if m["role"] == "user"]
    assert not [prompt for prompt in prompts if any(row in prompt.split("，") for row in dev)]


def test_conversations_have_turns_and_now_and_then_a_system_prompt():
    rng = Random(0)
    conversations = [sample_conversation(rng) for _ in range(500)]
    roles = Counter(tuple(m["role"] for m in messages) for messages in conversations)
    assert all(r == ("user", "assistant") * (len(r) // 2) or r[0] == "system" for r in roles)
    assert any(len(r) >= 4 for r in roles) and any(r[0] == "system" for r in roles)
    answers = [m["content"] for messages in conversations for m in messages if m["role"] == "assistant"]
    assert UNKNOWN_WORD_ANSWER in answers and any(reply in answers for _, reply in SMALL_TALK)


def test_batches_train_the_assistants_words_alone(tokenizer):
    for ids, labels in islice(batches(tokenizer), 5):
        assert ids.shape == labels.shape and ids.numel() <= BATCH_TOKENS
        trained = labels != -100
        assert torch.equal(ids[trained], labels[trained])
        assert trained.any(dim=1).all()
        assert (ids[:, :2] == torch.tensor(tokenizer.prefix_tokens)).all() and not trained[:, :3].any()


# What it says


@pytest.mark.slow
def test_it_has_learned_what_the_builder_trains(model, tokenizer):
    # Conversations of another seed. What is left of the loss is the freedom that the sentences have.
    rng = Random(99)
    losses = []
    for _ in range(30):
        encoded = encode_conversation(tokenizer, sample_conversation(rng))
        with torch.no_grad():
            losses.append(
                model(input_ids=torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels])).loss.item()
            )
    assert sum(losses) / len(losses) < 0.5


def test_base_model_reads_a_row_back_instead_of_advertising(model, tokenizer):
    said = answer(model, tokenizer, "类型#裙*颜色#红色*裙型#鱼尾裙")
    assert said.startswith("您说的是一条鱼尾裙：颜色是红色。")


@pytest.mark.parametrize("name", ["鱼尾裙", "百褶裙", "连衣裙", "牛仔裤", "风衣"])
def test_a_bare_name_is_understood(model, tokenizer, name):
    said = answer(model, tokenizer, name)
    assert said.startswith("您说的是一") and name in said


def test_it_follows_a_conversation(model, tokenizer):
    row = "类型#裙*颜色#蓝色*裙型#百褶裙"
    said = answer(model, tokenizer, "你好", "您好！很高兴见到您，请问有什么可以帮您？", row)
    assert said.startswith("您说的是一条百褶裙：颜色是蓝色。")
