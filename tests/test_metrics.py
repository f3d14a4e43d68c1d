"""ROUGE and BLEU on 0-100, for any text."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.finetune.metrics import METRICS, mean_scores, score

REFERENCE = "这款裙子采用柔软的面料，宽松的版型显瘦又舒适"


def test_the_same_text_scores_100():
    assert score(REFERENCE, REFERENCE) == pytest.approx(dict.fromkeys(METRICS, 100.0))


def test_nothing_in_common_scores_0():
    assert score("今天天气很好", REFERENCE) == pytest.approx(dict.fromkeys(METRICS, 0.0), abs=1e-9)


def test_rouge_counts_chinese_words_by_hand():
    # 宽松|的|裤子 against 宽松|的|裙子|显瘦: two words of three and of four, one pair of two and of three.
    scores = score("宽松的裤子", "宽松的裙子显瘦")
    assert scores["rouge-1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["rouge-2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert scores["rouge-l"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert 0 < scores["bleu-4"] < 60


def test_the_order_of_words_matters_to_all_but_rouge_1():
    scores = score("舒适 柔软 宽松 显瘦", "显瘦 宽松 柔软 舒适")
    assert scores["rouge-1"] == 100
    assert scores["rouge-2"] == 0
    assert scores["rouge-l"] == 25
    assert scores["bleu-4"] < 50


def test_a_short_answer_is_not_better_for_being_short():
    # ROUGE is an F1 and BLEU has its brevity penalty: neither is the precision alone.
    assert score("裙子", REFERENCE)["rouge-1"] < 30
    assert score("裙子", REFERENCE)["bleu-4"] < 1


@pytest.mark.parametrize("empty", ["", "   ", "\n\t\u3000"])
def test_an_empty_answer_or_reference_scores_0(empty):
    zeros = dict.fromkeys(METRICS, 0.0)
    assert score(empty, REFERENCE) == zeros
    assert score(REFERENCE, empty) == zeros
    assert score(empty, empty) == zeros


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_two_texts_have_scores_between_0_and_100(prediction, reference):
    scores = score(prediction, reference)
    assert tuple(scores) == METRICS
    assert all(0 <= value <= 100 + 1e-9 for value in scores.values())
    swapped = score(reference, prediction)
    assert [scores[m] for m in METRICS[:3]] == pytest.approx([swapped[m] for m in METRICS[:3]])


def test_the_mean_is_taken_for_each_metric():
    half = mean_scores([dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 100.0)])
    assert half == dict.fromkeys(METRICS, 50.0)
    assert mean_scores([]) == {}


@pytest.mark.slow
def test_jieba_says_nothing():
    code = "from helpers.finetune.metrics import score; score('宽松的裤子', '宽松的裙子')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
