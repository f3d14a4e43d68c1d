"""Draw a mesh of ranks, and what its layouts were predicted to cost and did cost."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    BLUE,
    GREY,
    SMALL_SIZE,
    TECHNIQUE_COLOURS,
    TEXT_SIZE,
    CourseFigure,
    grid_along_x,
    label_axes,
    legend_outside,
    new_figure,
)

# What an axis of the mesh sends, and what else a step's time is made of.
CAUSE_COLOURS = {
    "compute": BLUE,
    "tensor": TECHNIQUE_COLOURS["tensor parallel"],
    "pipeline": TECHNIQUE_COLOURS["1F1B"],
    "data": TECHNIQUE_COLOURS["data parallel"],
    "bubble": "#C4C4C4",
}
# One step along each axis of the mesh, in the plane of the figure: the cube is seen at an angle.
DIRECTIONS = {"pipeline": (3.4, 0.0), "tensor": (0.0, 1.5), "data": (1.0, 0.6)}


def mesh_cube(groups: Mapping[str, Sequence[Sequence[int]]], ranks_per_node: int, title: str) -> CourseFigure:
    """Draw a mesh of ranks in three dimensions; an edge joins neighbours in a group, in the colour of its axis.

    A box surrounds the ranks of each node.

    Args:
        groups: All groups of ranks of the axes tensor, data and pipeline, ``{axis: [ranks, ranks, ...]}``.
        ranks_per_node: Number of ranks per node.
        title: The figure's title.

    Returns:
        The figure.
    """
    places: dict[int, tuple[float, float]] = {}
    for axis, axis_groups in groups.items():
        across, up = DIRECTIONS[axis]
        for group in axis_groups:
            for coordinate, rank in enumerate(group):
                x, y = places.get(rank, (0.0, 0.0))
                places[rank] = x + coordinate * across, y + coordinate * up
    fig = new_figure(title, width=10, height=4.8)
    axes = fig.subplots()
    for axis, axis_groups in groups.items():
        for number, group in enumerate(axis_groups):
            xs, ys = zip(*(places[rank] for rank in group), strict=True)
            label = axis if number == 0 else None
            axes.plot(xs, ys, color=CAUSE_COLOURS[axis], linewidth=5, solid_capstyle="round", label=label, zorder=2)
    for rank, (x, y) in places.items():
        axes.plot([x], [y], "o", markersize=25, color="white", markeredgecolor=BLACK, zorder=3)
        axes.text(x, y, str(rank), ha="center", va="center", fontsize=TEXT_SIZE, zorder=4)
    for node, first in enumerate(range(0, len(places), ranks_per_node)):
        _draw_node(axes, [places[rank] for rank in range(first, min(first + ranks_per_node, len(places)))], node)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.02)
    legend_outside(fig, size=TEXT_SIZE)
    return fig


def _draw_node(axes: Axes, places: Sequence[tuple[float, float]], node: int) -> None:
    xs, ys = zip(*places, strict=True)
    corner, pad = (min(xs), min(ys)), 0.38
    box = FancyBboxPatch(
        (corner[0] - pad, corner[1] - pad), max(xs) - corner[0] + 2 * pad, max(ys) - corner[1] + 2 * pad,
        boxstyle="round,pad=0,rounding_size=0.2", facecolor="#F4F4F4", edgecolor=GREY, linestyle="--", zorder=1,
    )  # fmt: skip
    axes.add_patch(box)
    middle, top = (min(xs) + max(xs)) / 2, max(ys) + pad + 0.06
    axes.text(middle, top, f"node {node}", ha="center", va="bottom", fontsize=TEXT_SIZE)


def layout_times(
    predicted: Mapping[str, Mapping[str, float]], measured: Mapping[str, float], title: str
) -> CourseFigure:
    """Draw what a step of each layout was predicted to be made of, and predicted and measured seconds side by side.

    On the left are the shares of the causes in the prediction. On the right a circle is the prediction, a diamond the
    measurement, and the number between them is measured / predicted; the axis is logarithmic.

    Args:
        predicted: ``{layout: {cause: seconds}}``, from top to bottom.
        measured: ``{layout: seconds}``, for the same layouts.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``predicted`` is empty, or not for the layouts of ``measured``.
    """
    if not predicted or set(predicted) != set(measured):
        raise UserError(f"layout_times: predicted {list(predicted)} but measured {list(measured)}; give both for each")
    fig = new_figure(title, width=13, height=2.0 + 0.5 * len(predicted))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    for row, (name, parts) in enumerate(predicted.items()):
        total, start = sum(parts.values()), 0.0
        for cause, seconds in parts.items():
            label = f"predicted: {cause}" if row == 0 else None
            left.barh(row, seconds / total, left=start, height=0.66, color=CAUSE_COLOURS[cause], label=label)
            start += seconds / total
        pair = total, measured[name]
        right.plot(pair, (row, row), color=GREY, linewidth=2, zorder=1)
        right.plot([pair[0]], [row], "o", color="white", markeredgecolor=BLACK, markersize=10,
                   label="predicted" if row == 0 else None)  # fmt: skip
        right.plot([pair[1]], [row], "D", color=BLACK, markersize=8, label="measured" if row == 0 else None)
        right.annotate(f"× {pair[1] / pair[0]:.1f}", (max(pair), row), xytext=(10, 0), textcoords="offset points",
                       va="center", fontsize=SMALL_SIZE)  # fmt: skip
    seconds_of_all = [*measured.values(), *(sum(parts.values()) for parts in predicted.values())]
    right.set_xscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter(NullFormatter())  # its labels would be powers of ten
    right.set_xlim(0.8 * min(seconds_of_all), 1.6 * max(seconds_of_all))
    several_decades = max(seconds_of_all) > 10 * min(seconds_of_all)
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if several_decades else (1, 2, 3, 4, 5, 6, 8)))
    left.set_xlim(0, 1)
    left.set_ylim(len(predicted) - 0.4, -0.6)
    label_axes(left, "", "share of the predicted step", "")
    label_axes(right, "", "seconds per step", "")
    left.set_yticks(range(len(predicted)), list(predicted), fontsize=SMALL_SIZE)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        grid_along_x(axes)
    legend_outside(fig)
    return fig
