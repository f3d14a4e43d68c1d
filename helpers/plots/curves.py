"""Draw measured points against a formula, and bytes over the course of a step."""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from helpers.errors import UserError
from helpers.memory.units import unit_for
from helpers.plots.style import BLACK, TEXT_SIZE, CourseFigure, colours_for, label_axes, legend_below, new_figure

Curve = Mapping[float, float]
UNIT_END = 0.85  # where a unit ends, as a share of its place along the axis


def measured_against_formula(
    measured: Mapping[str, Curve],
    formula: Mapping[str, Curve],
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
) -> CourseFigure:
    """Draw measured points and the lines of formulas; a name has the same colour in both, a technique in all figures.

    Args:
        measured: ``{name: {x: y}}``.
        formula: ``{name: {x: y}}``, for some, all or none of the names.
        title: The figure's title.
        x_label: Label of the axis, with its unit.
        y_label: Label of the axis, with its unit; it starts at 0.
        log: Draw both axes logarithmic (to base 2 along x).

    Returns:
        The figure.

    Raises:
        UserError: ``measured`` is empty.
    """
    if not any(measured.values()):
        raise UserError("measured_against_formula: there are no measured points to draw")
    fig = new_figure(title, width=9, height=4.8)
    axes = fig.subplots()
    colours = colours_for([*measured, *formula])
    markers = dict(zip(measured, cycle("os^Dv<>X")))
    both = measured.keys() & formula.keys()
    for name, curve in formula.items():
        xs = sorted(curve)
        label = f"{name}, formula"
        axes.plot(xs, [curve[x] for x in xs], "--", color=colours[name], label=f"_{label}" if name in both else label)
    for name, curve in measured.items():
        xs = sorted(curve)
        label = f"{name}, measured"
        axes.plot(
            xs, [curve[x] for x in xs], markers[name], color=colours[name], markersize=9,
            clip_on=False,  # the highest one is whole
            label=f"_{label}" if name in both else label,
        )  # fmt: skip
    for name in (name for name in measured if name in both):  # one entry of the legend for line and points
        axes.plot(
            [], [], "--", marker=markers[name], color=colours[name], markersize=9, label=f"{name}: formula, measured"
        )
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    label_axes(axes, "", x_label, y_label)
    xs = sorted({x for curve in measured.values() for x in curve})
    if not log and all(float(x).is_integer() for x in xs):
        _set_whole_ticks(axes, xs)
    legend_below(axes)
    return fig


def _set_whole_ticks(axes: Axes, measured: Sequence[float]) -> None:
    """Put the ticks where something was measured if these places span the axis and are far enough apart."""
    first, last = axes.get_xlim()
    gap = min((after - before for before, after in pairwise(measured)), default=0.0)
    apart = gap >= 0.013 * (1 + len(f"{measured[-1]:,.0f}")) * (last - first)  # a digit takes 1.3 % of the axis
    if apart and measured[-1] - measured[0] >= 0.8 * (last - first):
        axes.set_xticks(measured)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def bytes_over_step(
    curves: Mapping[str, Sequence[int]], passes: Mapping[str, Sequence[str]], title: str
) -> CourseFigure:
    """Draw how many bytes were held over the course of a step, as lines with steps.

    Args:
        curves: ``{name: [bytes, bytes, ...]}``: for each unit of each pass one sample when it begins and one when it
            ends.
        passes: ``{pass: units}``, both in the order in which they run; a line parts the passes.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: No curve is given, or one does not have two samples per unit.
    """
    units = [unit for names in passes.values() for unit in names]
    sizes = {name: len(curve) for name, curve in curves.items()}
    if set(sizes.values()) != {2 * len(units)}:
        raise UserError(f"bytes_over_step: {sizes} samples; give curves with 2 for each of {len(units)} units")
    unit = unit_for(max(curve) for curve in curves.values())
    fig = new_figure(title, width=13, height=4.8)
    axes = fig.subplots()
    colours = colours_for(curves)
    xs = [index + share for index in range(len(units)) for share in (0, UNIT_END)]
    for name, curve in curves.items():
        ys = [size / unit.size for size in curve]
        axes.plot(xs, ys, color=colours[name], linewidth=2, drawstyle="steps-post", label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, len(units))
    axes.set_xticks([index + 0.5 for index in range(len(units))], units)
    axes.tick_params(axis="x", length=0)
    label_axes(axes, "", "unit that computes", unit.name)
    top, start = axes.get_ylim()[1], 0
    for name, names in passes.items():
        axes.axvline(start, color=BLACK, linewidth=1.2)
        axes.text(start + 0.15, 1.02 * top, name, fontsize=TEXT_SIZE, va="bottom")
        start += len(names)
    legend_below(axes)
    return fig


def scaling(
    rates: Mapping[str, Mapping[int, float]], memory: Mapping[str, Mapping[int, float]], title: str
) -> CourseFigure:
    """Draw speed and memory per GPU over the number of GPUs; dashed lines keep the speed of the fewest GPUs.

    Args:
        rates: Tokens per second and GPU, ``{way: {GPUs: rate}}``.
        memory: Peak of the fullest GPU, ``{way: {GPUs: GiB}}``, of the same ways.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``rates`` is empty, or rates and memory are not for the same ways.
    """
    if not rates or list(rates) != list(memory):
        raise UserError(f"scaling: rates of {list(rates)} but memory of {list(memory)}; give both for the same")
    fig = new_figure(title, width=13, height=5)
    left, right = fig.subplots(1, 2)
    counts = sorted({count for curve in rates.values() for count in curve})
    for (name, colour), marker in zip(colours_for(rates).items(), cycle("os^Dv<>X"), strict=False):
        fewest = min(rates[name])
        if len(rates[name]) > 1:
            left.plot([fewest, counts[-1]], [rates[name][fewest]] * 2, "--", color=colour, linewidth=1.2)
        for axes, curve in ((left, rates[name]), (right, memory[name])):
            xs = sorted(curve)
            axes.plot(xs, [curve[x] for x in xs], marker=marker, color=colour, markersize=9, label=name)
    left.plot([], [], "--", color=BLACK, linewidth=1.2, label="ideal: no time lost to more GPUs")
    label_axes(left, "Speed", "GPUs", "tokens/s per GPU")
    label_axes(right, "Memory of the fullest GPU", "GPUs", "NVML peak, GiB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        legend_below(axes)
    return fig
