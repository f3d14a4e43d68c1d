"""Answers in batches and over ranks are those of one prompt at a time; base and tuned are scored on the same rows."""

import json
import re
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from small_chatglm import chain_model, small_model, small_tokenizer
from torch.nn.parallel import DistributedDataParallel

from helpers.chatglm3.chat import encode_conversation
from helpers.errors import UserError
from helpers.finetune import evaluate as evaluate_module
from helpers.finetune.dataset import Limits, decode_text, evaluation_features, read_split
from helpers.finetune.evaluate import evaluate, generate_answers
from helpers.finetune.metrics import write_json_lines

QUESTIONS = ["类型#裙", "宽松", "版型#宽松 类型#裙 柔软的面料", "裙", "简约百搭", "Hello", "舒适又显瘦"]
ROWS = [{"content": question, "summary": "柔软"} for question in QUESTIONS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prompts_of(tokenizer):
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids for messages in asked]


def features_of(tokenizer, folder, rows=ROWS):
    path = folder / "dev.json"
    path.write_text(json.dumps(rows))
    limits = Limits(256, 16)
    return evaluation_features(read_split(path, tokenizer, limits, training=False), tokenizer, limits)


def answered(model, tokenizer, prompts, batch_size=3, max_new_tokens=6):
    return generate_answers(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label="test"
    )


