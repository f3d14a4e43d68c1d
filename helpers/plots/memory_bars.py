"""Draw memory as stacked bars: per configuration, per source, per step."""

from collections.abc import Collection, Mapping
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.memory.units import Unit, unit_for
from helpers.plots.style import (
    CATEGORY_COLOURS,
    CATEGORY_HATCHES,
    GREY,
    SMALL_SIZE,
    TEXT_SIZE,
    CourseFigure,
    grid_along_x,
    label_axes,
    legend_outside,
    new_figure,
)


def memory_bars(bars: Mapping[str, Mapping[str, float]], title: str, unit: str = "GiB") -> CourseFigure:
    """Draw one stacked bar per configuration, with its sum at the end.

    The legend leaves out parts that are too thin to see: below 1 % of the longest bar.

    Args:
        bars: ``{configuration: {category: amount}}``. Categories keep the order of the first bar. They have the colours
            of ``CATEGORY_COLOURS``, or shades of grey if they are not in it.
        title: The figure's title.
        unit: Of the amounts.

    Returns:
        The figure.

    Raises:
        UserError: ``bars`` is empty, or a category is negative.
    """
    if not bars:
        raise UserError("memory_bars: there are no bars to draw")
    categories = list(dict.fromkeys(category for parts in bars.values() for category in parts))
    # Many bars get thinner: 20 of them still fit on a slide.
    fig = new_figure(title, width=13, height=1.9 + min(0.75 * len(bars), 2.2 + 0.2 * len(bars)))
    axes = fig.subplots()
    axes.margins(y=0.02)  # of the axis; more bars would get more empty space
    greys = cycle(("#8C8C8C", "#BDBDBD", "#DADADA"))
    left = dict.fromkeys(bars, 0.0)
    visible = _visible(bars.values())
    for category in categories:
        widths = [parts.get(category, 0.0) for parts in bars.values()]
        if min(widths) < 0:
            raise UserError(f"memory_bars: {category!r} is {min(widths):.2f} {unit}; memory cannot be negative")
        look = _look(category) if category in CATEGORY_COLOURS else {"facecolor": next(greys)}
        label = category if category in visible else None
        axes.barh(list(bars), widths, left=list(left.values()), height=0.62, label=label, **look)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    digits = _digits(max(left.values()))
    for row, total in enumerate(left.values()):
        axes.text(total, row, f" {total:,.{digits}f}", va="center", fontsize=TEXT_SIZE)
    _finish_bars(fig, axes, f"GPU memory ({unit})", 1.12 * max(left.values()), legend=True)
    return fig


def _visible(bars: Collection[Mapping[str, float]]) -> set[str]:
    """Return the categories that are wide enough in some bar to be seen."""
    longest = max(sum(parts.values()) for parts in bars)
    return {category for parts in bars for category, size in parts.items() if size > 0 and size >= longest / 100}


def memory_sources(ranks: Mapping[str, Mapping[str, Mapping[str, int] | None]], title: str) -> CourseFigure:
    """Draw the memory of one configuration as each source reports it: stacked bars, one panel per rank.

    All panels share one axis in GiB, MiB or KiB, and the colours of ``CATEGORY_COLOURS``. The legend leaves out parts
    that are too thin to see: below 1 % of the tallest bar.

    Args:
        ranks: ``{"rank 0": {"predicted": {category: bytes}, "counted": ..., "NVML": None}}``, as
            :attr:`helpers.memory.report.RankReport.bars` returns them. None is drawn as "not available".
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``ranks`` is empty, or a category is negative or has no colour.
    """
    if not ranks:
        raise UserError("memory_sources: there is no rank to draw")
    bars = [parts or {} for sources in ranks.values() for parts in sources.values()]
    for category, size in (pair for parts in bars for pair in parts.items()):
        if category not in CATEGORY_COLOURS:
            raise UserError(f"memory_sources: {category!r} has no colour; use some of {', '.join(CATEGORY_COLOURS)}")
        if size < 0:
            raise UserError(f"memory_sources: {category!r} is {size} bytes; memory cannot be negative")
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
    visible = _visible(bars)
    patches = [Patch(label=name, **_look(name)) for name in CATEGORY_COLOURS if name in visible]
    legend_outside(fig, patches)
    return fig


def _look(category: str) -> dict[str, Any]:
    hatch = CATEGORY_HATCHES.get(category)
    edge = GREY if hatch else "white"  # also the hatch's colour
    return {"facecolor": CATEGORY_COLOURS[category], "edgecolor": edge, "hatch": hatch, "linewidth": 0.6}


def _draw_sources(axes: Axes, sources: Mapping[str, Mapping[str, int] | None], unit: Unit) -> None:
    for column, parts in enumerate(sources.values()):
        bottom = 0.0
        for category in CATEGORY_COLOURS:
            height = (parts or {}).get(category, 0) / unit.size
            if height:
                axes.bar(column, height, 0.72, bottom, **_look(category))
                bottom += height
        label = unit.amount(sum(parts.values())) if parts is not None else "not\navailable"
        axes.text(column, bottom, label, ha="center", va="bottom", fontsize=SMALL_SIZE)
    names = [name.replace(", ", ",\n") if len(sources) > 3 else name for name in sources]  # or they would touch
    axes.set_xticks(range(len(sources)), names)
    axes.set_xlim(-0.6, len(sources) - 0.4)


