"""Splits as people have them: read, checked, cut, padded; bad rows named by file, line and reason."""

import json

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_chatglm import small_model, small_tokenizer

from helpers.errors import UserError
from helpers.finetune.collators import TrainingCollator
from helpers.finetune.dataset import (
    Limits,
    evaluation_features,
    read_split,
    training_features,
    truncation_notes,
)
from helpers.finetune.formats import parse_line
from helpers.finetune.rows import check_row, find_split

LIMITS = Limits(max_input_length=64, max_output_length=64)
ADVERT = {"content": "类型#裙", "summary": "这款裙子显瘦又舒适"}
CHAT = {
    "conversations": [
        {"role": "user", "content": "类型#裙"},
        {"role": "assistant", "content": "这款裙子显瘦又舒适"},
    ]
}
TWO_TURNS = {
    "conversations": [
        {"role": "user", "content": "裙"},
        {"role": "assistant", "content": "舒适", "loss": False},
        {"role": "user", "content": "宽松"},
        {"role": "assistant", "content": "显瘦"},
    ]
}
TOOL = {
    "tools": [{"name": "price", "parameters": {}}],
    "conversations": [
        {"role": "user", "content": "裙"},
        {"role": "assistant", "content": "柔软"},
        {"role": "tool", "name": "price", "parameters": {"of": "裙"}, "observation": {"yuan": 1}},
        {"role": "assistant", "content": "舒适"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def split(tmp_path, tokenizer):
    """Write rows (objects, or lines as they are) as JSON lines and read them."""

    def write_and_read(*rows, training=True, limits=LIMITS):
        path = tmp_path / "train.json"
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_split(path, tokenizer, limits, training=training)

    return write_and_read


def messages(*roles_and_texts):
    return {"conversations": [{"role": role, "content": text} for role, text in roles_and_texts]}


# Reading


def test_raw_rows_and_conversations_give_the_same_ids(split):
    rows = split(ADVERT, CHAT).rows
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    assert rows[0]["trained"] == rows[1]["trained"]


def test_one_json_array_is_read_like_json_lines(split, tmp_path, tokenizer):
    path = tmp_path / "array.json"
    path.write_text(json.dumps([ADVERT, TWO_TURNS, TOOL], indent=2, ensure_ascii=False), encoding="utf-8")
    array = read_split(path, tokenizer, LIMITS, training=True)
    assert array.rows.to_list() == split(ADVERT, TWO_TURNS, TOOL).rows.to_list()


def test_tools_and_different_shapes_in_one_file_do_not_mix(split, tokenizer):
    shown = [tokenizer.decode(row["input_ids"]) for row in split(ADVERT, TOOL, CHAT).rows]
    assert shown[0] == shown[2]
    assert '"name": "price"' in shown[1]
    assert "tool_call(of='裙')" in shown[1]
    assert "None" not in "".join(shown)


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_rows(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    line = json.dumps(ADVERT).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n\n")
    assert read_split(path, tokenizer, LIMITS, training=True).rows["number"][:] == [1, 3]


def test_a_line_separator_inside_a_string_does_not_end_the_line(split):
    assert len(split({**ADVERT, "summary": "显瘦\u2028舒适"}, ADVERT).rows) == 2


def test_several_processes_read_what_one_reads(split, tmp_path, tokenizer, monkeypatch):
    alone = split(ADVERT, TWO_TURNS, TOOL)
    monkeypatch.setattr("helpers.finetune.dataset.ROWS_PER_PROCESS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    several = read_split(tmp_path / "train.json", tokenizer, LIMITS, training=True, num_proc=16)
    assert several.rows.to_list() == alone.rows.to_list()
    assert several.report == alone.report


@pytest.mark.parametrize("disabled", [True, False])
def test_the_callers_progress_bars_are_as_before(split, progress_bars_afterwards, disabled):
    (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
    split(ADVERT)
    assert datasets.are_progress_bars_disabled() == disabled


# What is wrong with a row

BAD_ROWS = {
    "{": "not JSON (Expecting property name enclosed in double quotes at column 2)",
    "裙": "not JSON",
    "3": "a row must be a JSON object, not 3",
    "{}": "no question with an answer in it (it has no key); a row needs content and summary",
    '{"content": "裙", "output": ""}': "it has content, output",
    '{"content": "裙", "summary": null}': "(it has content, summary (null))",
    '{"content": "裙", "summary": 3}': "summary must be a text, not 3",
    '{"conversations": []}': "conversations must be a list of messages, not []",
    '{"conversations": ["裙"]}': "message 1 must be an object with a role, not '裙'",
    '{"conversations": [{"from": "human", "value": "裙"}]}': "the last user turn has no answer",
    '{"conversations": [{"text": "裙"}]}': "message 1 must be an object with a role, not {'text': '裙'}",
    '{"conversations": [{"role": "user", "content": "裙", "metadata": 1}]}': "metadata of message 1 must be a string",
    '{"conversations": [{"role": "user", "content": "裙", "loss": "no"}]}': "loss of message 1 must be true or false",
    '{"conversations": [{"role": "user", "content": "裙"}], "tools": "price"}': "tools must be a list, not 'price'",
    '{"conversations": [{"role": "tool", "name": "price", "parameters": {}}]}': "role tool has no observation",
    r'{"content": "\ud800", "summary": "裙"}': "half a character",
    json.dumps(messages(("bot", "裙"))): "unknown role 'bot'",
    json.dumps(messages(("user", "裙"))): "the last user turn has no answer",
    json.dumps(messages(("system", "裙"))): "no assistant turn",
    json.dumps(messages(("assistant", "裙"))): "the assistant turn '裙' comes after nothing",
    json.dumps(
        messages(("user", "裙"), ("user", "宽松"), ("assistant", "柔软"))
    ): "the user turn '宽松' comes after the user turn",
    json.dumps(
        messages(("user", "裙"), ("assistant", "一"), ("assistant", "二"))
    ): "'二' comes after the assistant turn",
    json.dumps(messages(("user", "裙"), ("assistant", "一"), ("system", "二"))): "the system turn '二' comes after",
    json.dumps(messages(("user", "裙"), ("observation", "二"))): "the observation turn '二' comes after the user turn",
    json.dumps(messages(("user", "裙"), ("assistant", " \n"))): "empty answer",
    '{"conversations": [{"role": "user", "content": "裙"}, {"role": "assistant", "content": "a", "loss": false}]}': (
        "every assistant turn has loss false"
    ),
    '{"conversations": [{"role": "user", "content": "裙"}, {"role": "assistant", "content": "a", "metadata": "price"}, '
    '{"role": "user", "content": "b"}]}': "the user turn 'b' comes after the call of a tool",
    "[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("line", BAD_ROWS, ids=lambda line: line[:40])
def test_a_bad_row_is_named_by_line_and_reason(line, split, tmp_path):
    with pytest.raises(UserError) as error:
        split(ADVERT, line, CHAT)
    message = str(error.value)
    assert message.startswith("1 of 3 rows cannot be used; correct or delete them: ")
    assert f"{tmp_path / 'train.json'}:2: " in message
    assert BAD_ROWS[line] in message
    assert "\n" not in message


def test_only_the_first_five_bad_rows_are_named(split, tmp_path):
    with pytest.raises(UserError) as error:
        split(*[ADVERT] * 2, "", *["{}"] * 7, ADVERT)
    message = str(error.value)
    assert message.startswith("7 of 10 rows")
    assert [f"train.json:{line}: " in message for line in range(3, 11)] == [False, *[True] * 5, False, False]
    assert message.endswith("and 2 more")


def test_a_long_value_does_not_flood_the_message(split):
    with pytest.raises(UserError) as error:
        split({"content": ["裙" * 10_000], "summary": "裙"})
    assert len(str(error.value)) < 500


def test_a_row_that_is_not_utf8_is_named(tmp_path, tokenizer):
    path = tmp_path / "train.json"
    path.write_bytes(json.dumps(ADVERT).encode() + b"\n" + json.dumps(ADVERT, ensure_ascii=False).encode("gbk") + b"\n")
    with pytest.raises(UserError, match=r"train\.json:2: not UTF-8 \(byte 14\)"):
        read_split(path, tokenizer, LIMITS, training=True)


def test_in_an_array_the_row_is_counted(tmp_path, tokenizer):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([ADVERT, ADVERT, {}], indent=2))
    with pytest.raises(UserError, match=r"train\.json:row 3: no question with an answer"):
        read_split(path, tokenizer, LIMITS, training=True)


def test_a_broken_array_is_named_by_the_line_where_it_breaks(tmp_path, tokenizer):
    path = tmp_path / "train.json"
    path.write_text('[\n{"content": "a", "summary": "b"},\n{"content": }\n]')
    with pytest.raises(UserError, match=r"train\.json:3: not JSON \(Expecting value at column 13\)"):
        read_split(path, tokenizer, LIMITS, training=True)


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_a_file_without_rows_is_an_error(text, tmp_path, tokenizer):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no rows"):
        read_split(path, tokenizer, LIMITS, training=True)


def test_a_missing_file_is_named_with_the_files_that_are_there(tmp_path):
    (tmp_path / "dev.json").touch()
    (tmp_path / "training.json").touch()
    assert find_split(tmp_path, "dev.json") == tmp_path / "dev.json"
    with pytest.raises(UserError, match=r"train\.json does not exist; in that folder: dev\.json, training\.json"):
        find_split(tmp_path, "train.json")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_split(tmp_path / "nowhere", "train.json")


def test_an_empty_answer_is_a_reference_in_evaluation(split, tokenizer):
    (entry,) = evaluation_features(split({**ADVERT, "summary": ""}, training=False), tokenizer, LIMITS)
    assert entry["reference"] == ""


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "loss", "weight", "metadata", "name", "parameters", "tools"]), inner
        )
    ),
)
ROLES = st.sampled_from(["system", "user", "assistant", "observation", "tool", "bot"])
ANY_MESSAGE = JSON_VALUES | st.fixed_dictionaries(
    {"role": ROLES, "content": st.text(max_size=5)},
    optional=dict.fromkeys(("observation", "parameters", "tool_calls", "function_call"), JSON_VALUES),
)


@given(
    JSON_VALUES
    | st.fixed_dictionaries(
        {"conversations": st.lists(ANY_MESSAGE, max_size=4)}, optional={"tools": JSON_VALUES, "system": JSON_VALUES}
    )
    | st.fixed_dictionaries({"prompt": JSON_VALUES, "response": st.text()}, optional={"history": JSON_VALUES})
)
def test_any_json_is_a_row_or_a_reason(value):
    try:
        turns = check_row(value, training=True).turns
    except UserError as error:
        assert str(error)
    else:
        assert any(turn.trained for turn in turns)


@given(st.binary())
def test_any_bytes_are_a_row_or_a_reason(raw):
    with pytest.raises(UserError):
        check_row(parse_line(raw), training=True)


# The report, and training features


def test_the_report_counts_tokens_and_rows_that_are_cut(split):
    report = split(ADVERT, {**ADVERT, "summary": "裙" * 200}, {**ADVERT, "content": "裙" * 200}).report
    lengths = sorted(len(row["input_ids"]) for row in split(ADVERT).rows)
    assert report.rows == 3
    assert report.truncated == 2
    assert report.untrainable == 1
    assert report.tokens.max > 200
    assert report.tokens.p50 > lengths[0]
    assert "(JSON lines of content/summary): 3 rows; tokens per row: mean" in str(report)
    assert "2 rows truncated, 1 of them with nothing left to train" in str(report)


def test_training_features_are_labelled_after_the_assistant_token_and_end_with_eos(split, tokenizer):
    (features,) = training_features(split(ADVERT), LIMITS)
    ids, labels = features["input_ids"], features["labels"]
    answer = ids.index(tokenizer.role_token_id("assistant")) + 1
    assert labels == [-100] * answer + ids[answer:]
    assert ids[-1] == tokenizer.eos_token_id


def test_a_turn_with_loss_false_is_not_trained(split, tokenizer):
    (features,) = training_features(split(TWO_TURNS), LIMITS)
    trained = [token for token in features["labels"] if token != -100]
    assert tokenizer.decode(trained, skip_special_tokens=True).strip() == "显瘦"


def test_training_rows_are_cut_as_published(split):
    limits = Limits(max_input_length=8, max_output_length=5)
    (features,) = training_features(split(CHAT), limits)
    (uncut,) = training_features(split(CHAT), LIMITS)
    assert len(uncut["input_ids"]) > 14
    assert features["input_ids"] == uncut["input_ids"][:14]
    assert features["labels"] == uncut["labels"][:14]


def test_rows_with_nothing_left_to_train_are_left_out(split):
    long_prompt = {**ADVERT, "content": "裙" * 200}
    assert len(training_features(split(long_prompt, ADVERT, long_prompt), LIMITS)) == 1
    with pytest.raises(UserError, match="no row has anything to train"):
        training_features(split(long_prompt), LIMITS)


def test_the_collator_pads_ids_labels_and_mask(split, tokenizer):
    features = training_features(split(ADVERT, {**ADVERT, "summary": "裙" * 20}), LIMITS)
    batch = TrainingCollator(tokenizer.pad_token_id)([features[0], features[1]])
    short, long = (len(row["input_ids"]) for row in features)
    assert batch.pop("tokens") == short + long
    target_positions = batch.pop("target_positions")
    assert (batch["labels"].flatten()[target_positions + 1] != -100).all()
    assert target_positions.numel() == (batch["labels"][:, 1:] != -100).sum()
    # Each position predicts the next token of its row, and the last of a row predicts nothing.
    assert (batch["shift_labels"][:, :-1] == batch["labels"][:, 1:]).all() and (
        batch["shift_labels"][:, -1] == -100
    ).all()
    assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(batch, (2, long))
    assert batch["input_ids"][0, short:].eq(0).all()
    assert batch["labels"][0, short:].eq(-100).all()
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert batch["labels"][1].tolist() == features[1]["labels"]


def test_padding_changes_no_logit_of_a_real_token(split, tokenizer):
    features = training_features(split(ADVERT, {**ADVERT, "summary": "裙" * 20}), LIMITS)
    model = small_model(tokenizer).eval()

    def logits_of_the_first(*rows):
        batch = TrainingCollator(tokenizer.pad_token_id)(rows)
        with torch.no_grad():
            return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]

    alone = logits_of_the_first(features[0])
    padded = logits_of_the_first(features[0], features[1])
    torch.testing.assert_close(padded[: len(alone)], alone, atol=1e-5, rtol=0)


