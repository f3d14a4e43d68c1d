"""The command that scores an adapter, on several ranks: it says what one process says."""

import shutil

import pytest
from small_finetune import ROOT

EVALUATE = ROOT / "helpers" / "finetune" / "evaluate.py"


@pytest.mark.slow
def test_evaluate_on_two_ranks_says_what_one_process_says(tmp_path, rank_server, small_run, data_dir):
    printed, answers = [], []
    for nprocs in (None, 2):
        folder = shutil.copytree(small_run / "checkpoint-2", tmp_path / str(nprocs))
        arguments = [folder, data_dir / "dev.json", "--max-rows", 5, "--max-output-length", 6, "--batch-size", 2]
        finished = rank_server.run(EVALUATE, *arguments, nprocs=nprocs)
        assert finished.returncode == 0, finished.stderr
        printed.append(finished.stdout.replace(str(folder), ""))
        answers.append((folder / "predictions-dev.jsonl").read_text(encoding="utf-8"))
    assert answers[0] == answers[1] and answers[0].count("\n") == 5
    tables = [text[text.index("5 answers") :] for text in printed]
    assert tables[0] == tables[1]
    assert printed[1].count("5 answers   rouge-1") == 1  # rank 0 alone prints
