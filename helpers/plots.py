"""Every figure of the course, in one style: legible on a projector, one palette, safe for colour-blind readers.

Functions take plain data and return a :class:`CourseFigure`. Nothing here touches pyplot or a backend, so figures are
the same from a script, a rank or a notebook, and none is left open.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from helpers.errors import UserError
from helpers.files import replacing
from helpers.memory.phases import Phase, across_ranks
from helpers.memory.timeline import GIB, GpuCurve, Timeline
from helpers.memory.units import Unit, unit_for

# Okabe and Ito's palette (Color Universal Design, 2008), its yellow, which is too pale for lines, replaced by grey.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#8C8C8C",
)
RANK_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY)
# Where the bytes go: the same colour for the same category in every chapter.
CATEGORY_COLOURS = {
    "parameters": BLUE,
    "gradients": ORANGE,
    "optimizer states": GREEN,
    "activations": VERMILION,
    "communication buffers": PURPLE,
    "buffers": SKY,
    "other": GREY,
    # What only a prediction, or only a measurement, tells apart: tints of what it is near to, greys, browns.
    "logits and loss": "#F4B183",
    "not counted: temporaries": "#F0E442",
    "allocator rounding": "#E3E3E3",
    "allocator cache": "#C4C4C4",
    "not told apart": "#A6A6A6",
    "NCCL": "#B08A52",
    "CUDA context and NCCL": "#6E5A3C",
    "CUDA context": "#2B2B2B",
}

TEXT_SIZE = 13
SMALL_SIZE = 11.5
TITLE_SIZE = 15
DPI = 110
FEW_POINTS = 40  # up to here every point gets a marker, and no smoothing


class CourseFigure(Figure):
    """A figure that notebooks show as PNG by itself."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write ``fig`` in the format of the path's suffix (.png, .svg, .pdf); an older file stays until it is whole."""
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in fig.canvas.get_supported_filetypes():
        raise UserError(f"cannot write a figure to {path}: give a name that ends in .png, .svg or .pdf")
    with replacing(path) as temporary:
        fig.savefig(temporary, format=suffix, dpi=DPI)


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
    fig = _figure(title, width=13, height=5.2)
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
    _label(axes, "Loss", "optimizer step", "loss (nats per token)")
    _legend_below(axes)


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
        _label(axes, "Memory of each rank's GPU", "optimizer step", "used, read from NVML (GiB)")
    else:
        _label(axes, "Memory of each rank's process", "optimizer step", "resident set in host memory (GiB)")
    _legend_below(axes)


# Paul Tol's light scheme: pale enough to lie behind curves in any of RANK_COLOURS.
PHASE_TINTS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#99DDFF", "#BBCC33", "#AAAAAA")
NARROWEST_PHASE = 0.004  # of the axis: what lasted less is drawn this wide, or it could not be seen


def memory_timeline(timeline: Timeline, phases: Sequence[Phase], title: str) -> CourseFigure:
    """Used memory of every GPU over the seconds of a job, with the phases that its ranks marked.

    Each GPU has a row of its own on one common scale, since GPUs that do the same would hide one another. A band above
    has one row per phase name, so that names never meet however short a phase; phases of several ranks are drawn as
    one, from the first rank's start to the last one's end. Beside each curve stand its baseline and its peak. Without
    curves the figure says why.
    """
    spans = _phase_spans(timeline, phases)
    names = list(dict.fromkeys(name for name, _, _ in spans))
    tints = {name: PHASE_TINTS[row % len(PHASE_TINTS)] for row, name in enumerate(names)}
    band_heights = [0.1 + 0.27 * len(names)] if names else []
    row_heights = [max(1.0, 4.2 / len(timeline.gpus))] * len(timeline.gpus) if timeline.gpus else [1.6]
    fig = _figure(title, width=13, height=1.2 + sum(band_heights + row_heights) + 0.2 * len(row_heights))
    panels = fig.subplots(
        len(band_heights + row_heights), 1, sharex=True, squeeze=False, height_ratios=band_heights + row_heights
    )[:, 0]
    if names:
        _draw_phase_band(panels[0], spans, names, tints)
    rows = panels[len(band_heights) :]
    for axes in rows:
        _label(axes, "", "", "GiB")
        for name, start, end in spans:
            axes.axvspan(start, end, color=tints[name], alpha=0.22, linewidth=0)
    for axes, gpu, colour in zip(rows, timeline.gpus, cycle(RANK_COLOURS), strict=False):
        _draw_gpu_curve(axes, gpu, colour, small=len(timeline.gpus) > 2)
        axes.set_ylim(0, 1.12 * max(other.peak for other in timeline.gpus) / GIB)
    rows[0].set_title("used memory of each GPU, read from NVML", fontsize=TEXT_SIZE, loc="left")
    if not timeline.gpus:
        rows[0].set_yticks([])
        rows[0].text(
            0.5, 0.5, timeline.note, transform=rows[0].transAxes, ha="center", va="center", fontsize=TEXT_SIZE
        ).set_bbox({"facecolor": "white", "edgecolor": "none"})
    rows[-1].set_xlabel("seconds", fontsize=TEXT_SIZE)
    rows[-1].set_xlim(0, _axis_end(timeline))
    return fig


