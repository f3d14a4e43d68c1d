"""Draw a fine-tune: loss and memory over the steps, lengths of the examples, scores before and after."""

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

FEW_POINTS = 40  # up to this number every point gets a marker and the curve is not smoothed


def loss_and_memory(metrics: Sequence[Mapping], title: str) -> CourseFigure:
    """Draw the loss on the left and the memory per rank on the right, over the optimizer steps.

    If a step is logged twice, because a run was resumed from an earlier checkpoint, the later record counts. The memory
    is NVML's if any rank has a value, otherwise the resident memory of the processes.

    Args:
        metrics: The records of a run's metrics.jsonl: ``step`` and, if measured, ``loss``, ``eval_loss``, and the lists
            ``nvml_used_gib`` and ``resident_gib`` with one value per rank.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``metrics`` is empty.
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
    """Merge the records of each step, in the order of steps; leave out values that are None."""
    records: dict[int, dict] = {}
    for record in metrics:
        known = {key: value for key, value in record.items() if value is not None}
        records.setdefault(record["step"], {}).update(known)
    return dict(sorted(records.items()))


def _draw_loss(axes: Axes, records: Mapping[int, Mapping]) -> None:
    train = {step: record["loss"] for step, record in records.items() if "loss" in record}
    dev = {step: record["eval_loss"] for step, record in records.items() if "eval_loss" in record}
    broken = [step for step, loss in train.items() if not math.isfinite(loss)]
    # NaN leaves a gap in the line. Without the step, the line would be drawn across it.
    losses = [loss if math.isfinite(loss) else math.nan for loss in train.values()]
    if len(train) == len(broken):
        axes.set_yticks([])  # no finite value defines a scale
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
    """Smooth a curve: fit a straight line to the tenth of the values around each point, and take its value there.

    This is local linear regression by least squares. Unlike a running mean it does not lag behind a falling curve,
    and the last value does not bend the end.

    Args:
        values: The curve; NaN stays NaN and is not used in a fit.

    Returns:
        The smoothed values [len(values)].
    """
    y = np.asarray(values, dtype=float)
    known = ~np.isnan(y)
    reach = max(2, len(y) // 20)
    low = np.maximum(np.arange(len(y)) - reach, 0)
    high = np.minimum(np.arange(len(y)) + reach + 1, len(y))

    def window_sum(terms: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(np.where(known, terms, 0.0))])
        return total[high] - total[low]

    # x runs from -1 to 1, and the mean is subtracted from y, so that differences of the sums lose no digits.
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
    world_size = max((len(values) for values in measured.values()), default=0)
    for rank in range(world_size):
        values = [row[rank] if rank < len(row) and row[rank] is not None else math.nan for row in measured.values()]
        highest = max((value for value in values if not math.isnan(value)), default=math.nan)
        axes.plot(
            list(measured),
            values,
            marker="o" if len(measured) <= FEW_POINTS else None,
            label=f"rank {rank}, at most {highest:.1f} GiB",
            color=RANK_COLOURS[rank % len(RANK_COLOURS)],
            # Curves of ranks that do the same coincide: later ones are thinner, so that each stays visible.
            linewidth=1.5 + (4.0 * (world_size - 1 - rank) / (world_size - 1) if world_size > 1 else 1.0),
        )
    top = axes.get_ylim()[1]
    axes.set_ylim(0, 1.05 * top)
    if from_nvml:
        label_axes(axes, "Memory of each rank's GPU", "optimizer step", "used, read from NVML (GiB)")
    else:
        label_axes(axes, "Memory of each rank's process", "optimizer step", "resident set in host memory (GiB)")
    legend_below(axes)


def dev_loss_over_examples(runs: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str) -> CourseFigure:
    """Draw the dev loss of several runs over the training examples that each had seen.

    Args:
        runs: ``{run: (examples, losses)}``, one entry per evaluation.
        title: The figure's title.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=9, height=4.8)
    axes = fig.subplots()
    for (name, (examples, losses)), colour, marker in zip(runs.items(), RANK_COLOURS, "os^vDX", strict=False):
        axes.plot(examples, losses, color=colour, marker=marker, markersize=7, linewidth=2, label=name)
    label_axes(axes, "", "training examples seen", "dev loss (nats per token)")
    axes.set_ylim(bottom=0)
    legend_below(axes)
    return fig


def token_lengths(lengths: Sequence[int], limit: int, title: str) -> CourseFigure:
    """Draw a histogram of how many tokens the examples of a data set have, with the mean and the limit.

    Args:
        lengths: Tokens per example.
        limit: Number of tokens at which examples are truncated; not drawn if it is far above all lengths.
        title: The figure's title.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=9, height=4.4)
    axes = fig.subplots()
    # Every bar covers the same whole number of lengths; otherwise some would count one more than their neighbours.
    width = -(-(max(lengths) - min(lengths) + 1) // 40)
    edges = [edge - 0.5 for edge in range(min(lengths), max(lengths) + width + 1, width)]
    axes.hist(lengths, bins=edges, color=BLUE)
    mean = sum(lengths) / len(lengths)
    axes.axvline(mean, color=BLACK, linewidth=2, label=f"mean, {mean:.0f} tokens")
    if limit <= 1.5 * max(lengths):
        axes.axvline(limit, color=VERMILION, linewidth=2, linestyle="--", label=f"cut at {limit} tokens")
    label_axes(axes, "", "tokens of a row", "rows")
    legend_below(axes)
    return fig


def score_bars(base: Mapping[str, float], tuned: Mapping[str, float]) -> CourseFigure:
    """Draw the scores of the base model and the tuned model side by side, one group per metric.

    Args:
        base: ``{metric: score}`` from 0 to 100, with metrics such as "rouge-l" and "bleu-4".
        tuned: The same metrics of the tuned model.

    Returns:
        The figure.

    Raises:
        UserError: The metrics differ, or a score is not from 0 to 100.
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
        positions = [group + offset for group in range(len(base))]
        bars = axes.bar(positions, [scores[metric] for metric in base], width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=TEXT_SIZE)
    label_axes(axes, "", "", "score (0-100, higher is better)")
    axes.set_xticks(range(len(base)), [_metric_name(metric) for metric in base], fontsize=TEXT_SIZE)
    axes.set_ylim(0, max(1.0, 1.12 * max(*base.values(), *tuned.values())))
    legend_below(axes)
    return fig


def _metric_name(key: str) -> str:
    """Write a metric for the axis: "rouge-l", "rouge_l" and "rougeL" are all ROUGE-L."""
    return re.sub(r"(ROUGE|BLEU)[-_]?", r"\1-", key.upper())
