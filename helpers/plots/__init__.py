"""Every figure of the course, in one style: legible on a projector, one palette, safe for colour-blind readers.

Functions take plain data and return a :class:`CourseFigure`. Nothing here touches pyplot or a backend, so figures are
the same from a script, a rank or a notebook, and none is left open.
"""

from helpers.plots.activations import kept_tensors, memory_history, trade_off
from helpers.plots.bars import bars_by_rank, rates_and_memory, stacked_seconds
from helpers.plots.communication import collective, rank_groups, transfer_times
from helpers.plots.curves import beside_formula, bytes_over_moments
from helpers.plots.matrices import matrix_parts
from helpers.plots.memory import (
    memory_bars,
    memory_sources,
    memory_steps,
    memory_timeline,
    model_sizes,
    prediction_errors,
)
from helpers.plots.quantization import levels_in_histogram
from helpers.plots.schedule import Span, lanes
from helpers.plots.style import CATEGORY_COLOURS, RANK_COLOURS, CourseFigure, save_figure
from helpers.plots.training import loss_and_memory, score_bars, smoothed, token_lengths

__all__ = [
    "CATEGORY_COLOURS",
    "RANK_COLOURS",
    "CourseFigure",
    "Span",
    "bars_by_rank",
    "beside_formula",
    "bytes_over_moments",
    "collective",
    "kept_tensors",
    "lanes",
    "levels_in_histogram",
    "loss_and_memory",
    "matrix_parts",
    "memory_bars",
    "memory_history",
    "memory_sources",
    "memory_steps",
    "memory_timeline",
    "model_sizes",
    "prediction_errors",
    "rank_groups",
    "rates_and_memory",
    "save_figure",
    "score_bars",
    "smoothed",
    "stacked_seconds",
    "token_lengths",
    "trade_off",
    "transfer_times",
]
