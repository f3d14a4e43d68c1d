"""Files as people bring them: each is read, or rejected with one clear line."""

import csv
import gzip
import io
import json
import pickle
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.chatglm3.chat import TOOLS_PROMPT, Turn
from helpers.errors import UserError
from helpers.finetune.rows import read_rows

ADVERT = {"content": "类型#裙", "summary": "显瘦"}
ALPACA = {"instruction": "写广告", "input": "类型#裙", "output": "显瘦"}
SHAREGPT = {"conversations": [{"from": "human", "value": "裙"}, {"from": "gpt", "value": "显瘦"}]}
CHAT = {"conversations": [{"role": "user", "content": "裙"}, {"role": "assistant", "content": "显瘦"}]}
OPENAI = {"messages": CHAT["conversations"]}
PROMPT = {"prompt": "裙", "response": "显瘦"}
TOOLS = [{"name": "price", "description": "查价"}]
CALL = {"id": "1", "type": "function", "function": {"name": "price", "arguments": '{"of": "裙", "city": null}'}}


def user(text, trained=False):
    return Turn("user", "", text, trained)


def answer(text="显瘦", trained=True, metadata=""):
    return Turn("assistant", metadata, text, trained)


def system(text):
    return Turn("system", "", text, False)


QA = [user("裙"), answer()]
CALL_TURN = answer("```python\ntool_call(of='裙')\n```", metadata="price")
TOOLS_TURN = system(f"{TOOLS_PROMPT}\n{json.dumps(TOOLS, indent=4, ensure_ascii=False)}")


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(*rows):
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def table(*rows, delimiter=",", encoding="utf-8"):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


