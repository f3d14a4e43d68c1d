"""Draw bars per rank or per alternative, compared with a formula or a measurement."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.artist import Artist
from matplotlib.container import BarContainer

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    BLUE,
    RANK_COLOURS,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    colours_for,
    grid_along_x,
    ink_on,
    label_axes,
    legend_outside,
    new_figure,
)


def bars_by_rank(
    measured: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]], title: str, y_label: str
) -> CourseFigure:
    """Draw one bar per rank and measurement; a black line across a bar is the value of a formula.

    Args:
        measured: ``{name: [value of rank 0, of rank 1, ...]}``.
        expected: Values of the formula in the same form, for some or all of the names.
        title: The figure's title.
        y_label: Label of the axis, with its unit.

    Returns:
        The figure.

    Raises:
        UserError: ``measured`` is empty, or the entries differ in their number of ranks.
    """
    sizes = {len(values) for values in (*measured.values(), *expected.values())}
    if len(sizes) != 1 or sizes == {0}:
        raise UserError(f"bars_by_rank: entries for {sorted(sizes)} ranks; give every entry one value per rank")
    (world_size,) = sizes
    fig = new_figure(title, width=10, height=5)
    axes = fig.subplots()
    width = 0.84 / len(measured)
    handles: list[Artist | BarContainer] = []
    colours = colours_for(measured)
    for number, (name, values) in enumerate(measured.items()):
        centres = [rank + (number - (len(measured) - 1) / 2) * width for rank in range(world_size)]
        handles.append(axes.bar(centres, values, 0.94 * width, color=colours[name], label=name))
        for centre, value in zip(centres, expected.get(name, ()), strict=False):
            axes.plot([centre - width / 2, centre + width / 2], [value, value], color=BLACK, linewidth=2.4)
    if expected:
        handles += axes.plot([], [], color=BLACK, linewidth=2.4, label="formula")
    label_axes(axes, "", "", y_label)
    axes.set_xticks(range(world_size), [f"rank {rank}" for rank in range(world_size)], fontsize=TEXT_SIZE)
    axes.tick_params(axis="x", length=0)
    legend_outside(fig, handles)
    return fig


def stacked_seconds(
    predicted: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, float],
    title: str,
    x_label: str = "seconds per step",
) -> CourseFigure:
    """Draw predicted seconds by cause as stacked bars, with a diamond for each measurement.

    Args:
        predicted: ``{bar: {cause: seconds}}``.
        measured: ``{bar: seconds}``, for some or all of the bars.
        title: The figure's title.
        x_label: Label of the axis: what the seconds are for.

    Returns:
        The figure.

    Raises:
        UserError: ``predicted`` is empty.
    """
    if not predicted:
        raise UserError("stacked_seconds: there is nothing to draw; give at least one bar")
    fig = new_figure(title, width=13, height=1.9 + 0.5 * len(predicted))
    axes = fig.subplots()
    left = [0.0] * len(predicted)
    causes = dict.fromkeys(cause for parts in predicted.values() for cause in parts)
    for cause, colour in zip(causes, cycle(RANK_COLOURS), strict=False):
        widths = [parts.get(cause, 0.0) for parts in predicted.values()]
        axes.barh(list(predicted), widths, left=left, height=0.66, color=colour, label=cause)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (name, total) in enumerate(zip(predicted, left, strict=True)):
        text = f"{total:.3g}" + (f", measured {measured[name]:.3g}" if name in measured else "")
        axes.annotate(
            text, (max(total, measured.get(name, 0.0)), row), (9, 0), textcoords="offset points", va="center",
            fontsize=SMALL_SIZE,
        )  # fmt: skip
    if measured:
        rows = [row for row, name in enumerate(predicted) if name in measured]
        values = [measured[name] for name in predicted if name in measured]
        axes.plot(values, rows, "D", color=BLACK, markersize=9, markeredgecolor="white", label="measured")
    axes.set_ylim(len(predicted) - 0.4, -0.6)
    axes.set_xlim(0, (1.25 if measured else 1.1) * max(*left, *measured.values(), 0.0))
    label_axes(axes, "", x_label, "")
    grid_along_x(axes)
    legend_outside(fig)
    return fig


def rates_and_memory(
    rates: Mapping[str, tuple[float, float, float]],
    memory: Mapping[str, float],
    limits: Mapping[str, float],
    title: str,
) -> CourseFigure:
    """Draw alternatives as rows: tokens per second and GPU on the left, GPU memory on the right.

    Args:
        rates: Tokens per second and GPU, ``{alternative: (median, slowest, fastest)}``; a line spans the last two.
        memory: Peak of the GPU, ``{alternative: GiB}``.
        limits: ``{name: GiB}``, drawn as vertical lines across all rows.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``rates`` is empty, or rates and memory are not for the same ones.
    """
    if not rates or list(rates) != list(memory):
        raise UserError(
            f"rates_and_memory: rates of {list(rates)} but memory of {list(memory)}; give both for the same"
        )
    fig = new_figure(title, width=13, height=2.2 + 0.46 * len(rates))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = range(len(rates))
    medians = [median for median, _, _ in rates.values()]
    left.barh(rows, medians, height=0.66, color=BLUE)
    for row, (median, slowest, fastest) in enumerate(rates.values()):
        left.plot([slowest, fastest], [row, row], color=BLACK, linewidth=2)
        left.text(fastest, row, f"  {median:,.0f}", va="center", fontsize=SMALL_SIZE)
    right.barh(rows, list(memory.values()), height=0.66, color=VERMILION)
    for row, used in enumerate(memory.values()):
        # At the start of the bar, where no limit crosses the text.
        right.text(0, row, f"  {used:.1f}", va="center", fontsize=SMALL_SIZE, color=ink_on(VERMILION))
    for (name, size), style in zip(limits.items(), cycle(("--", ":")), strict=False):
        right.axvline(size, color=BLACK, linewidth=1.6, linestyle=style, label=name)
    left.set_xlim(0, 1.2 * max(fastest for _, _, fastest in rates.values()))
    right.set_xlim(0, 1.2 * max(*memory.values(), *limits.values()))
    left.set_ylim(len(rates) - 0.4, -0.6)
    label_axes(left, "", "tokens/s per GPU (line: slowest to fastest)", "")
    label_axes(right, "", "NVML peak, GiB", "")
    left.set_yticks(rows, list(rates), fontsize=SMALL_SIZE)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        grid_along_x(axes)
    fig.legend(loc="outside lower right", ncols=len(limits), fontsize=SMALL_SIZE, frameon=False)
    return fig