def predicted_and_measured(
    configurations: Mapping[str, Mapping[str, Mapping[str, int] | None]], title: str
) -> CourseFigure:
    """Draw two stacked bars per configuration: the prediction, and the last source that has a number.

    The legend leaves out parts that are too thin to see: below 1 % of the tallest bar.

    Args:
        configurations: ``{configuration: {"predicted": {category: bytes}, "counted": ..., "NVML": None}}``, as
            :attr:`helpers.memory.report.RankReport.bars` returns them. A prediction of None reads "not available".
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``configurations`` is empty.
    """
    if not configurations:
        raise UserError("predicted_and_measured: there is no configuration to draw")
    pairs = [_pair(sources) for sources in configurations.values()]
    bars = [parts for pair in pairs for _, parts in pair]
    tallest = max(sum(parts.values()) for parts in bars)
    unit = unit_for(sum(parts.values()) for parts in bars)
    fig = new_figure(title, width=13, height=5.4)
    axes = fig.subplots()
    places = [group + side for group in range(len(pairs)) for side in (-0.21, 0.21)]
    for place, parts in zip(places, bars, strict=True):
        bottom = 0.0
        for category in (name for name in CATEGORY_COLOURS if parts.get(name)):
            axes.bar(place, parts[category] / unit.size, 0.38, bottom, **_look(category))
            bottom += parts[category] / unit.size
        text = unit.amount(sum(parts.values())) if parts else "not\navailable"
        axes.text(place, bottom, text, ha="center", va="bottom", fontsize=SMALL_SIZE)
    for group, name in enumerate(configurations):
        axes.annotate(
            name, (group, 0), (0, -26), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
            va="top", fontsize=TEXT_SIZE, fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(-0.6, len(pairs) - 0.4)
    axes.set_ylim(0, 1.12 * tallest / unit.size)
    label_axes(axes, "", "", f"memory ({unit.name})")
    axes.set_xticks(places, [source for pair in pairs for source, _ in pair], fontsize=SMALL_SIZE)
    axes.tick_params(axis="x", length=0)
    visible = _visible(bars)
    patches = [Patch(label=name, **_look(name)) for name in CATEGORY_COLOURS if name in visible]
    legend_outside(fig, patches)
    return fig


def _pair(sources: Mapping[str, Mapping[str, int] | None]) -> list[tuple[str, Mapping[str, int]]]:
    """Return the prediction, and the last source that has a number."""
    measured = [(source, parts) for source, parts in sources.items() if source != "predicted" and parts is not None]
    return [("predicted", sources["predicted"] or {}), measured[-1]]


def memory_steps(
    steps: Mapping[str, Mapping[str, int]], title: str, source: str, bracket: str = "what the step added"
) -> CourseFigure:
    """Draw what a process holds after each of its first steps: one stacked bar per step.

    The text at the end of a bar is its sum, and in brackets the difference from the bar above. Categories that are
    always 0 are left out.

    Args:
        steps: ``{step: {category: bytes}}``.
        title: The figure's title.
        source: What the bytes are and who counted them, for the axis.
        bracket: What the numbers in brackets mean, for the axis.

    Returns:
        The figure.

    Raises:
        UserError: ``steps`` is empty.
    """
    if not steps:
        raise UserError("memory_steps: there are no steps to draw")
    unit = unit_for(sum(parts.values()) for parts in steps.values())
    fig = new_figure(title, width=13, height=1.7 + 0.5 * len(steps))
    axes = fig.subplots()
    categories = [
        category
        for category in dict.fromkeys(category for parts in steps.values() for category in parts)
        if any(parts.get(category) for parts in steps.values())
    ]
    left = [0.0] * len(steps)
    for category in categories:
        widths = [parts.get(category, 0) / unit.size for parts in steps.values()]
        look = _look(category) if category in CATEGORY_COLOURS else {"facecolor": GREY}
        axes.barh(list(steps), widths, left=left, height=0.66, label=category, **look)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    digits = _digits(max(left))
    for row, (total, previous) in enumerate(zip(left, [0.0, *left], strict=False)):
        text = f" {total:,.{digits}f}  ({total - previous:+,.{digits}f})"
        axes.text(total, row, text, va="center", fontsize=SMALL_SIZE)
    x_label = f"{source} ({unit.name}; in brackets {bracket})"
    _finish_bars(fig, axes, x_label, 1.18 * max(left), legend=len(categories) > 1)
    return fig


def _digits(largest: float) -> int:
    """Choose as many decimals as a reader can use."""
    return 2 if largest < 20 else 1 if largest < 200 else 0


def _finish_bars(fig: CourseFigure, axes: Axes, x_label: str, x_end: float, legend: bool) -> None:
    """Finish horizontal bars: the first one on top, a vertical grid, and a legend on request."""
    axes.invert_yaxis()
    axes.set_xlim(0, x_end)
    label_axes(axes, "", x_label, "")
    grid_along_x(axes)
    axes.tick_params(axis="y", labelsize=TEXT_SIZE, length=0)
    if legend:
        legend_outside(fig)
