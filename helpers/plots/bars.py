"""Bars that stand for ranks, or for ways of doing the same, with what a formula says or a run measured."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    BLUE,
    RANK_COLOURS,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    grid_along_x,
    ink_on,
    label_axes,
    new_figure,
)


def bars_by_rank(
    measured: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]], title: str, y: str
) -> CourseFigure:
    """For each rank one bar per entry of ``measured``, ``{name: [rank 0's, rank 1's, ...]}``; ``y`` labels the axis.

    Where ``expected`` has the name as well, a black line across the bar says what a formula gave. Raises
    :class:`UserError` where there is no bar, or where the entries are of different numbers of ranks.
    """
    sizes = {len(values) for values in (*measured.values(), *expected.values())}
    if len(sizes) != 1 or sizes == {0}:
        raise UserError(f"bars for {sorted(sizes)} ranks; give every entry one value for each rank")
    (ranks,) = sizes
    fig = new_figure(title, width=10, height=5)
    axes = fig.subplots()
    width, handles = 0.84 / len(measured), []
    for place, ((name, values), colour) in enumerate(zip(measured.items(), RANK_COLOURS, strict=False)):
        centres = [rank + (place - (len(measured) - 1) / 2) * width for rank in range(ranks)]
        handles.append(axes.bar(centres, values, 0.94 * width, color=colour, label=name))
        for centre, value in zip(centres, expected.get(name, ()), strict=False):
            axes.plot([centre - width / 2, centre + width / 2], [value, value], color=BLACK, linewidth=2.4)
    if expected:
        handles += axes.plot([], [], color=BLACK, linewidth=2.4, label="formula")
    label_axes(axes, "", "", y)
    axes.set_xticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=TEXT_SIZE)
    axes.tick_params(axis="x", length=0)
    fig.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=SMALL_SIZE, frameon=False)
    return fig


def stacked_seconds(
    predicted: Mapping[str, Mapping[str, float]], measured: Mapping[str, float], title: str
) -> CourseFigure:
    """Predicted seconds by cause as stacked bars, ``{bar: {cause: seconds}}``, a diamond where one was measured.

    Raises :class:`UserError` where there is no bar.
    """
    if not predicted:
        raise UserError("there is nothing to draw: give at least one bar")
    fig = new_figure(title, width=13, height=1.9 + 0.5 * len(predicted))
    axes = fig.subplots()
    left = [0.0] * len(predicted)
    causes = dict.fromkeys(cause for parts in predicted.values() for cause in parts)
    for cause, colour in zip(causes, cycle(RANK_COLOURS), strict=False):
        widths = [parts.get(cause, 0.0) for parts in predicted.values()]
        axes.barh(list(predicted), widths, left=left, height=0.66, color=colour, label=cause)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    if measured:
        places = [place for place, name in enumerate(predicted) if name in measured]
        values = [measured[name] for name in predicted if name in measured]
        axes.plot(values, places, "D", color=BLACK, markersize=9, markeredgecolor="white", label="measured")
    axes.set_ylim(len(predicted) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * max(*left, *measured.values(), 0.0))
    label_axes(axes, "", "seconds a step", "")
    grid_along_x(axes)
    fig.legend(loc="outside lower center", ncols=6, fontsize=SMALL_SIZE, frameon=False)
    return fig


def rates_and_memory(
    rates: Mapping[str, tuple[float, float, float]], memory: Mapping[str, float], marks: Mapping[str, float], title: str
) -> CourseFigure:
    """Ways of doing the same, a row each: tokens per second and GPU on the left, GiB of that GPU on the right.

    ``rates`` are ``(median, slowest, fastest)``; the last two are drawn as a line. ``marks`` are sizes in GiB, drawn
    across all rows. Raises :class:`UserError` where the two are not of the same rows, or there are none.
    """
    if not rates or list(rates) != list(memory):
        raise UserError(f"rates of {list(rates)} and memory of {list(memory)}; give both for the same rows")
    fig = new_figure(title, width=13, height=2.2 + 0.46 * len(rates))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(rates))
    medians = [median for median, _, _ in rates.values()]
    left.barh(places, medians, height=0.66, color=BLUE)
    for place, (median, slowest, fastest) in enumerate(rates.values()):
        left.plot([slowest, fastest], [place, place], color=BLACK, linewidth=2)
        left.text(fastest, place, f"  {median:,.0f}", va="center", fontsize=SMALL_SIZE)
    right.barh(places, list(memory.values()), height=0.66, color=VERMILION)
    for place, used in enumerate(memory.values()):
        # At the bar's foot, where no mark is in the way.
        right.text(0, place, f"  {used:.1f}", va="center", fontsize=SMALL_SIZE, color=ink_on(VERMILION))
    for (name, size), style in zip(marks.items(), cycle(("--", ":")), strict=False):
        right.axvline(size, color=BLACK, linewidth=1.6, linestyle=style, label=name)
    left.set_xlim(0, 1.2 * max(fastest for _, _, fastest in rates.values()))
    right.set_xlim(0, 1.2 * max(*memory.values(), *marks.values()))
    left.set_ylim(len(rates) - 0.4, -0.6)
    label_axes(left, "", "tokens/s per GPU (line: slowest to fastest)", "")
    label_axes(right, "", "NVML peak, GiB", "")
    left.set_yticks(places, list(rates), fontsize=SMALL_SIZE)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        grid_along_x(axes)
    fig.legend(loc="outside lower right", ncols=len(marks), fontsize=SMALL_SIZE, frameon=False)
    return fig