# Evaluation features


def test_each_trained_answer_is_asked_for(split, tokenizer):
    entries = evaluation_features(split(ADVERT, TWO_TURNS, TOOL), tokenizer, Limits(500, 64))
    assert entries["number"][:] == [1, 2, 3, 3, 3]
    assert entries["prompt"][:4] == ["类型#裙", "宽松", "裙", "柔软"]
    assert entries["reference"][:3] == ["这款裙子显瘦又舒适", "显瘦", "柔软"]
    assert entries["reference"][3].startswith("price\n ```python\ntool_call(of='裙')")
    assert entries["prompt"][4] == '{"yuan": 1}'
    assert entries["reference"][4] == "舒适"
    assert not any(entries["truncated"])


def test_a_prompt_is_what_came_before_and_the_assistant_token(split, tokenizer):
    (entry,) = evaluation_features(split(TWO_TURNS), tokenizer, LIMITS)
    row = split(TWO_TURNS).rows[0]["input_ids"]
    last = len(row) - 1 - row[::-1].index(tokenizer.role_token_id("assistant"))
    assert entry["prompt_ids"] == row[: last + 1]


def test_a_long_prompt_loses_its_oldest_turns_first(split, tokenizer):
    (entry,) = evaluation_features(split(TWO_TURNS), tokenizer, Limits(14, 64))
    expected = split(messages(("user", "宽松"), ("assistant", "显瘦"))).rows[0]["input_ids"]
    assert entry["truncated"]
    assert entry["prompt_ids"] == expected[: len(entry["prompt_ids"])]
    assert entry["prompt_ids"][-1] == tokenizer.role_token_id("assistant")