def _draw_gpu_curve(axes: Axes, gpu: GpuCurve, colour: str, small: bool) -> None:
    axes.plot(gpu.seconds, [used / GIB for used in gpu.used], color=colour, linewidth=1.8)
    for second, used, marker in ((gpu.seconds[0], gpu.baseline, "o"), (gpu.peak_seconds, gpu.peak, "^")):
        axes.plot(second, used / GIB, marker, color=colour, markersize=9, markeredgecolor="white", clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 6, steps=[1, 2, 5, 10]))
    axes.text(
        1.01,
        0.5,
        f"GPU {gpu.index}\n\u25cf before {gpu.baseline / GIB:.1f} GiB\n\u25b2 peak {gpu.peak / GIB:.1f} GiB",
        transform=axes.transAxes,
        va="center",
        fontsize=SMALL_SIZE,
        color=colour,
    )


def _axis_end(timeline: Timeline) -> float:
    return max(timeline.duration, 0.01)


def _phase_spans(timeline: Timeline, phases: Sequence[Phase]) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of the timeline, cut to it; what never ended lasts to its end."""
    end_of_axis = _axis_end(timeline)
    spans = []
    for phase in across_ranks(phases):
        start = phase.start - timeline.start
        end = end_of_axis if phase.end is None else phase.end - timeline.start
        if end >= 0 and start <= end_of_axis:
            start, end = max(start, 0.0), min(end, end_of_axis)
            spans.append((phase.name, start, max(end, start + NARROWEST_PHASE * end_of_axis)))
    return spans


def _draw_phase_band(
    axes: Axes, spans: Sequence[tuple[str, float, float]], rows: Sequence[str], tints: Mapping[str, str]
) -> None:
    for name, start, end in spans:
        axes.broken_barh([(start, end - start)], (rows.index(name) - 0.4, 0.8), color=tints[name])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=TEXT_SIZE)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def memory_bars(bars: Mapping[str, Mapping[str, float]], title: str) -> CourseFigure:
    """One stacked bar of GiB per configuration: ``{configuration: {category: GiB}}``.

    Categories keep the order of the first bar and the colours of ``CATEGORY_COLOURS``; others get grey shades. Each
    bar's sum stands at its end. Raises :class:`UserError` where there is no bar or a part is negative.
    """
    if not bars:
        raise UserError("there are no bars to draw")
    categories = list(dict.fromkeys(category for parts in bars.values() for category in parts))
    fig = _figure(title, width=13, height=1.9 + 0.75 * len(bars))
    axes = fig.subplots()
    greys = cycle(("#8C8C8C", "#BDBDBD", "#DADADA"))
    left = dict.fromkeys(bars, 0.0)
    for category in categories:
        widths = [parts.get(category, 0.0) for parts in bars.values()]
        if min(widths) < 0:
            raise UserError(f"{category!r} of a bar is {min(widths):.2f} GiB; memory cannot be negative")
        colour = CATEGORY_COLOURS.get(category) or next(greys)
        axes.barh(list(bars), widths, left=list(left.values()), color=colour, height=0.62, label=category)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    for place, total in enumerate(left.values()):
        axes.text(total, place, f" {total:.1f} GiB", va="center", fontsize=TEXT_SIZE)
    _finish_bars(fig, axes, "GPU memory (GiB)", 1.12 * max(left.values()), len(categories))
    return fig


def _finish_bars(fig: CourseFigure, axes: Axes, axis: str, right: float, kinds: int) -> None:
    """What horizontal bars have in common: the first one on top, a grid to read lengths by, a legend of ``kinds``."""
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    _label(axes, "", axis, "")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelsize=TEXT_SIZE, length=0)
    if kinds:
        fig.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=min(4, kinds),
            fontsize=SMALL_SIZE,
            frameon=False,
        )


def memory_sources(ranks: Mapping[str, Mapping[str, Mapping[str, int] | None]], title: str) -> CourseFigure:
    """What each source says of one configuration's memory: stacked bars side by side, one panel per rank.

    ``ranks`` is ``{"rank 0": {"predicted": {item: bytes}, "counted": …, "NVML": None}}`` (see
    :attr:`helpers.memory.report.RankReport.bars`). None stands for no number, and is shown as "not available". All
    panels share one axis in GiB, MiB or KiB, and the colours of ``CATEGORY_COLOURS``. Raises :class:`UserError` where
    there is no rank, or a part is negative or has no colour.
    """
    if not ranks:
        raise UserError("there is no rank whose memory could be drawn")
    bars = [parts or {} for sources in ranks.values() for parts in sources.values()]
    for item, size in (pair for parts in bars for pair in parts.items()):
        if item not in CATEGORY_COLOURS:
            raise UserError(f"{item!r} of a bar has no colour; give some of {', '.join(CATEGORY_COLOURS)}")
        if size < 0:
            raise UserError(f"{item!r} of a bar is {size} bytes; memory cannot be negative")
    unit = unit_for(sum(parts.values()) for parts in bars)
    rows = -(-len(ranks) // 2)
    fig = _figure(title, width=8 if len(ranks) == 1 else 13, height=1.9 + 3.9 * rows)
    panels = fig.subplots(rows, 2 if len(ranks) > 1 else 1, squeeze=False, sharey=True).flatten()
    for axes, (name, sources) in zip(panels, ranks.items(), strict=False):
        _draw_sources(axes, sources, unit)
        _label(axes, name, "", f"memory ({unit.name})")
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", labelleft=True)
        axes.set_ylim(0, 1.1 * max(max(sum(parts.values()) for parts in bars) / unit.size, 0.01))
    for axes in panels[len(ranks) :]:
        axes.set_visible(False)
    present = {item for parts in bars for item, size in parts.items() if size}
    patches = [Patch(color=colour, label=item) for item, colour in CATEGORY_COLOURS.items() if item in present]
    fig.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=SMALL_SIZE, frameon=False)
    return fig


def _draw_sources(axes: Axes, sources: Mapping[str, Mapping[str, int] | None], unit: Unit) -> None:
    for place, parts in enumerate(sources.values()):
        bottom = 0.0
        for item in CATEGORY_COLOURS:
            height = (parts or {}).get(item, 0) / unit.size
            if height:
                colour = CATEGORY_COLOURS[item]
                axes.bar(place, height, 0.72, bottom, color=colour, edgecolor="white", linewidth=0.6)
                bottom += height
        label = unit.amount(sum(parts.values())) if parts is not None else "not\navailable"
        axes.text(place, bottom, label, ha="center", va="bottom", fontsize=SMALL_SIZE)
    axes.set_xticks(range(len(sources)), list(sources))
    axes.set_xlim(-0.6, len(sources) - 0.4)


def token_lengths(lengths: Sequence[int], limit: int, title: str) -> CourseFigure:
    """How long the rows of a data set are, in tokens, and where they are cut (``limit``)."""
    fig = _figure(title, width=9, height=4.4)
    axes = fig.subplots()
    # Bars of whole tokens: with others, some would count one length more than their neighbours do.
    width = -(-(max(lengths) - min(lengths) + 1) // 40)
    axes.hist(lengths, bins=np.arange(min(lengths), max(lengths) + width + 1, width) - 0.5, color=BLUE)
    mean = sum(lengths) / len(lengths)
    axes.axvline(mean, color=BLACK, linewidth=2, label=f"mean, {mean:.0f} tokens")
    if limit <= 1.5 * max(lengths):
        axes.axvline(limit, color=VERMILION, linewidth=2, linestyle="--", label=f"cut at {limit} tokens")
    _label(axes, "", "tokens of a row", "rows")
    _legend_below(axes)
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
    fig = _figure("Base model and tuned model on the same rows", width=9, height=5)
    axes = fig.subplots()
    width = 0.38
    for offset, label, scores, colour in ((-width / 2, "base", base, GREY), (width / 2, "tuned", tuned, BLUE)):
        positions = [place + offset for place in range(len(base))]
        bars = axes.bar(positions, [scores[metric] for metric in base], width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=TEXT_SIZE)
    _label(axes, "", "", "score (0-100, higher is better)")
    axes.set_xticks(range(len(base)), [_metric_name(metric) for metric in base], fontsize=TEXT_SIZE)
    axes.set_ylim(0, max(1.0, 1.12 * max(*base.values(), *tuned.values())))
    _legend_below(axes)
    return fig


def model_sizes(models: Mapping[str, int], cards: Mapping[str, int], title: str) -> CourseFigure:
    """What models need beside what cards hold: ``{model: parameters}`` and ``{card: bytes}``, on a logarithmic axis.

    Each model is a line from its weights in 16 bit (2 bytes a parameter) to its model states in training (16 bytes).
    """
    fig = _figure(title, width=13, height=2.5 + 0.5 * len(models))
    axes = fig.subplots()
    for place, parameters in enumerate(models.values()):
        weights, states = 2 * parameters / GIB, 16 * parameters / GIB
        axes.plot([weights, states], [place, place], color=GREY, linewidth=3, zorder=1)
        for size, marker, colour in ((weights, "o", BLUE), (states, "D", GREEN)):
            axes.plot(size, place, marker, color=colour, markersize=11)
        axes.text(states, place, f"   {states:,.0f} GiB", va="center", fontsize=TEXT_SIZE)
    for memory in cards.values():
        axes.axvline(memory / GIB, color=VERMILION, linewidth=1.6, linestyle="--", zorder=0)
    axes.set_xscale("log")
    largest = max(16 * max(models.values()), *cards.values()) / GIB
    axes.set_xlim(min(min(cards.values()), 2 * min(models.values())) / GIB / 1.5, 3 * largest)
    axes.set_ylim(len(models) - 0.5, -0.6)
    _label(axes, "", "GiB, logarithmic", "")
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(models)), list(models), fontsize=TEXT_SIZE)
    ticks = [tick for tick in (1, 10, 100, 1000, 10_000, 100_000) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    above = axes.secondary_xaxis("top")
    above.set_xticks([memory / GIB for memory in cards.values()], list(cards), fontsize=SMALL_SIZE, color=VERMILION)
    above.xaxis.minorticks_off()
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, markersize=9, label=label)
        for colour, marker, line, label in (
            (BLUE, "o", "", "weights in 16 bit"),
            (GREEN, "D", "", "model states in training, 16 bytes a parameter"),
            (VERMILION, "", "--", "memory of one card"),
        )
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL_SIZE, frameon=False)
    return fig


def prediction_errors(configurations: Mapping[str, tuple[int, int]], title: str) -> CourseFigure:
    """Predicted and measured bytes of many configurations, and the error: ``{configuration: (predicted, measured)}``.

    On the left the bytes, on the right by how many percent the prediction is above (right of 0) or below what was
    measured. Raises :class:`UserError` where there is none, or one measured nothing.
    """
    if not configurations:
        raise UserError("there is no configuration whose prediction could be drawn")
    for name, (_, said) in configurations.items():
        if said <= 0:
            raise UserError(f"{name!r} measured {said} bytes; leave it out, there is nothing to compare with")
    unit = unit_for(size for pair in configurations.values() for size in pair)
    places = list(range(len(configurations)))
    predicted, measured = zip(*configurations.values(), strict=True)
    errors = [100 * (claim / said - 1) for claim, said in configurations.values()]
    fig = _figure(title, width=13, height=2.0 + 0.36 * len(places))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.barh(places, [size / unit.size for size in measured], 0.7, color="#BDBDBD", label="measured by NVML")
    left.plot([size / unit.size for size in predicted], places, "D", color=BLUE, markersize=8, label="predicted")
    left.set_yticks(places, list(configurations))
    left.set_ylim(len(places) - 0.4, -0.6)
    right.barh(places, errors, 0.7, color=[VERMILION if error < 0 else SKY for error in errors])
    right.axvline(0, color=BLACK, linewidth=1.2)
    reach = 1.45 * max(1.0, *map(abs, errors))
    right.set_xlim(-reach, reach)
    for place, error in zip(places, errors, strict=True):
        right.text(
            error, place, f" {error:+.1f} ", va="center", ha="left" if error >= 0 else "right", fontsize=SMALL_SIZE
        )
    _label(left, "Peak of the fullest GPU", f"GPU memory ({unit.name})", "")
    _label(right, "Error of the prediction", "percent of what was measured", "")
    for axes in (left, right):
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        axes.grid(axis="y", visible=False)
    right.tick_params(axis="y", length=0, labelleft=False)
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=SMALL_SIZE, frameon=False
    )
    return fig


def _metric_name(key: str) -> str:
    """ "rouge-l", "rouge_l" and "rougeL" are all ROUGE-L."""
    return re.sub(r"(ROUGE|BLEU)[-_]?", r"\1-", key.upper())


def _figure(title: str, width: float, height: float) -> CourseFigure:
    fig = CourseFigure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    fig.suptitle(title, fontsize=TITLE_SIZE, fontweight="bold")
    return fig


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=TEXT_SIZE)
    axes.set_xlabel(x, fontsize=TEXT_SIZE)
    axes.set_ylabel(y, fontsize=TEXT_SIZE)
    axes.tick_params(labelsize=SMALL_SIZE)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(axes: Axes) -> None:
    """A legend under the axis label, in as many columns as fit: it never covers a curve."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    figure_width = axes.figure.get_figwidth() / axes.get_gridspec().ncols
    columns = max(1, int(figure_width * 72 / (SMALL_SIZE * (4 + 0.55 * max(map(len, labels))))))
    axes.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=min(columns, len(labels)),
        fontsize=SMALL_SIZE,
        frameon=False,
    )


