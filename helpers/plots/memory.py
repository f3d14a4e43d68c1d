"""Figures of memory: predicted, counted and measured."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from helpers.errors import UserError
from helpers.memory.phases import Phase, across_ranks
from helpers.memory.timeline import GpuCurve, Timeline
from helpers.memory.units import GIB, Unit, unit_for
from helpers.plots.style import (
    BLACK,
    BLUE,
    CATEGORY_COLOURS,
    GREEN,
    GREY,
    RANK_COLOURS,
    SKY,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    grid_along_x,
    label_axes,
    new_figure,
)

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
    fig = new_figure(title, width=13, height=1.2 + sum(band_heights + row_heights) + 0.2 * len(row_heights))
    panels = fig.subplots(
        len(band_heights + row_heights), 1, sharex=True, squeeze=False, height_ratios=band_heights + row_heights
    )[:, 0]
    if names:
        _draw_phase_band(panels[0], spans, names, tints)
    rows = panels[len(band_heights) :]
    for axes in rows:
        label_axes(axes, "", "", "GiB")
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
    fig = new_figure(title, width=13, height=1.9 + 0.75 * len(bars))
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
    label_axes(axes, "", axis, "")
    grid_along_x(axes)
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
    fig = new_figure(title, width=8 if len(ranks) == 1 else 13, height=1.9 + 3.9 * rows)
    panels = fig.subplots(rows, 2 if len(ranks) > 1 else 1, squeeze=False, sharey=True).flatten()
    for axes, (name, sources) in zip(panels, ranks.items(), strict=False):
        _draw_sources(axes, sources, unit)
        label_axes(axes, name, "", f"memory ({unit.name})")
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


def model_sizes(
    models: Mapping[str, int], cards: Mapping[str, int], title: str, holders: str = "memory of one card"
) -> CourseFigure:
    """What models need beside what cards hold: ``{model: parameters}`` and ``{card: bytes}``, on a logarithmic axis.

    Each model is a line from its weights in 16 bit (2 bytes a parameter) to its model states in training (16 bytes).
    ``holders`` is the legend's name for the vertical lines, where they are no cards.
    """
    fig = new_figure(title, width=13, height=2.5 + 0.5 * len(models))
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
    label_axes(axes, "", "GiB, logarithmic", "")
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
            (VERMILION, "", "--", holders),
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
    fig = new_figure(title, width=13, height=2.0 + 0.36 * len(places))
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
    label_axes(left, "Peak of the fullest GPU", f"GPU memory ({unit.name})", "")
    label_axes(right, "Error of the prediction", "percent of what was measured", "")
    for axes in (left, right):
        grid_along_x(axes)
    right.tick_params(axis="y", length=0, labelleft=False)
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=SMALL_SIZE, frameon=False
    )
    return fig


def memory_steps(steps: Mapping[str, Mapping[str, int]], title: str, axis: str) -> CourseFigure:
    """What a process holds after each of its first steps: ``{step: {item: bytes}}``, one stacked bar per step.

    What each step added stands at its bar's end, to the digit that a reader can use; items of which no step holds
    anything are left out. ``axis`` names what was measured. Raises :class:`UserError` where there is no step.
    """
    if not steps:
        raise UserError("there are no steps to draw")
    unit = unit_for(sum(parts.values()) for parts in steps.values())
    fig = new_figure(title, width=13, height=1.7 + 0.5 * len(steps))
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