@pytest.mark.parametrize("max_input_length", [1, 3, 8, 64])
def test_one_turn_that_is_too_long_keeps_its_beginning(max_input_length, split, tokenizer):
    limits = Limits(max_input_length, 64)
    (entry,) = evaluation_features(split({**ADVERT, "content": "裙" * 100}), tokenizer, limits)
    uncut = split({**ADVERT, "content": "裙" * 100}).rows[0]["input_ids"]
    kept = max(2, max_input_length)
    assert entry["truncated"]
    assert entry["prompt_ids"] == [*uncut[:kept], tokenizer.role_token_id("assistant")]


def test_a_reference_is_cut_to_the_output_length(split, tokenizer):
    (entry,) = evaluation_features(split({**ADVERT, "summary": "裙" * 100}), tokenizer, Limits(64, 13))
    assert entry["reference"] == "裙" * 10


def test_truncated_prompts_are_counted_and_kept_whole(split, tokenizer):
    # 3 + 12 * 12 characters of prompt fit into a training row of 229 tokens, but not into 64 tokens of prompt.
    long_prompt = "类型#裙*" + "材质#棉*风格#简约*" * 12
    rows = split({"content": long_prompt, "summary": "这款裙子"}, ADVERT, TWO_TURNS, limits=Limits(64, 164))
    entries = evaluation_features(rows, tokenizer, Limits(64, 164))
    assert rows.report.truncated == 0
    assert entries["truncated"][:] == [True, False, False]
    assert entries["prompt"][0] == long_prompt
    assert entries["full_prompt"][0].endswith(long_prompt)
    assert entries["full_prompt"][2].count("<|user|>") == 2
    (note,) = truncation_notes(entries, rows.report.path, Limits(64, 164))
    assert "1 of 3 prompts are longer than max_input_length 64" in note
    assert truncation_notes(entries.select([1, 2]), rows.report.path, Limits(64, 164)) == []