def one_by_one(model, tokenizer, prompts):
    """The answers without any batching, padding or cache."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt) :]
        end = next((i for i, token in enumerate(new) if token in tokenizer.stop_token_ids), len(new))
        answers.append(decode_text(tokenizer, new[:end]))
    return answers


def token(tokenizer, character):
    """The id of a character that is one piece."""
    (piece,) = tokenizer.encode_text(character)[1:]
    return piece


@pytest.mark.slow
def test_batched_answers_are_those_of_one_prompt_at_a_time(tokenizer):
    model, prompts = small_model(tokenizer).eval(), prompts_of(tokenizer)
    expected = one_by_one(model, tokenizer, prompts)
    assert len(set(expected)) > 2
    for batch_size in (1, 3, 100):
        assert answered(model, tokenizer, prompts, batch_size) == expected


@pytest.mark.parametrize("stop", ["</s>", "<|user|>", "<|observation|>"])
def test_an_answer_ends_at_each_stop_token(stop, tokenizer):
    skirt, end = token(tokenizer, "裙"), tokenizer.convert_tokens_to_ids(stop)
    chain = {tokenizer.role_token_id("assistant"): skirt, skirt: end, end: skirt}
    forwards = []
    model = chain_model(tokenizer, chain)
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    assert answered(model, tokenizer, prompts_of(tokenizer), batch_size=10) == ["裙"] * len(QUESTIONS)
    assert len(forwards) == 2


def test_an_answer_may_be_empty(tokenizer):
    assert answered(chain_model(tokenizer, {}), tokenizer, prompts_of(tokenizer)) == [""] * len(QUESTIONS)


def test_no_prompt_is_no_answer(tokenizer):
    assert answered(small_model(tokenizer), tokenizer, []) == []


def test_generation_uses_the_cache_under_gradient_checkpointing_and_leaves_the_model_as_it_was(tokenizer):
    model = lora(small_model(tokenizer))
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    lengths = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda _, ids, __: lengths.append(ids[0].shape[1]))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    answered(model, tokenizer, prompts_of(tokenizer), batch_size=10)
    assert set(lengths[1:]) == {1}
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def lora(model, **settings):
    torch.manual_seed(0)
    defaults = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": 0.5}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **defaults | settings))


def says_soft_when_tuned(tokenizer):
    """A model that says 裙, with an adapter that makes it say 柔软."""
    assistant, skirt = tokenizer.role_token_id("assistant"), token(tokenizer, "裙")
    soft, soft_too = token(tokenizer, "柔"), token(tokenizer, "软")
    model = lora(
        chain_model(tokenizer, {assistant: skirt, soft: soft_too}), r=1, lora_alpha=1, target_modules=["lm_head"]
    )
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.lora_A["default"].weight.zero_()[0, assistant] = 1
        head.lora_B["default"].weight.zero_()[soft, 0] = 5
    return model


def test_base_and_tuned_are_scored_on_the_same_rows(tokenizer, tmp_path):
    model = says_soft_when_tuned(tokenizer)
    output_file = tmp_path / "output" / "predictions.jsonl"
    evaluation = evaluate(
        model, tokenizer, features_of(tokenizer, tmp_path), max_new_tokens=8, batch_size=4, output_file=output_file
    )
    assert evaluation.rows == 7
    assert evaluation.tuned["rouge-1"] == 100
    assert evaluation.base["rouge-1"] == 0
    rows = [json.loads(line) for line in output_file.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == QUESTIONS
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert {(row["reference"], row["base"], row["tuned"]) for row in rows} == {("柔软", "裙", "柔软")}
    assert rows[0]["tuned_scores"]["rouge-l"] == 100
    assert rows[0]["base_scores"]["rouge-l"] == 0
    table = str(evaluation).splitlines()
    assert table[0].split() == ["7", "answers", "rouge-1", "rouge-2", "rouge-l", "bleu-4"]
    assert table[1].split()[:2] == ["base", "0.00"]
    assert table[2].split()[:2] == ["tuned", "100.00"]
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_few_rows_and_empty_answers_are_no_crash(count, tokenizer, tmp_path):
    model = lora(chain_model(tokenizer, {}))
    rows = [{"content": "裙", "summary": ""}, *ROWS][:count]
    features = features_of(tokenizer, tmp_path, rows)
    evaluation = evaluate(
        model, tokenizer, features, max_new_tokens=4, batch_size=16, output_file=tmp_path / "predictions.jsonl"
    )
    assert evaluation.rows == count
    assert set(evaluation.tuned.values()) == set(evaluation.base.values()) == {0.0}


def runs_out_of_memory_above(rows, model, monkeypatch):
    generate, sizes = model.generate, []

    def generate_or_fail(**arguments):
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > rows:
            raise torch.OutOfMemoryError
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", generate_or_fail)
    return sizes


@pytest.mark.slow
def test_the_batch_is_halved_until_it_fits(tokenizer, monkeypatch, capsys):
    model, prompts = small_model(tokenizer), prompts_of(tokenizer)
    expected = answered(model, tokenizer, prompts)
    capsys.readouterr()
    sizes = runs_out_of_memory_above(2, model, monkeypatch)
    assert answered(model, tokenizer, prompts, batch_size=16) == expected
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "evaluation: GPU memory ran out with 7 rows, going on with 3",
        "evaluation: GPU memory ran out with 3 rows, going on with 1",
    ]


def test_one_row_that_does_not_fit_is_an_error(tokenizer, monkeypatch):
    model = small_model(tokenizer)
    runs_out_of_memory_above(0, model, monkeypatch)
    with pytest.raises(UserError, match=r"one row of \d+ \+ 6 tokens; lower max_input_length"):
        answered(model, tokenizer, prompts_of(tokenizer), batch_size=1)


def test_progress_is_told_in_lines(tokenizer, monkeypatch, capsys):
    model = small_model(tokenizer)
    monkeypatch.setattr(evaluate_module, "SECONDS_BETWEEN_LINES", 3600)
    answered(model, tokenizer, prompts_of(tokenizer), batch_size=3)
    assert re.fullmatch(r"test: 7 of 7 answers in \d+ s\n", capsys.readouterr().out)
    monkeypatch.setattr(evaluate_module, "SECONDS_BETWEEN_LINES", 0)
    answered(model, tokenizer, prompts_of(tokenizer), batch_size=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" answers")[0] for line in lines] == ["test: 3 of 7", "test: 6 of 7", "test: 7 of 7"]


def test_a_file_that_cannot_be_written_whole_leaves_the_older_one(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_json_lines(path, [{"text": "裙"}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"predictions\.jsonl cannot be written: File too large; free disk space"):
            write_json_lines(path, [{"text": "裤" * 1000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text(encoding="utf-8") == '{"text": "裙"}\n'
    assert list(tmp_path.iterdir()) == [path]


# The command line


@pytest.fixture
def command_line(tokenizer, tmp_path, monkeypatch):
    """Run ``evaluate`` on a model that says 柔软 when tuned; the loader of checkpoints has tests of its own."""
    model = says_soft_when_tuned(tokenizer)

    def find_scored(path):
        if path != tmp_path:
            raise UserError(f"{path.name} holds no model")
        return path

    loading = SimpleNamespace(load_for_inference=lambda path, device: (model, tokenizer), find_scored=find_scored)
    monkeypatch.setitem(sys.modules, "helpers.finetune.loading", loading)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
        evaluate_module.main()

    return run


def test_the_command_prints_a_table_and_keeps_the_answers(command_line, tmp_path, capsys):
    data_file = tmp_path / "test.json"
    data_file.write_text("\n".join(json.dumps(row) for row in ROWS))
    command_line(tmp_path, data_file, "--max-rows", 3)
    printed = capsys.readouterr().out
    assert "3 answers   rouge-1   rouge-2   rouge-l    bleu-4\nbase           0.00" in printed
    assert f"every answer is in {tmp_path / 'predictions-test.jsonl'}" in printed
    assert len((tmp_path / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_the_command_refuses_what_it_cannot_score(command_line, tmp_path, capsys):
    data_file = tmp_path / "test.json"
    with pytest.raises(UserError, match=r"test\.json does not exist; in that folder: no file"):
        command_line(tmp_path, data_file)
    data_file.write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match="merged holds no model"):
        command_line(tmp_path / "merged", data_file)
    with pytest.raises(SystemExit):
        command_line(tmp_path, data_file, "--max-rows", 0)
    assert "--max-rows: 0 is not a positive number" in capsys.readouterr().err


# Over two ranks


ANSWER_ON_A_RANK = """
import sys
from pathlib import Path
from test_evaluate import answer_on_a_rank

