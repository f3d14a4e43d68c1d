"""The tokenizer: ids, batching, files, and that no text ever becomes a special token."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chatglm import CORPUS, small_config, small_tokenizer
from transformers import AutoTokenizer

from helpers.chatglm3 import ChatGLMTokenizer
from helpers.chatglm3.tokenizer import SPECIAL_TOKENS
from helpers.errors import UserError

SPELLED = [*SPECIAL_TOKENS, "</s>", "<s>", "<unk>", "<pad>", "<0x0A>"]
# SentencePiece writes a space as U+2581, so the two cannot be told apart; half a surrogate pair is no text.
CHARACTERS = st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])
TEXTS = st.lists(st.one_of(st.text(CHARACTERS), st.sampled_from(SPELLED), st.sampled_from(CORPUS)), max_size=5).map(
    "".join
)


# --- ids ----------------------------------------------------------------------------------------------------------


def test_special_tokens_have_the_ids_after_the_last_piece(tokenizer):
    first = tokenizer.sp_model.get_piece_size()
    order = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert tokenizer.convert_tokens_to_ids(order) == list(range(first, first + 9))
    assert tokenizer.convert_ids_to_tokens(list(range(first, first + 9))) == order
    assert [tokenizer.role_token_id(role) for role in ("system", "user", "assistant", "observation")] == [
        first + 5,
        first + 6,
        first + 7,
        first + 8,
    ]
    assert tokenizer.vocab_size == len(tokenizer) == first + 9
    assert len(tokenizer.get_vocab()) == first + 9
    assert tokenizer.stop_token_ids == [2, first + 6, first + 8]


def test_control_ids_are_the_published_ones(tokenizer):
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 0, 1, 2)


def test_a_newline_is_a_byte_and_every_text_has_its_own_dummy_prefix(tokenizer):
    prefix = tokenizer.convert_tokens_to_ids("▁")
    assert tokenizer.encode_text("\n") == [prefix, 13]  # bytes follow <unk>, <s> and </s>
    assert tokenizer.encode_text("\n\n") == [prefix, 13, 13]
    assert tokenizer.encode_text("") == []


def test_half_a_surrogate_pair_is_one_clear_line(tokenizer):
    with pytest.raises(UserError, match=r"^the text 'a.ud83d' .* is not valid Unicode"):
        tokenizer.encode_text("a\ud83d")


def test_a_plain_call_puts_gmask_and_sop_in_front(tokenizer):
    gmask, sop = tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
    words = tokenizer.encode_text("宽松的裤")
    assert tokenizer("宽松的裤")["input_ids"] == [gmask, sop, *words]
    assert tokenizer("宽松的裤", add_special_tokens=False)["input_ids"] == words


# --- text is never anything else ----------------------------------------------------------------------------------


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_holds_no_special_id(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert all(2 < token < tokenizer.sp_model.get_piece_size() for token in ids)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("spelled", SPELLED)
def test_text_that_spells_a_special_token_stays_text(tokenizer, spelled):
    ids = tokenizer(f"a{spelled}b {spelled}")["input_ids"][2:]
    assert all(2 < token < tokenizer.sp_model.get_piece_size() for token in ids)


def test_a_piece_that_is_called_like_a_special_token_is_that_piece(tmp_path):
    # "sop" is an ordinary part of words, and may be a piece of its own.
    tokenizer = small_tokenizer(tmp_path, (*CORPUS, *["sop eop aesop"] * 20))
    piece = tokenizer.sp_model.piece_to_id("sop")
    assert 2 < piece < tokenizer.sp_model.get_piece_size()
    assert piece in tokenizer.sp_model.encode("裙sop")
    assert tokenizer("裙sop", add_special_tokens=False)["input_ids"] == tokenizer.sp_model.encode("裙sop")
    assert tokenizer.prefix_tokens[1] == tokenizer.sp_model.get_piece_size() + 3


# --- decoding -----------------------------------------------------------------------------------------------------


def test_special_tokens_are_decoded_by_name_or_skipped(tokenizer):
    ids = [*tokenizer.prefix_tokens, *tokenizer.encode_text("你好"), tokenizer.role_token_id("user"), 2, 0, 511]
    assert tokenizer.decode(ids) == "[gMASK]sop你好<|user|></s><unk><unk>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你好"
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == "你好"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.role_token_id("user")) == "<|user|>"


def test_a_character_of_several_byte_pieces_is_whole_again(tokenizer):
    ids = tokenizer.encode_text("鲲🐟")  # not in the training text: bytes
    assert len(ids) > 7
    assert tokenizer.decode(ids) == "鲲🐟"


# --- batches ------------------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_left(tokenizer):
    texts = ["裙", "宽松的阔腿裤这两年真的吸粉不少"]
    single = [tokenizer(text)["input_ids"] for text in texts]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    gap = len(single[1]) - len(single[0])
    assert padded["input_ids"].tolist() == [[0] * gap + single[0], single[1]]
    assert padded["attention_mask"].tolist() == [[0] * gap + [1] * len(single[0]), [1] * len(single[1])]
    assert tokenizer.batch_decode(padded["input_ids"], skip_special_tokens=True) == texts


def test_truncation_and_padding_to_a_length(tokenizer):
    batch = tokenizer(["裙", "宽松的阔腿裤" * 5], truncation=True, padding="max_length", max_length=12)
    assert [len(ids) for ids in batch["input_ids"]] == [12, 12]
    assert batch["input_ids"][0][:3] == [0, 0, 0]
    assert batch["input_ids"][1] == tokenizer("宽松的阔腿裤" * 5)["input_ids"][:12]


# --- files --------------------------------------------------------------------------------------------------------


def published_tokenizer_config(tokenizer) -> dict:
    """What checkpoints carry: the first files named the class alone, later ones list the special tokens as well."""
    listed = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, i in tokenizer.special_token_ids.items()
    }
    return {
        "name_or_path": "THUDM/chatglm3-6b",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "added_tokens_decoder": listed,
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        "chat_template": "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}",
    }


@pytest.fixture(params=["first", "later"])
def published_folder(request, tmp_path, tokenizer):
    config = published_tokenizer_config(tokenizer)
    if request.param == "first":
        config = {key: config[key] for key in list(config)[:5]}
    small_config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(tokenizer.vocab_file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", ["{", "", "[]", "\xff"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_damaged_file_beside_the_vocabulary_is_named(tmp_path, tokenizer, name, content):
    shutil.copy(tokenizer.vocab_file, tmp_path)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name} (is not JSON .*; copy|holds no JSON object.*; copy|is not UTF-8)"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_auto_tokenizer_reads_a_published_folder(published_folder, tokenizer):
    loaded = AutoTokenizer.from_pretrained(published_folder)
    assert type(loaded) is ChatGLMTokenizer
    text = "你好<|user|>sop</s>"
    assert loaded(text) == tokenizer(text)
    assert loaded.special_token_ids == tokenizer.special_token_ids
    assert loaded.padding_side == "left"
    messages = [{"role": "user", "content": "<|assistant|>"}]
    assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_a_saved_tokenizer_is_the_same_again(published_folder, tmp_path):
    loaded = AutoTokenizer.from_pretrained(published_folder)
    saved = tmp_path / "saved"
    loaded.save_pretrained(saved)
    assert (saved / "tokenizer.model").read_bytes() == (published_folder / "tokenizer.model").read_bytes()
    assert str(tmp_path) not in (saved / "tokenizer_config.json").read_text()
    small_config().save_pretrained(saved)
    again = AutoTokenizer.from_pretrained(saved)
    assert type(again) is ChatGLMTokenizer
    assert again("你好<|user|>sop</s>") == loaded("你好<|user|>sop</s>")
    loaded.save_pretrained(published_folder)  # onto itself: the file must survive
    assert ChatGLMTokenizer.from_pretrained(published_folder)("裙") == again("裙")


def test_copies_for_other_processes_work(tokenizer):
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other("你好") == tokenizer("你好")
        assert other.apply_chat_template([{"role": "user", "content": "裙"}])


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_missing_or_wrong_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model") as error:
        ChatGLMTokenizer(str(path))
    assert "\n" not in str(error.value)


# --- chat template ------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好，请问？"},
    {"role": "user", "content": "裙"},
]


def test_chat_template_of_one_conversation_and_of_a_batch(tokenizer):
    one = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert set(one) == {"input_ids", "attention_mask"}
    assert one["input_ids"][:2] == tokenizer.prefix_tokens
    assert one["input_ids"][-1] == tokenizer.role_token_id("assistant")
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False) == one["input_ids"]
    short = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)["input_ids"]
    batch = tokenizer.apply_chat_template(
        [MESSAGES, MESSAGES[:1]], add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    gap = len(one["input_ids"]) - len(short)
    assert batch["input_ids"].tolist() == [one["input_ids"], [0] * gap + short]
    assert batch["attention_mask"].tolist()[1] == [0] * gap + [1] * len(short)
    tensor = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt")["input_ids"]
    assert tensor.tolist() == [tokenizer.apply_chat_template(MESSAGES)["input_ids"]]


def test_chat_template_as_text_is_for_people(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert text == "[gMASK]sop<|user|>\n 你好<|assistant|>"
    assert tokenizer.apply_chat_template([MESSAGES[:1]] * 2, tokenize=False, add_generation_prompt=True) == [text] * 2


def test_assistant_mask_marks_the_answer_and_its_stop_token_also_when_padded(tokenizer):
    batch = tokenizer.apply_chat_template(
        [MESSAGES[:2], MESSAGES], padding=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    short, long = batch["input_ids"].tolist()
    chosen = [
        [token for token, kept in zip(ids, mask, strict=True) if kept]
        for ids, mask in zip((short, long), batch["assistant_masks"].tolist(), strict=True)
    ]
    answer = tokenizer.encode_text("\n") + tokenizer.encode_text("你好，请问？")
    assert chosen == [[*answer, tokenizer.eos_token_id], [*answer, tokenizer.role_token_id("user")]]


def test_chat_template_truncates_ids_and_mask_alike(tokenizer):
    result = tokenizer.apply_chat_template(MESSAGES, truncation=True, max_length=9, return_assistant_tokens_mask=True)
    assert len(result["input_ids"]) == len(result["assistant_masks"]) == 9
    assert result["input_ids"] == tokenizer.apply_chat_template(MESSAGES)["input_ids"][:9]


def test_chat_template_refuses_what_it_would_ignore(tokenizer):
    tokenizer.apply_chat_template(MESSAGES, continue_final_message=False, documents=None)  # off: as pipelines pass them
    with pytest.raises(TypeError, match="continue_final_message"):
        tokenizer.apply_chat_template(MESSAGES, continue_final_message=True)
