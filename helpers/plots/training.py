"""Figures of a fine-tune: loss and memory over the steps, lengths of its rows, scores before and after."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    BLUE,
    GREY,
    RANK_COLOURS,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    label_axes,
    legend_below,
    new_figure,
)

FEW_POINTS = 40  # up to here every point gets a marker, and no smoothing


def loss_and_memory(metrics: Sequence[Mapping], title: str) -> CourseFigure:
    """Loss on the left and memory per rank on the right, over the optimizer step.

    ``metrics`` are the records of a run's metrics.jsonl: ``step`` and, where measured, ``loss``, ``eval_loss``,
    ``nvml_used_gib`` and ``resident_gib`` (lists, one value per rank). Where a step comes twice (a run resumed from an
    earlier checkpoint), the later record counts. Memory is NVML's where any rank has it, else the resident memory of
    the processes. Raises :class:`UserError` when there is no record.
    """
    if not metrics:
        raise UserError("there are no metrics to draw: the run has not logged a step (see logging_steps)")
    records = _by_step(metrics)
    fig = new_figure(title, width=13, height=5.2)
    loss_axes, memory_axes = fig.subplots(1, 2)
    _draw_loss(loss_axes, records)
    _draw_rank_memory(memory_axes, records)
    for axes in (loss_axes, memory_axes):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.margins(x=0.02)
    return fig


def _by_step(metrics: Sequence[Mapping]) -> dict[int, dict]:
    """Records of one step joined, in order of steps; values that are None are left out."""
    records: dict[int, dict] = {}
    for record in metrics:
        known = {key: value for key, value in record.items() if value is not None}
        records.setdefault(record["step"], {}).update(known)
    return dict(sorted(records.items()))


def _draw_loss(axes: Axes, records: Mapping[int, Mapping]) -> None:
    train = {step: record["loss"] for step, record in records.items() if "loss" in record}
    dev = {step: record["eval_loss"] for step, record in records.items() if "eval_loss" in record}
    broken = [step for step, loss in train.items() if not math.isfinite(loss)]
    # NaN leaves a gap in the line, where leaving the step out would draw across it.
    losses = [loss if math.isfinite(loss) else math.nan for loss in train.values()]
    if len(train) == len(broken):
        axes.set_yticks([])  # there is no scale where there is no number
    elif len(train) <= FEW_POINTS:
        axes.plot(list(train), losses, "o-", color=BLUE, linewidth=1.6, label="loss")
    else:
        axes.plot(list(train), losses, color=BLUE, linewidth=1.0, alpha=0.4, label="loss")
        axes.plot(list(train), smoothed(losses), color=BLUE, linewidth=2.6, label="loss, smoothed")
    if dev:
        axes.plot(list(dev), list(dev.values()), "D--", color=VERMILION, markersize=8, linewidth=1.2, label="dev loss")
    if broken:
        axes.plot(
            broken,
            [0.03] * len(broken),
            "x",
            transform=axes.get_xaxis_transform(),
            color=BLACK,
            markersize=8,
            markeredgewidth=1.6,
            label=f"not finite ({len(broken)}x)",
        )
    label_axes(axes, "Loss", "optimizer step", "loss (nats per token)")
    legend_below(axes)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """At each place the value of the straight line fitted to a tenth of ``values`` around it (least squares).

    Unlike a running mean it is neither late where the curve falls nor drawn to the last value where it ends. NaN
    stays NaN and enters no fit.
    """
    y = np.asarray(values, dtype=float)
    known = ~np.isnan(y)
    reach = max(2, len(y) // 20)
    low = np.maximum(np.arange(len(y)) - reach, 0)
    high = np.minimum(np.arange(len(y)) + reach + 1, len(y))

    def window_sum(terms: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(np.where(known, terms, 0.0))])
        return total[high] - total[low]

    # Places count from -1 to 1 and values from their mean, so that differences of the sums lose no digits.
    x = np.linspace(-1.0, 1.0, len(y))
    mean = np.nanmean(y)
    count, sum_x, sum_y = window_sum(np.ones_like(y)), window_sum(x), window_sum(y - mean)
    spread = count * window_sum(x * x) - sum_x**2
    slope = (count * window_sum(x * (y - mean)) - sum_x * sum_y) / np.where(spread > 0, spread, np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        line = mean + (sum_y + slope * (count * x - sum_x)) / count
    return np.where(known, line, np.nan)


def _draw_rank_memory(axes: Axes, records: Mapping[int, Mapping]) -> None:
    from_nvml = any(value is not None for record in records.values() for value in record.get("nvml_used_gib", []))
    key = "nvml_used_gib" if from_nvml else "resident_gib"
    measured = {step: record[key] for step, record in records.items() if key in record}
    ranks = max((len(values) for values in measured.values()), default=0)
    for rank in range(ranks):
        values = [row[rank] if rank < len(row) and row[rank] is not None else math.nan for row in measured.values()]
        highest = max((value for value in values if not math.isnan(value)), default=math.nan)
        axes.plot(
            list(measured),
            values,
            marker="o" if len(measured) <= FEW_POINTS else None,
            label=f"rank {rank}, at most {highest:.1f} GiB",
            color=RANK_COLOURS[rank % len(RANK_COLOURS)],
            # Ranks that do the same lie on one another: later ones are thinner, so that each stays visible.
            linewidth=1.5 + (4.0 * (ranks - 1 - rank) / (ranks - 1) if ranks > 1 else 1.0),
        )
    top = axes.get_ylim()[1]
    axes.set_ylim(0, 1.05 * top)
    if from_nvml:
        label_axes(axes, "Memory of each rank's GPU", "optimizer step", "used, read from NVML (GiB)")
    else:
        label_axes(axes, "Memory of each rank's process", "optimizer step", "resident set in host memory (GiB)")
    legend_below(axes)


def token_lengths(lengths: Sequence[int], limit: int, title: str) -> CourseFigure:
    """How long the rows of a data set are, in tokens, and where they are cut (``limit``)."""
    fig = new_figure(title, width=9, height=4.4)
    axes = fig.subplots()
    # Bars of whole tokens: with others, some would count one length more than their neighbours do.
    width = -(-(max(lengths) - min(lengths) + 1) // 40)
    axes.hist(lengths, bins=np.arange(min(lengths), max(lengths) + width + 1, width) - 0.5, color=BLUE)
    mean = sum(lengths) / len(lengths)
    axes.axvline(mean, color=BLACK, linewidth=2, label=f"mean, {mean:.0f} tokens")
    if limit <= 1.5 * max(lengths):
        axes.axvline(limit, color=VERMILION, linewidth=2, linestyle="--", label=f"cut at {limit} tokens")
    label_axes(axes, "", "tokens of a row", "rows")
    legend_below(axes)
    return fig


def score_bars(base: Mapping[str, float], tuned: Mapping[str, float]) -> CourseFigure:
    """The base model's and the tuned model's scores side by side, one group per metric, all on 0-100.

    Keys name the metrics ("rouge-l", "bleu-4") and must be the same in both. Raises :class:`UserError` where they are
    not, or where a score is no number from 0 to 100.
    """
    if set(base) != set(tuned) or not base:
        raise UserError(f"scores of different metrics: base has {sorted(base)}, tuned has {sorted(tuned)}")
    for model, scores in (("base", base), ("tuned", tuned)):
        for metric, score in scores.items():
            if not 0 <= score <= 100:
                raise UserError(f"{metric} of the {model} model is {score}; scores are percentages from 0 to 100")
    fig = new_figure("Base model and tuned model on the same rows", width=9, height=5)
    axes = fig.subplots()
    width = 0.38
    for offset, label, scores, colour in ((-width / 2, "base", base, GREY), (width / 2, "tuned", tuned, BLUE)):
        positions = [place + offset for place in range(len(base))]
        bars = axes.bar(positions, [scores[metric] for metric in base], width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=TEXT_SIZE)
    label_axes(axes, "", "", "score (0-100, higher is better)")
    axes.set_xticks(range(len(base)), [_metric_name(metric) for metric in base], fontsize=TEXT_SIZE)
    axes.set_ylim(0, max(1.0, 1.12 * max(*base.values(), *tuned.values())))
    legend_below(axes)
    return fig


def _metric_name(key: str) -> str:
    """ "rouge-l", "rouge_l" and "rougeL" are all ROUGE-L."""
    return re.sub(r"(ROUGE|BLEU)[-_]?", r"\1-", key.upper())