answer_on_a_rank(Path(sys.argv[1]))
"""


def answer_on_a_rank(folder):
    """One of two ranks: answer over ranks, then a training step; each rank writes what it saw."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tokenizer = small_tokenizer(folder / f"rank{rank}")
    model = small_model(tokenizer)
    prompts = prompts_of(tokenizer)
    calls = []
    model.model.embed_tokens.register_forward_hook(
        lambda _, ids, __: calls.append(len(ids[0])) if ids[0].shape[1] > 1 else None
    )
    seen = {
        "all": answered(model, tokenizer, prompts, batch_size=2),
        "one": answered(model, tokenizer, prompts[:1], batch_size=2),
        "calls": list(calls),
    }
    generate = model.generate
    if rank == 1:
        # Only this rank runs out of memory; the other has to follow it.
        def generate_or_fail(**arguments):
            if len(arguments["input_ids"]) > 2:
                raise torch.OutOfMemoryError
            return generate(**arguments)

        model.generate = generate_or_fail
    seen["halved"] = answered(model, tokenizer, prompts, batch_size=4)
    model.generate = generate
    seen["gradients"] = _gradients_after_evaluation(model, tokenizer, folder, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def _gradients_after_evaluation(model, tokenizer, folder, rank):
    """Gradients of a DDP step on different data of each rank, after the adapter was off and on again."""
    tuned = lora(model, lora_dropout=0.0)
    wrapped = DistributedDataParallel(tuned)
    output_file = folder / "predictions.jsonl"
    features = features_of(tokenizer, folder / f"rank{rank}")
    evaluation = evaluate(tuned, tokenizer, features, max_new_tokens=2, batch_size=4, output_file=output_file)
    assert (evaluation is None) == (rank == 1)
    ids = torch.tensor([prompts_of(tokenizer)[rank]])
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return [p.grad.abs().sum().item() for p in tuned.parameters() if p.requires_grad]


@pytest.mark.slow
def test_two_ranks_share_the_prompts(tokenizer, tmp_path, rank_server):
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
    script = tmp_path / "answer_on_a_rank.py"
    script.write_text(ANSWER_ON_A_RANK)
    finished = rank_server.run(script, tmp_path, nprocs=2)
    assert finished.returncode == 0, finished.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    alone = answered(small_model(tokenizer), tokenizer, prompts_of(tokenizer))
    assert first["all"] == first["halved"] == alone
    assert first["one"] == alone[:1]
    assert second["all"] is second["one"] is second["halved"] is None
    # Seven prompts are four for each rank, the last of rank 1 a repeated one; one prompt is answered by both.
    assert first["calls"] == second["calls"] == [2, 2, 1]
    assert sum(first["gradients"]) > 0
    assert first["gradients"] == second["gradients"]
    assert len((tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 7
