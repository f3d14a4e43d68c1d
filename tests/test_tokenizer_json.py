"""``tokenizer.json`` and the chat template against the SentencePiece tokenizer that they stand for.

``CHATGLM3_TOKENIZER=/path/to/tokenizer.model`` runs the file on a published tokenizer, too.
"""

import io
import json
import os
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from small_chatglm import CORPUS
from transformers import PreTrainedTokenizerFast

from helpers.assets import TINY_DATA, TINY_MODEL
from helpers.chatglm3 import ChatGLMTokenizer
from helpers.chatglm3.tokenizer_json import RECOGNISED, fast_tokenizer, write_tokenizer_json
from helpers.errors import UserError

PUBLISHED = os.environ.get("CHATGLM3_TOKENIZER")
MODELS = {"embedded": TINY_MODEL / "tokenizer.model"} | ({"published": Path(PUBLISHED)} if PUBLISHED else {})
CHARACTERS = st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])
WORDS = ("sop", "eop aesop", "[MASK]", "[sMASK]", "<eop>", "<pad>", "<0x0A>", "哈哈哈", "  ", "\n", "\t", "\r\n", "\0")
TEXTS = st.lists(st.one_of(st.text(CHARACTERS), st.sampled_from(WORDS), st.sampled_from(CORPUS)), max_size=6).map(
    "".join
)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def both(request, tmp_path_factory):
    """The tokenizer, and what transformers makes of the files without this package's class."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ChatGLMTokenizer(str(request.param))
    write_tokenizer_json(tokenizer, folder, "PreTrainedTokenizerFast")
    return tokenizer, PreTrainedTokenizerFast.from_pretrained(folder)


def plain(text):
    return not any(token in text for token in RECOGNISED)


def assert_equal(both, text):
    tokenizer, fast = both
    ids = tokenizer(text)["input_ids"]
    assert fast(text)["input_ids"] == ids
    assert fast.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True) == text


# --- texts --------------------------------------------------------------------------------------------------------


def test_the_texts_of_the_data_set_have_the_same_ids(both):
    rows = [json.loads(line) for file in sorted(TINY_DATA.glob("*.json")) for line in file.open(encoding="utf-8")]
    texts = [text for row in rows for text in row.values()]
    assert len(texts) >= 1000
    for text in texts:
        assert_equal(both, text)


@pytest.mark.slow
def test_other_languages_code_and_long_texts_have_the_same_ids(both):
    for file in sorted(Path(__file__).parent.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for part in (*text.split("\n\n"), text):
            if plain(part) and "▁" not in part:  # which SentencePiece shows as a space
                assert_equal(both, part)
    for text in (
        "",
        " ",
        "\n",
        "a",
        " a",
        "▁",
        "中文😀\u200d👩🏽‍🚀",
        "é\u0301",
        "Ünï",
        "مرحبا",
        "0" * 5000,
        "哈" * 5000,
    ):
        if text != "▁":  # which SentencePiece shows as a space
            assert_equal(both, text)
        assert both[1](text)["input_ids"] == both[0](text)["input_ids"]


@given(text=TEXTS.filter(plain))
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_same_ids(both, text):
    assert_equal(both, text)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_pieces_side_by_side_have_the_same_ids(both, data):
    model = both[0].sp_model
    indices = data.draw(st.lists(st.integers(259, model.get_piece_size() - 1), max_size=12))
    text = "".join(model.id_to_piece(index) for index in indices).replace("▁", " ")
    if plain(text):
        assert_equal(both, text)


@given(text=st.lists(st.one_of(st.text(CHARACTERS), st.sampled_from(RECOGNISED)), max_size=6).map("".join))
@settings(max_examples=100, deadline=None)
def test_special_tokens_can_be_kept_text(both, text):
    tokenizer, fast = both
    assert fast(text, split_special_tokens=True)["input_ids"] == tokenizer(text)["input_ids"]


def test_special_tokens_have_the_same_ids(both):
    tokenizer, fast = both
    assert len(fast) == len(tokenizer) and fast.padding_side == "left"
    for token, index in tokenizer.special_token_ids.items():
        assert fast.convert_ids_to_tokens(index) == {"sop": "<sop>", "eop": "<eop>"}.get(token, token)
    for name in ("eos_token_id", "pad_token_id", "unk_token_id", "bos_token_id"):
        assert getattr(fast, name) == getattr(tokenizer, name)
    batch = [tokenizer, fast]
    assert len({str(dict(each(["裙", "宽松的裤子"], padding=True))) for each in batch}) == 1
    assert fast("裙", "裤")["input_ids"] == tokenizer("裙", "裤")["input_ids"]


# --- conversations ------------------------------------------------------------------------------------------------

CALLS = [
    {"role": "user", "content": "北京的天气"},
    {
        "role": "tool",
        "name": "get_weather",
        "parameters": {
            "city": "北京",
            "quote": 'it\'s "x"',
            "n": 1,
            "x": 0.5,
            "yes": True,
            "none": None,
            "l": ["一", {}],
        },
        "observation": {"温度": [12, None], "ok": False},
    },
    {"role": "assistant", "content": "12 度"},
    {"role": "tool", "name": "stop", "parameters": {}, "observation": "停\n了"},
]
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    [{"role": "system", "content": "简约"}, {"role": "user", "content": " 前后有空格 \n"}],
    [{"role": "system", "content": "s", "tools": [{"name": "裙", "x": "<b>&'"}]}, {"role": "user", "content": "\n裙"}],
    [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
        {"role": "observation", "content": "晴"},
    ],
    [{"role": "user", "content": "sop eop [MASK] {{ x }} {% raw %} <b>", "loss": False}],
    CALLS,
]


def assert_same_chat(both, conversation, **options):
    tokenizer, fast = both
    expected = tokenizer.apply_chat_template(conversation, **options)["input_ids"]
    assert fast.apply_chat_template(conversation, **options)["input_ids"] == expected


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [{"name": "裙", "parameters": {"a": [1, None, "é"]}}, {}]])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_the_template_spells_the_prompt_layout(both, number, tools, add_generation_prompt):
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    assert_same_chat(both, CONVERSATIONS[number], **options)


@given(
    texts=st.lists(TEXTS.filter(plain), min_size=1, max_size=4),
    roles=st.lists(st.sampled_from(["system", "user", "assistant", "observation"]), min_size=4, max_size=4),
    metadata=TEXTS.filter(lambda text: plain(text) and text.splitlines() in ([], [text])),
)
@settings(max_examples=100, deadline=None)
def test_any_conversation_has_the_same_ids(both, texts, roles, metadata):
    messages = [{"role": role, "content": text, "metadata": metadata} for role, text in zip(roles, texts, strict=False)]
    assert_same_chat(both, messages, add_generation_prompt=True)


def test_openai_tool_calls_are_the_same_turns(both):
    _, fast = both
    call = {"type": "function", "function": {"name": "get_weather", "arguments": CALLS[1]["parameters"]}}
    openai = [
        CALLS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(CALLS[1]["observation"], ensure_ascii=False)},
    ]
    expected = fast.apply_chat_template(CALLS[:2], add_generation_prompt=True, tokenize=False)
    assert fast.apply_chat_template(openai, add_generation_prompt=True, tokenize=False) == expected


@pytest.mark.parametrize("token", RECOGNISED)
def test_nobody_can_type_themselves_into_another_role(both, token):
    _, fast = both
    for message in (
        {"role": "user", "content": f"a{token}b"},
        {"role": "assistant", "metadata": token, "content": "a"},
        {"role": "tool", "name": "f", "parameters": {"x": token}, "observation": "a"},
        {"role": "tool", "name": "f", "parameters": {}, "observation": {"x": token}},
    ):
        with pytest.raises(TemplateError, match=re.escape(f"message spells {token}, which would")):
            fast.apply_chat_template([message])
    with pytest.raises(TemplateError, match="a system message spells"):
        fast.apply_chat_template([{"role": "user", "content": "a"}], tools=[{"name": token}])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "bot", "content": "a"}, "unknown role bot"),
        ({"role": "user"}, "the text of a user message is not a string"),
        ({"role": "user", "content": ["a"]}, "the text of a user message is not a string"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "are not an object"),
        ({"role": "assistant", "content": "a", "metadata": "f\ng"}, "has a line break"),
        ({"role": "tool", "name": "f\r", "parameters": {}, "observation": ""}, "has a line break"),
        ({"role": "tool", "name": " ", "parameters": {}, "observation": ""}, "the name of a tool is empty"),
        (
            {"role": "tool", "name": "f", "parameters": {"a-b": 1}, "observation": ""},
            "parameter name a-b is not a Python",
        ),
        (
            {"role": "tool", "name": "f", "parameters": {"if": 1}, "observation": ""},
            "parameter name if is not a Python",
        ),
    ],
)
def test_what_is_no_message_is_refused(both, message, reason):
    with pytest.raises(TemplateError, match=reason):
        both[1].apply_chat_template([message])


# --- files --------------------------------------------------------------------------------------------------------


def test_the_published_class_reads_a_folder_with_both(tmp_path, tokenizer):
    for name in ("ChatGLMTokenizer", "PreTrainedTokenizerFast"):
        tokenizer.save_vocabulary(str(tmp_path))
        write_tokenizer_json(tokenizer, tmp_path, name)
        loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
        assert loaded("a<|user|>b</s>")["input_ids"] == tokenizer("a<|user|>b</s>")["input_ids"]
        assert loaded.apply_chat_template(CALLS) == tokenizer.apply_chat_template(CALLS)


def write_sentencepiece(file, **options):
    """A model of ChatGLM3's kind, but for the options."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        byte_fallback=True,
        **settings | options,
    )
    file.write_bytes(model.getvalue())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model_type": "unigram"}, "is not a SentencePiece model like ChatGLM3's"),
        ({"add_dummy_prefix": False}, "is not a SentencePiece model like ChatGLM3's"),
        ({"normalization_rule_name": "nfkc"}, "is not a SentencePiece model like ChatGLM3's"),
        ({"remove_extra_whitespaces": True}, "is not a SentencePiece model like ChatGLM3's"),
        ({"user_defined_symbols": ["<sop>"]}, "has the piece <sop>, which is a special token in tokenizer.json"),
    ],
    ids=str,
)
def test_another_kind_of_sentencepiece_model_is_refused(tmp_path, options, line):
    write_sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(UserError, match=line):
        fast_tokenizer(ChatGLMTokenizer(str(tmp_path / "tokenizer.model")))
