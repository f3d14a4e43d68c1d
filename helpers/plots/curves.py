"""Measured points beside what a formula says."""

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from helpers.errors import UserError
from helpers.memory.units import unit_for
from helpers.plots.style import RANK_COLOURS, CourseFigure, label_axes, legend_below, new_figure

Curve = Mapping[float, float]


def beside_formula(
    measured: Mapping[str, Curve], formula: Mapping[str, Curve], title: str, x: str, y: str
) -> CourseFigure:
    """``measured`` as points and ``formula`` as lines, each ``{name: {x: y}}``; a name in both has one colour.

    ``x`` and ``y`` label the axes, units included; y begins at 0. Raises :class:`UserError` where nothing was measured.
    """
    if not any(measured.values()):
        raise UserError("there are no measured points to draw")
    fig = new_figure(title, width=9, height=4.8)
    axes = fig.subplots()
    colours = dict(zip(dict.fromkeys([*measured, *formula]), RANK_COLOURS, strict=False))
    for name, curve in formula.items():
        places = sorted(curve)
        axes.plot(places, [curve[place] for place in places], "--", color=colours[name], label=f"{name}, formula")
    for (name, curve), marker in zip(measured.items(), "os^Dv<>X", strict=False):
        places = sorted(curve)
        values = [curve[place] for place in places]
        axes.plot(places, values, marker, color=colours[name], markersize=9, label=f"{name}, measured")
    axes.set_ylim(bottom=0)
    if all(float(place).is_integer() for curve in measured.values() for place in curve):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "", x, y)
    legend_below(axes)
    return fig


def bytes_over_moments(curves: Mapping[str, Sequence[int]], title: str, x: str) -> CourseFigure:
    """Bytes that were held at successive moments of a step, ``{name: [bytes, ...]}``, as lines with steps.

    Curves may have different numbers of moments; each is stretched over the axis, from the step's begin to its end.
    Raises :class:`UserError` where there is nothing to draw.
    """
    if not any(curves.values()):
        raise UserError("there are no moments to draw")
    unit = unit_for(max(curve) for curve in curves.values() if curve)
    fig = new_figure(title, width=11, height=4.8)
    axes = fig.subplots()
    for (name, curve), colour in zip(curves.items(), RANK_COLOURS, strict=False):
        places = [place / max(1, len(curve) - 1) for place in range(len(curve))]
        axes.plot(
            places, [size / unit.size for size in curve], color=colour, linewidth=2, drawstyle="steps-post", label=name
        )
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    label_axes(axes, "", x, unit.name)
    legend_below(axes)
    return fig
