"""How close an answer is to its reference: ROUGE-1/2/L and BLEU-4, all on 0-100.

Both are counted on the words that jieba finds, as ChatGLM3's published recipe does. ROUGE is the F1 of the overlap
(Lin 2004), with clipped counts; BLEU-4 (Papineni et al. 2002) is that of the sentence, smoothed by method 3 of Chen and
Cherry 2014. An answer of fewer than four words therefore stays below 100 in BLEU-4 even if it is perfect.
"""

from collections.abc import Mapping, Sequence

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from helpers.libraries.quiet import import_jieba

jieba = import_jieba()

# Name of the score -> what rouge-score calls it.
ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
METRICS = (*ROUGE, "bleu-4")


class _JiebaWords:
    """The words of a text, spaces left out; the interface that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in jieba.cut(text) if not word.isspace()]


_words = _JiebaWords()
_rouge = RougeScorer(list(ROUGE.values()), tokenizer=_words)
_smoothing = SmoothingFunction().method3


def score(prediction: str, reference: str) -> dict[str, float]:
    """Every metric of ``METRICS`` for one answer, 0-100. If either text has no word, all are 0."""
    predicted, wanted = _words.tokenize(prediction), _words.tokenize(reference)
    if not predicted or not wanted:
        return dict.fromkeys(METRICS, 0.0)
    rouge = _rouge.score(reference, prediction)
    bleu = sentence_bleu([wanted], predicted, smoothing_function=_smoothing)
    return {**{name: 100 * rouge[key].fmeasure for name, key in ROUGE.items()}, "bleu-4": 100 * bleu}


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the answers; empty where there are none, since no answers have no mean."""
    return {name: sum(s[name] for s in scores) / len(scores) for name in METRICS} if scores else {}
