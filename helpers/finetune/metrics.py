"""Score answers against their references: ROUGE-1/2/L and BLEU-4, all from 0 to 100.

Both count the words that jieba finds, as in ChatGLM3's published recipe. ROUGE (Lin 2004) is the F1 of the overlap with
clipped counts. BLEU-4 (Papineni et al. 2002) is that of single sentences, smoothed by method 3 of Chen and Cherry 2014;
so an answer of fewer than four words stays below 100, even if it is perfect.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from helpers.errors import UserError
from helpers.files import atomic_write
from helpers.libraries.quiet import import_jieba
from helpers.memory.table import Table

jieba = import_jieba()

# Name of the score -> what rouge-score calls it.
ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
METRICS = (*ROUGE, "bleu-4")


class _JiebaWords:
    """Split text into words without spaces, through the interface that rouge-score expects."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in jieba.cut(text) if not word.isspace()]


_words = _JiebaWords()
_rouge = RougeScorer(list(ROUGE.values()), tokenizer=_words)
_smoothing = SmoothingFunction().method3


def score(prediction: str, reference: str) -> dict[str, float]:
    """Score one answer.

    Args:
        prediction: The answer.
        reference: What it should have been.

    Returns:
        Score (0-100) by metric of ``METRICS``; all 0 if either text has no words.
    """
    predicted_words, reference_words = _words.tokenize(prediction), _words.tokenize(reference)
    if not predicted_words or not reference_words:
        return dict.fromkeys(METRICS, 0.0)
    rouge = _rouge.score(reference, prediction)
    bleu = sentence_bleu([reference_words], predicted_words, smoothing_function=_smoothing)
    return {**{name: 100 * rouge[key].fmeasure for name, key in ROUGE.items()}, "bleu-4": 100 * bleu}


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each metric over the answers.

    Args:
        scores: What :func:`score` returned for each answer.

    Returns:
        Mean (0-100) by metric; empty without answers.
    """
    return {name: sum(s[name] for s in scores) / len(scores) for name in METRICS} if scores else {}


@dataclass(frozen=True)
class Evaluation:
    """Mean scores of the base model and the tuned one, on the same prompts.

    Attributes:
        rows: Number of answers.
        base: Score (0-100) by metric, of the base model; None if it was not asked.
        tuned: The same of the tuned model.
    """

    rows: int
    base: dict[str, float] | None
    tuned: dict[str, float]

    def __str__(self) -> str:
        models = {"base": self.base, "tuned": self.tuned}
        rows = [[name, *(f"{means[metric]:.2f}" for metric in METRICS)] for name, means in models.items() if means]
        return str(Table([f"{self.rows:,} answers", *METRICS], rows, number_width=8))


def compare(features: Dataset, answers: Mapping[str, Sequence[str]], output_file: Path) -> Evaluation:
    """Score the answers to ``features``, and write them to ``output_file``, one line of JSON each.

    Args:
        features: The prompts, with their references.
        answers: Those of the "tuned" model, and of the "base" model if it was asked.
        output_file: Gets all answers with their scores.

    Returns:
        The mean scores.
    """
    rows = []
    for number, entry in enumerate(features):
        reference, own = entry["reference"], {name: texts[number] for name, texts in answers.items()}
        rows.append(
            {
                "row": entry["number"],
                "prompt": entry["prompt"],
                "full_prompt": entry["full_prompt"],
                "cut": entry["truncated"],
                "reference": reference,
                **own,
                **{f"{name}_scores": score(text, reference) for name, text in own.items()},
            }
        )
    write_json_lines(output_file, rows)
    means = {name: mean_scores([row[f"{name}_scores"] for row in rows]) for name in answers}
    return Evaluation(rows=len(rows), base=means.get("base"), tuned=means["tuned"])


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as lines of JSON, all of them or none. Raises UserError if the file cannot be written."""
    try:
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; free disk space or choose another folder"
        ) from error
