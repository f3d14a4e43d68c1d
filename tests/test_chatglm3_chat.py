"""The prompt layout: the ids of whole conversations, and which of them are trained."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.chatglm3.chat import Turn, conversation_turns, display, encode_conversation, parse_answer, tool_call
from helpers.errors import UserError

TOOLS = [{"name": "get_weather", "description": "查天气", "parameters": {"city": {"type": "string"}}}]


def role(tokenizer, name):
    return tokenizer.role_token_id(name)


def turn(tokenizer, name, text, metadata=""):
    """One turn by hand: role id, metadata and newline, text; each encoded separately."""
    return [role(tokenizer, name), *tokenizer.encode_text(f"{metadata}\n"), *tokenizer.encode_text(text)]


def trained_ids(encoded):
    return [token for token, trained in zip(encoded.input_ids, encoded.trained, strict=True) if trained]


def test_one_question_and_its_answer(tokenizer):
    messages = [{"role": "user", "content": "裙"}, {"role": "assistant", "content": "鱼尾裙"}]
    encoded = encode_conversation(tokenizer, messages)
    newline = tokenizer.encode_text("\n")
    answer = [*newline, *tokenizer.encode_text("鱼尾裙"), tokenizer.eos_token_id]
    question = [role(tokenizer, "user"), *newline, *tokenizer.encode_text("裙")]
    assert encoded.input_ids == [*tokenizer.prefix_tokens, *question, role(tokenizer, "assistant"), *answer]
    before = len(encoded.input_ids) - len(answer)
    assert encoded.labels == [-100] * before + answer


def test_a_prompt_ends_with_the_assistant_token(tokenizer):
    encoded = encode_conversation(tokenizer, [{"role": "user", "content": "裙"}], add_generation_prompt=True)
    expected = [*tokenizer.prefix_tokens, *turn(tokenizer, "user", "裙"), role(tokenizer, "assistant")]
    assert encoded.input_ids == expected
    assert not any(encoded.trained)


def test_several_turns_train_the_role_token_that_ends_an_answer(tokenizer):
    messages = [
        {"role": "system", "content": "你是导购。"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
        {"role": "assistant", "content": "四"},
    ]
    encoded = encode_conversation(tokenizer, messages)
    assert encoded.input_ids == [
        *tokenizer.prefix_tokens,
        *(token for m in messages for token in turn(tokenizer, m["role"], m["content"])),
        tokenizer.eos_token_id,
    ]
    assert trained_ids(encoded) == [
        *turn(tokenizer, "assistant", "二")[1:],
        role(tokenizer, "user"),
        *turn(tokenizer, "assistant", "四")[1:],
        tokenizer.eos_token_id,
    ]


def test_loss_says_what_is_trained_for_any_role(tokenizer):
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二", "loss": False},
        {"role": "user", "content": "三", "loss": True},
        {"role": "assistant", "content": "四", "loss": None},  # what a table holds where nothing was said
    ]
    encoded = encode_conversation(tokenizer, messages)
    assert trained_ids(encoded) == [
        *turn(tokenizer, "user", "三")[1:],
        *turn(tokenizer, "assistant", "四"),
        tokenizer.eos_token_id,
    ]


def test_a_tool_message_is_the_call_and_the_observation(tokenizer):
    messages = [
        {"role": "user", "content": "北京天气"},
        {"role": "tool", "name": "get_weather", "parameters": {"city": "北京"}, "observation": {"temp": 3}},
        {"role": "assistant", "content": "三度"},
    ]
    encoded = encode_conversation(tokenizer, messages, tools=TOOLS)
    call = "```python\ntool_call(city='北京')\n```"
    described = json.dumps(TOOLS, indent=4, ensure_ascii=False)
    prompt = "Answer the following questions as best as you can. You have access to the following tools:"
    assert encoded.input_ids == [
        *tokenizer.prefix_tokens,
        *turn(tokenizer, "system", f"{prompt}\n{described}"),
        *turn(tokenizer, "user", "北京天气"),
        *turn(tokenizer, "assistant", call, metadata="get_weather"),
        *turn(tokenizer, "observation", '{"temp": 3}'),
        *turn(tokenizer, "assistant", "三度"),
        tokenizer.eos_token_id,
    ]
    # The call with the <|observation|> that ends it, then the answer; never what the tool said.
    assert trained_ids(encoded) == [
        *turn(tokenizer, "assistant", call, metadata="get_weather")[1:],
        role(tokenizer, "observation"),
        *turn(tokenizer, "assistant", "三度")[1:],
        tokenizer.eos_token_id,
    ]


def test_tools_may_come_with_the_system_message():
    (only,) = conversation_turns([{"role": "system", "content": "可用：", "tools": TOOLS}])
    assert only == Turn("system", "", "可用：\n" + json.dumps(TOOLS, indent=4, ensure_ascii=False), False)


def test_tool_call_is_python():
    assert tool_call({"city": "北京", "days": 3, "metric": True}) == (
        "```python\ntool_call(city='北京', days=3, metric=True)\n```"
    )


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "observation"]), st.text(max_size=8))))
@settings(max_examples=200, deadline=None)
def test_roles_come_from_the_messages_alone(tokenizer, turns):
    messages = [{"role": name, "content": text} for name, text in turns]
    encoded = encode_conversation(tokenizer, messages)
    first = tokenizer.sp_model.get_piece_size()
    special = [token for token in encoded.input_ids if token >= first or token <= 2]
    assert special == [*tokenizer.prefix_tokens, *(role(tokenizer, name) for name, _ in turns), 2]
    assert len(encoded.input_ids) == len(encoded.trained) == len(encoded.labels)
    answers = sum(name == "assistant" for name, _ in turns)
    stops = {role(tokenizer, name) for name in ("user", "assistant", "system", "observation")} | {2}
    assert sum(label in stops for label in encoded.labels) == answers


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            {"role": "bot", "content": "x"},
            "unknown role 'bot'; the roles are system, user, assistant, observation, tool",
        ),
        ({"content": "x"}, "unknown role None"),
        ({"role": "user"}, "a 'user' message needs a string 'content', not None"),
        ({"role": "assistant", "content": 3}, "a 'assistant' message needs a string 'content', not 3"),
        ({"role": "tool", "name": "f", "observation": ""}, "a 'tool' message needs an object 'parameters', not None"),
        ({"role": "tool", "parameters": {}, "observation": ""}, "a 'tool' message needs a string 'name', not None"),
        ({"role": "tool", "name": " ", "parameters": {}, "observation": ""}, "the name of the tool is empty"),
        (
            {"role": "tool", "name": "a\nb", "parameters": {}, "observation": ""},
            "the name of the tool 'a\\nb' has a line",
        ),
        ({"role": "assistant", "metadata": "a\u2028b", "content": ""}, "metadata 'a\\u2028b' has a line break"),
        (
            {"role": "tool", "name": "f", "parameters": {"start-date": "今天", "class": 2}, "observation": ""},
            "parameter name 'start-date' is not a Python name",
        ),
        ({"role": "tool", "name": "f", "parameters": {"class": 2}, "observation": ""}, "'class' is not a Python name"),
        (
            {"role": "tool", "name": "f", "parameters": {"x": [float("nan")]}, "observation": ""},
            "the value of parameter 'x' cannot be written in Python: [nan]",
        ),
    ],
)
def test_a_message_that_is_none_is_named(tokenizer, message, fault):
    with pytest.raises(UserError) as error:
        encode_conversation(tokenizer, [message])
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("\n 鱼尾裙很美", ("", "鱼尾裙很美")),
        ("get_weather\n ```python\ntool_call()\n```", ("get_weather", "```python\ntool_call()\n```")),
        ("没有换行", ("", "没有换行")),
        ("", ("", "")),
        ("\n", ("", "")),
    ],
)
def test_an_answer_is_split_into_tool_and_words(text, parts):
    assert parse_answer(text) == parts


def test_an_answer_survives_encoding_and_decoding(tokenizer):
    ids = turn(tokenizer, "assistant", "鱼尾裙\n很美", metadata="f")[1:]
    assert parse_answer(tokenizer.decode(ids)) == ("f", "鱼尾裙\n很美")


def test_display_spells_the_roles_out():
    messages = [{"role": "user", "content": "裙"}, {"role": "assistant", "content": "美", "metadata": "f"}]
    assert display(messages) == "[gMASK]sop<|user|>\n 裙<|assistant|>f\n 美</s>"