def collective(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], title: str) -> CourseFigure:
    """What a collective moved: the numbers that each rank held before and after, one row per rank.

    A number has the colour of the rank that held it before, wherever it goes; one that no rank held before was
    computed on the way and is grey. Ranks may hold different amounts, or nothing.
    """
    colours = {value: RANK_COLOURS[rank % len(RANK_COLOURS)] for rank, row in enumerate(before) for value in row}
    width = max(len(row) for rows in (before, after) for row in rows)
    fig = _figure(title, width=min(13.0, 3.4 + 1.5 * width), height=1.1 + 0.62 * len(before))
    for axes, rows, when in zip(fig.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        for rank, row in enumerate(rows):
            for place, value in enumerate(row):
                colour = colours.get(value, GREY)
                axes.barh(rank, 0.92, left=place - 0.46, height=0.8, color=colour)
                axes.text(place, rank, f"{value:g}", ha="center", va="center", color="white", fontsize=TEXT_SIZE)
        axes.set_title(when, fontsize=TEXT_SIZE)
        axes.set_xlim(-0.6, width - 0.4)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xticks([])
        axes.set_yticks(range(len(rows)), [f"rank {rank}" for rank in range(len(rows))], fontsize=SMALL_SIZE)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return fig


def transfer_times(seconds: Mapping[str, Mapping[int, float]], title: str) -> CourseFigure:
    """Seconds that collectives take over the bytes that they move, both axes logarithmic: ``{name: {bytes: s}}``."""
    fig = _figure(title, width=9, height=4.8)
    axes = fig.subplots()
    for (name, curve), colour, marker in zip(seconds.items(), RANK_COLOURS, "os^Dv<>X", strict=False):
        sizes = sorted(curve)
        milliseconds = [1e3 * curve[size] for size in sizes]
        axes.plot(sizes, milliseconds, f"{marker}-", color=colour, linewidth=1.8, markersize=7, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({size for curve in seconds.values() for size in curve})
    labels = [f"{unit_for([size]).amount(size).removesuffix('.00')} {unit_for([size]).name}" for size in ticks]
    axes.set_xticks(ticks, labels, fontsize=SMALL_SIZE)
    axes.xaxis.minorticks_off()
    _label(axes, "", "size of the tensor on each rank", "milliseconds")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.legend(fontsize=SMALL_SIZE, frameon=False)
    return fig


def memory_steps(steps: Mapping[str, Mapping[str, int]], title: str, axis: str) -> CourseFigure:
    """What a process holds after each of its first steps: ``{step: {item: bytes}}``, one stacked bar per step.

    What each step added stands at its bar's end, to the digit that a reader can use; items of which no step holds
    anything are left out. ``axis`` names what was measured. Raises :class:`UserError` where there is no step.
    """
    if not steps:
        raise UserError("there are no steps to draw")
    unit = unit_for(sum(parts.values()) for parts in steps.values())
    fig = _figure(title, width=13, height=1.7 + 0.5 * len(steps))
    axes = fig.subplots()
    items = [
        item
        for item in dict.fromkeys(item for parts in steps.values() for item in parts)
        if any(parts.get(item) for parts in steps.values())
    ]
    left = [0.0] * len(steps)
    for item in items:
        widths = [parts.get(item, 0) / unit.size for parts in steps.values()]
        axes.barh(list(steps), widths, left=left, height=0.66, color=CATEGORY_COLOURS.get(item, GREY), label=item)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    digits = 2 if max(left) < 20 else 1 if max(left) < 200 else 0
    for place, (total, earlier) in enumerate(zip(left, [0.0, *left], strict=False)):
        text = f" {total:,.{digits}f}  ({total - earlier:+,.{digits}f})"
        axes.text(total, place, text, va="center", fontsize=SMALL_SIZE)
    kinds = len(items) if len(items) > 1 else 0
    _finish_bars(fig, axes, f"{axis} ({unit.name}; in brackets what the step added)", 1.18 * max(left), kinds)
    return fig