def parquet(*rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def messages(*rows):
    return {"messages": list(rows)}


def u(text="裙", **more):
    return {"role": "user", "content": text, **more}


def a(text="显瘦", **more):
    return {"role": "assistant", "content": text, **more}


# Name of the file -> what it holds, how the report calls it, and the turns of its first row.
ADVERT_TURNS = [user("类型#裙"), answer()]
ALPACA_TURNS = [user("写广告\n类型#裙"), answer()]
READ = {
    # Formats
    "train.json": (lines(ADVERT, ADVERT), "JSON lines of content/summary", ADVERT_TURNS),
    "array.json": (array(ADVERT, ADVERT), "JSON array of content/summary", ADVERT_TURNS),
    "one_line_array.json": (json.dumps([ADVERT]).encode(), "JSON array of content/summary", ADVERT_TURNS),
    "train.jsonl": (lines(ADVERT), "JSON lines of content/summary", ADVERT_TURNS),
    "bom.jsonl": (b"\xef\xbb\xbf" + lines(ADVERT), "JSON lines of content/summary", ADVERT_TURNS),
    "bom_array.json": (b"\xef\xbb\xbf" + array(ADVERT), "JSON array of content/summary", ADVERT_TURNS),
    "windows.jsonl": (lines(ADVERT).replace(b"\n", b"\r\n"), "JSON lines of content/summary", ADVERT_TURNS),
    "no_last_line_end.jsonl": (lines(ADVERT).strip(), "JSON lines of content/summary", ADVERT_TURNS),
    "train.json.gz": (gzip.compress(lines(ADVERT)), "gzipped JSON lines of content/summary", ADVERT_TURNS),
    "array.json.gz": (gzip.compress(array(ALPACA)), "gzipped JSON array of instruction/output (Alpaca)", ALPACA_TURNS),
    "gzip_without_its_name.json": (gzip.compress(lines(CHAT)), "gzipped JSON lines of conversations", QA),
    "two_gzip_members.gz": (gzip.compress(lines(ADVERT)) * 2, "gzipped JSON lines of content/summary", ADVERT_TURNS),
    "train.csv": (table(ADVERT), "CSV of content/summary", ADVERT_TURNS),
    "bom.csv": (table(ADVERT, encoding="utf-8-sig"), "CSV of content/summary", ADVERT_TURNS),
    "train.csv.gz": (gzip.compress(table(ADVERT)), "gzipped CSV of content/summary", ADVERT_TURNS),
    "train.tsv": (table(ADVERT, delimiter="\t"), "tab-separated of content/summary", ADVERT_TURNS),
    "semicolons.csv": (table(ADVERT, delimiter=";"), "CSV with semicolons of content/summary", ADVERT_TURNS),
    "csv_without_its_name.json": (table(PROMPT), "CSV of prompt/response", QA),
    "several_lines_in_a_field.csv": (
        table({"prompt": '裙,"a"\n长', "response": "显瘦"}),
        "CSV of prompt/response",
        [user('裙,"a"\n长'), answer()],
    ),
    "a_long_field.csv": (
        table({"prompt": "裙" * 200_000, "response": "显瘦"}),
        "CSV of prompt/response",
        [user("裙" * 200_000), answer()],
    ),
    "pandas_index.csv": (table({"": 0, **PROMPT}), "CSV of prompt/response", QA),
    "alpaca_empty_input.csv": (
        table({"instruction": "裙", "input": "", "output": "显瘦", "history": "", "system": ""}),
        "CSV of instruction/output (Alpaca)",
        QA,
    ),
    "messages_as_json.csv": (
        table({"messages": json.dumps(OPENAI["messages"]), "tools": ""}),
        "CSV of messages",
        QA,
    ),
    "conversations_alone.csv": (
        table({"conversations": json.dumps(CHAT["conversations"])}),
        "CSV of conversations",
        QA,
    ),
    "train.parquet": (parquet(ADVERT, ADVERT), "Parquet of content/summary", ADVERT_TURNS),
    "parquet_without_its_name.json": (parquet(ALPACA), "Parquet of instruction/output (Alpaca)", ALPACA_TURNS),
    "sharegpt.parquet": (parquet(SHAREGPT, CHAT), "Parquet of conversations (ShareGPT) and conversations", QA),
    "train.parquet.gz": (gzip.compress(parquet(PROMPT)), "gzipped Parquet of prompt/response", QA),
    "tools.parquet": (
        parquet(
            {"messages": [u(), {"role": "tool", "name": "price", "parameters": {"of": "裙"}, "observation": "1"}, a()]},
            {
                "messages": [
                    u(),
                    {"role": "tool", "name": "city", "parameters": {"city": "京"}, "observation": "2"},
                    a(),
                ]
            },
        ),
        "Parquet of messages",
        [user("裙"), CALL_TURN, Turn("observation", "", "1", False), answer()],
    ),
    # Shapes
    "alpaca.json": (lines(ALPACA), "JSON lines of instruction/output (Alpaca)", ALPACA_TURNS),
    "alpaca_without_input.json": (lines({"instruction": "裙", "output": "显瘦"}), "instruction/output (Alpaca)", QA),
    "alpaca_input_only.json": (
        lines({"instruction": "", "input": "裙", "output": "显瘦"}),
        "instruction/output (Alpaca)",
        QA,
    ),
    "alpaca_history.json": (
        lines({**ALPACA, "system": "导购", "history": [["长裙", "舒适"], ["短裙", "凉爽"]]}),
        "instruction/output (Alpaca)",
        [system("导购"), user("长裙"), answer("舒适"), user("短裙"), answer("凉爽"), *ALPACA_TURNS],
    ),
    "dolly.jsonl": (
        lines({"instruction": "写广告", "context": "类型#裙", "response": "显瘦", "category": "qa"}),
        "instruction/response",
        ALPACA_TURNS,
    ),
    "prompt_response.jsonl": (lines(PROMPT), "JSON lines of prompt/response", QA),
    "prompt_completion.jsonl": (lines({"prompt": "裙", "completion": "显瘦"}), "prompt/completion", QA),
    "trl_prompt_completion.jsonl": (
        lines({"prompt": [u("长"), a("短"), u()], "completion": [a()]}),
        "prompt/completion",
        [user("长"), answer("短", trained=False), *QA],
    ),
    "swift.jsonl": (
        lines({"system": "导购", "query": "裙", "response": "显瘦", "history": [["长", "短"]]}),
        "query/response",
        [system("导购"), user("长"), answer("短"), *QA],
    ),
    "question_answer.jsonl": (lines({"question": "裙", "answer": "显瘦", "id": 3}), "question/answer", QA),
    "openorca.jsonl": (
        lines({"id": "1", "system_prompt": "导购", "question": "裙", "response": "显瘦"}),
        "question/response",
        [system("导购"), *QA],
    ),
    "input_output.jsonl": (lines({"input": "裙", "output": "显瘦"}), "input/output", QA),
    "conversations.json": (array(CHAT), "JSON array of conversations", QA),
    "sharegpt.json": (array({"id": "x_0", **SHAREGPT}), "JSON array of conversations (ShareGPT)", QA),
    "sharegpt_system_and_tools.json": (
        array(
            {
                "system": "导购",
                "tools": json.dumps(TOOLS),
                "conversations": [
                    {"from": "human", "value": "裙"},
                    {"from": "function_call", "value": '{"name": "price", "arguments": {"of": "裙"}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "显瘦"},
                ],
            }
        ),
        "conversations (ShareGPT)",
        [TOOLS_TURN, system("导购"), user("裙"), CALL_TURN, Turn("observation", "", "1", False), answer()],
    ),
    "openai.jsonl": (
        lines(messages({"role": "system", "content": "导购"}, u(), a())),
        "JSON lines of messages",
        [system("导购"), *QA],
    ),
    "a_pair_of_weight_1.jsonl": (lines({**PROMPT, "weight": 1, "loss": True}), "prompt/response", QA),
    "openai_weight.jsonl": (
        lines(messages(u("长"), a("坏", weight=0), u(), a(weight=1))),
        "messages",
        [user("长"), answer("坏", trained=False), *QA],
    ),
    "openai_parts.jsonl": (
        lines(messages(u([{"type": "text", "text": "类型"}, {"type": "text", "text": "裙"}]), a())),
        "messages",
        [user("类型\n裙"), answer()],
    ),
    "openai_tool_calls.jsonl": (
        lines(
            {
                "tools": TOOLS,
                **messages(
                    u(),
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "1"},
                    a(tool_calls=[], function_call=None),
                ),
            }
        ),
        "messages",
        [TOOLS_TURN, user("裙"), CALL_TURN, Turn("observation", "", "1", False), answer()],
    ),
    "openai_thought_and_call.jsonl": (
        lines(messages(u(), a("查一下", tool_calls=[CALL]), {"role": "tool", "content": "1"}, a())),
        "messages",
        [user("裙"), answer("查一下"), CALL_TURN, Turn("observation", "", "1", False), answer()],
    ),
    "openai_function_call.jsonl": (
        lines(
            messages(
                u(), a(None, function_call=CALL["function"]), {"role": "function", "name": "p", "content": "1"}, a()
            )
        ),
        "messages",
        [user("裙"), CALL_TURN, Turn("observation", "", "1", False), answer()],
    ),
    "developer.jsonl": (
        lines(messages({"role": "developer", "content": "导购"}, u(), a())),
        "messages",
        [system("导购"), *QA],
    ),
    "loss_on_a_user_turn.jsonl": (
        lines(messages(u(loss=True), a(loss=False))),
        "messages",
        [user("裙", True), answer(trained=False)],
    ),
    "the_same_system_twice.jsonl": (
        lines({"system": "导购", **messages({"role": "system", "content": "导购"}, u(), a())}),
        "messages",
        [system("导购"), *QA],
    ),
    "mixed.jsonl": (
        lines(ALPACA, PROMPT, PROMPT),
        "JSON lines of prompt/response and instruction/output (Alpaca)",
        ALPACA_TURNS,
    ),
    # F19: keys of a row that were not read
    "f19_history.json": (
        lines({"content": "95", "summary": "好", "history": [["问", "答"]]}),
        "content/summary",
        [user("问"), answer("答"), user("95"), answer("好")],
    ),
    "f19_system.json": (lines({"system": "你是助手", **CHAT}), "conversations", [system("你是助手"), *QA]),
    "f19_tools.json": (lines({"tools": TOOLS, **ADVERT}), "content/summary", [TOOLS_TURN, *ADVERT_TURNS]),
    "history_of_messages.json": (
        lines({**PROMPT, "history": [u("长"), a("短")]}),
        "prompt/response",
        [user("长"), answer("短"), *QA],
    ),
    # F20: what a table has for "nothing"
    "f20_null.json": (
        lines({**ADVERT, "conversations": None, "tools": None, "system": None}),
        "content/summary",
        ADVERT_TURNS,
    ),
    "f20_parameters.json": (
        lines(
            messages(
                u(loss=None, metadata=None),
                {"role": "tool", "name": "price", "parameters": {"of": "裙", "city": None}, "observation": "1"},
                a(weight=None),
            )
        ),
        "messages",
        [user("裙"), CALL_TURN, Turn("observation", "", "1", False), answer()],
    ),
    "an_empty_list_beside_a_pair.json": (lines({**ADVERT, "messages": []}), "content/summary", ADVERT_TURNS),
}


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train.json", content)
    return buffer.getvalue()


def tarred(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("train.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 52\n"
REJECTED = {
    # Formats
    "empty.json": (b"", "holds no rows"),
    "blank.jsonl": (b"\n \n", "holds no rows"),
    "empty_array.json": (b"[]", "holds no rows"),
    "header_only.csv": (b"content,summary\n", "holds no rows"),
    "empty.parquet": (parquet(ADVERT)[:4], "is a damaged Parquet file"),
    "cut.parquet": (parquet(ADVERT)[:-20], "is a damaged Parquet file"),
    "cut.json.gz": (gzip.compress(lines(ADVERT))[:-10], "is a damaged gzip file"),
    "twice.json.gz": (gzip.compress(gzip.compress(lines(ADVERT))), "is gzipped twice; unpack it once"),
    "train.tar.gz": (gzip.compress(tarred(lines(ADVERT))), "is a tar archive; unpack it"),
    "train.zip": (zipped(lines(ADVERT)), "is a zip archive or an Excel file"),
    "train.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1", "is an Excel file"),
    "train.json.bz2": (b"BZh91AY&SY", "is compressed with bzip2; unpack it with bunzip2"),
    "train.json.xz": (b"\xfd7zXZ\0", "is compressed with xz"),
    "train.json.zst": (b"\x28\xb5\x2f\xfd\0", "is compressed with zstd"),
    "train.arrow": (b"\xff\xff\xff\xff\0", "is an Arrow file"),
    "train.feather": (b"ARROW1\0\0", "is an Arrow file"),
    "train.db": (b"SQLite format 3\0", "is an SQLite database"),
    "train.pkl": (pickle.dumps([ADVERT]), "is a pickle"),
    "train.bin": (b"abc\0\1\2", "holds binary data"),
    "utf16.json": (lines(ADVERT).decode().encode("utf-16"), "is UTF-16; convert it with iconv"),
    "git_lfs.json": (POINTER, "is a pointer of git-lfs, not the file itself; run git lfs pull"),
    "git_lfs.parquet": (POINTER, "is a pointer of git-lfs"),
    "page.json": (b"<!DOCTYPE html><html></html>", "is a web page or XML"),
    "prose.txt": ("从前有一条裙子，很美。\n".encode(), "holds neither JSON nor a table with a known column"),
    "config.yaml": (b"train_file: train.json\n", "holds neither JSON nor a table with a known column"),
    "gbk.csv": (table(ADVERT, encoding="gbk"), r"is not UTF-8 \(line 2\); convert it with iconv -f GB18030"),
    "gbk_array.json": (array(ADVERT).decode().encode("gbk"), r"is not UTF-8 \(line 3\); convert it with iconv"),
    "gbk.jsonl": (
        lines(ADVERT, ADVERT).decode().encode("gbk"),
        r"no row can be used, all 2 for the same reason; line 1: not UTF-8 \(byte 14\); save the file as UTF-8",
    ),
    "pretty.json": (
        json.dumps(ADVERT, indent=2).encode(),
        "begins with an object over several lines; write each row on one line: convert it with jq",
    ),
    "pretty_objects.json": (
        (json.dumps(ADVERT, indent=2) + "\n").encode() * 3,
        "begins with an object over several lines",
    ),
    "wrapped.json": (json.dumps({"data": [ADVERT]}, indent=2).encode(), "write the list under its key 'data' alone"),
    "wrapped_on_one_line.json": (lines({"data": [ADVERT]}), "the rows are inside its key 'data'"),
    "columns.json": (
        lines({"content": {"0": "裙"}, "summary": {"0": "瘦"}}),
        "content must be a text.*orient='records'",
    ),
    "no_comma.json": (b'[\n{"content": "a", "summary": "b"}\n{}\n]', r"no_comma\.json:3: not JSON \(Expecting ','"),
    "twice.jsonl": (
        b'{"content": "a", "summary": "b", "summary": "c"}\n',
        r":1: not JSON \(the key 'summary' occurs twice\)",
    ),
    "twice.json": (
        b'[{"content": "a", "summary": "b", "summary": "c"}]',
        r"not JSON \(the key 'summary' occurs twice\)",
    ),
    "python.jsonl": ((str(ADVERT) + "\n").encode() * 9, "all 9 for the same reason; line 1: not JSON"),
    "commas.jsonl": (
        lines(ADVERT, {**ADVERT, "content": "类型#上衣"}).replace(b"}\n", b"},\n"),
        r"all 2 for the same reason; line 1: not JSON \(Extra data",
    ),
    "texts.json": (b'["a", "b"]', "all 2 for the same reason; row 1: a row must be a JSON object, not 'a'"),
    "two_columns_of_one_name.csv": (b"content,summary,content\na,b,c\n", "has two columns 'content'"),
    "an_unquoted_comma.csv": (b"content,summary\na,b\na,b,c\n", "csv:3: 3 fields in 2 columns; put a field"),
    "an_open_quote.csv": (b'content,summary\na,b\n"a,b\nc,d\n', "csv:3: not a row of the table"),
    "other_columns.csv": (
        b"a,b\n1,2\n3,4\n",
        r"all 2 for the same reason; line 2: no question with an answer.*\(it has a, b\)",
    ),
    # Shapes
    "text.jsonl": (
        lines({"text": "裙"}, {"text": "衫"}),
        r"all 2 for the same reason; line 1: .*text alone has no answer to train; a row needs content and summary",
    ),
    "firefly.jsonl": (lines({"conversation": [{"human": "裙"}]}), "the rows are inside its key 'conversation'"),
    "instruction_only.jsonl": (lines({"instruction": "裙", "input": ""}), "no question with an answer in it"),
    "preference.jsonl": (
        lines({"prompt": "裙", "chosen": "瘦", "rejected": "胖"}),
        "chosen is for preference training",
    ),
    "kto.jsonl": (lines({**PROMPT, "kto_tag": False}), "kto_tag is for preference training"),
    "image.jsonl": (lines({**PROMPT, "images": ["a.png"]}), "images is not text"),
    "image_part.jsonl": (lines(messages(u([{"type": "image_url", "image_url": {}}]), a())), "a part of type image_url"),
    "both_shapes.jsonl": (lines({**ADVERT, **CHAT}), "both conversations and content/summary in one row"),
    "two_pairs.jsonl": (
        lines({**PROMPT, "question": "裙", "answer": "瘦"}),
        "both prompt/response and question/answer",
    ),
    "two_systems.jsonl": (
        lines({"system": "一", **messages({"role": "system", "content": "二"}, u(), a())}),
        "both system and a",
    ),
    "history_beside_messages.jsonl": (lines({**OPENAI, "history": [["a", "b"]]}), "both history and messages"),
    "history_of_texts.jsonl": (
        lines({**PROMPT, "history": ["a", "b"]}),
        r"history must be a list of \[question, answer\]",
    ),
    "two_calls.jsonl": (lines(messages(u(), a(None, tool_calls=[CALL, CALL]))), "calls 2 tools at once"),
    "half_a_weight.jsonl": (lines(messages(u(), a(weight=0.5))), "weight of message 2 must be 0 or 1, not 0.5"),
    "weight_zero_only.jsonl": (
        lines(messages(u(), a("坏", weight=0))),
        "every assistant turn has loss false or weight 0",
    ),
    "a_pair_of_weight_0.jsonl": (lines({**ADVERT, "weight": 0}), "every assistant turn has loss false or weight 0"),
    "a_pair_without_loss.jsonl": (lines({**ALPACA, "loss": False}), "every assistant turn has loss false or weight 0"),
    "a_pair_of_weight_0.csv": (table({**ADVERT, "weight": 0}), "every assistant turn has loss false or weight 0"),
    "a_pair_against_itself.jsonl": (
        lines({**ADVERT, "loss": True, "weight": 0}),
        "loss true and weight 0 of the row disagree",
    ),
    "loss_against_weight.jsonl": (
        lines(messages(u(), a(loss=True, weight=0))),
        "loss true and weight 0 of message 2 disagree",
    ),
    "sharegpt_begins_with_gpt.json": (
        array({"conversations": [{"from": "gpt", "value": "瘦"}]}),
        "comes after nothing",
    ),
    # F21: tool calls that are no Python
    "f21_name.jsonl": (
        lines(
            messages(
                u(),
                {"role": "tool", "name": "f", "parameters": {"start-date": "今天", "class": 2}, "observation": ""},
                a(),
            )
        ),
        "parameter name 'start-date' is not a Python name",
    ),
    "f21_line_break.jsonl": (
        lines(messages(u(), {"role": "tool", "name": "f\ng", "parameters": {}, "observation": ""}, a())),
        "the name of the tool .* has a line break",
    ),
    "f21_metadata.jsonl": (lines(messages(u(), a(metadata="f\ng"))), "metadata .* has a line break"),
    "f21_openai.jsonl": (
        lines(messages(u(), a(None, tool_calls=[{"function": {"name": "f", "arguments": '{"a b": 1}'}}]))),
        "parameter name 'a b' is not a Python name",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read(name, tmp_path):
    content, written, turns = READ[name]
    (tmp_path / name).write_bytes(content)
    file = read_rows(tmp_path / name, training=True)
    assert file.format.endswith(written)
    assert file.rows[0].turns == turns
    assert all("is not used" not in note for note in file.notes)


@pytest.mark.parametrize("name", REJECTED)
def test_a_file_is_rejected_with_one_line(name, tmp_path):
    content, reason = REJECTED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_rows(tmp_path / name, training=True)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / name) in message
    assert len(message) < 600 + 2 * len(str(tmp_path))


def test_there_are_more_than_sixty_files():
    assert len(READ) + len(REJECTED) >= 60


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({**PROMPT, "rejected_by": "x"}, "rejected_by is not used (in 1 of 2 rows)"),
        ({"title": "裙", **CHAT}, "title is not used"),
        ({**CHAT, "weight": 0}, "weight is not used"),
        ({**ADVERT, "weight": 0.5}, "weight is not used"),
        ({**ADVERT, "loss": 1.25}, "loss is not used"),
        ({**ADVERT, "role": "assistant"}, "role is not used"),
        ({**ADVERT, "metadata": "price"}, "metadata is not used"),
        ({**ADVERT, "tool_calls": [CALL]}, "tool_calls is not used"),
        (messages(u(name="Ann"), a()), "message: name is not used"),
        (messages(u(tool_calls=[CALL]), a()), "message: tool_calls is not used"),
        (messages(u(tools=TOOLS), a(reasoning_content="嗯")), "message: tools is not used"),
        ({"question": "裙", "answer": "显瘦", "context": "很长"}, "context is not used"),
        (messages(u(loss=True), a()), "turns of the user are trained"),
    ],
)
def test_what_matters_and_is_not_used_is_reported(row, note, tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(lines(row, ADVERT))
    assert any(note in line and str(path) in line for line in read_rows(path, training=True).notes)


def test_different_faults_are_named_one_by_one(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(lines({"text": "裙"}, {**PROMPT, "kto_tag": True}))
    with pytest.raises(UserError, match=r"2 of 2 rows cannot be used; correct or delete them: .*:1: .*:2: kto_tag"):
        read_rows(path, training=True)
