"""Draw number formats: against the values that they have to represent, and by what they cost."""

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    GREY,
    RANK_COLOURS,
    SMALL_SIZE,
    CourseFigure,
    label_axes,
    legend_below,
    new_figure,
)


def codebook_histogram(
    values: Sequence[float], codebooks: Mapping[str, Sequence[float]], title: str, x_label: str
) -> CourseFigure:
    """Draw a histogram of values, once per format, with a line at each value that the format can represent.

    Args:
        values: The values to represent, scaled to the range of the formats.
        codebooks: ``{format: [value, value, ...]}``.
        title: The figure's title.
        x_label: What the values are.

    Returns:
        The figure.

    Raises:
        UserError: ``codebooks`` or ``values`` is empty.
    """
    if not codebooks or not len(values):
        raise UserError("codebook_histogram: there are no formats, or no values, to draw")
    fig = new_figure(title, width=9, height=1.2 + 2.4 * len(codebooks))
    panels = fig.subplots(len(codebooks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, codebook), colour in zip(panels, codebooks.items(), RANK_COLOURS, strict=False):
        axes.hist(values, bins=120, density=True, color=GREY, alpha=0.5)
        for entry in codebook:
            axes.axvline(entry, color=colour, linewidth=1.8)
        label_axes(axes, f"{name}: {len(codebook)} levels", "", "density")
    panels[-1].set_xlabel(x_label, fontsize=panels[-1].yaxis.label.get_size())
    return fig


def format_errors(
    formats: Mapping[str, Mapping[int, tuple[float, float]]], title: str, x_label: str, y_label: str
) -> CourseFigure:
    """Draw the error of number formats against their bits; each point is labelled with its block size.

    Args:
        formats: ``{format: {block size: (bits, error)}}``.
        title: The figure's title.
        x_label: Label of the axis, with its unit.
        y_label: Label of the axis, with its unit; it starts at 0.

    Returns:
        The figure.

    Raises:
        UserError: ``formats`` has no point.
    """
    if not any(formats.values()):
        raise UserError("format_errors: there are no points to draw")
    fig = new_figure(title, width=9, height=4.8)
    axes = fig.subplots()
    above, below = 9, -19  # points: the lower curves are labelled below
    for number, (name, points) in enumerate(formats.items()):
        colour, marker, offset = RANK_COLOURS[number], "os^Dv<>X"[number], below if number else above
        xs, ys = zip(*points.values(), strict=True)
        axes.plot(xs, ys, marker=marker, color=colour, markersize=9, label=name)
        for block, point in points.items():
            axes.annotate(
                f"{block:,}", point, (0, offset), textcoords="offset points", ha="center", color=colour,
                fontsize=SMALL_SIZE,
            )  # fmt: skip
    axes.set_ylim(0, 1.12 * max(error for points in formats.values() for _, error in points.values()))
    label_axes(axes, "number at a point: weights per block", x_label, y_label)
    legend_below(axes)
    return fig


def loss_differences(
    curves: Mapping[str, Sequence[float]], reference: str, title: str, *, every: int = 1
) -> CourseFigure:
    """Draw the losses of several runs, and next to them how far each is above the reference.

    Args:
        curves: ``{run: [loss of step 1, of step 2, ...]}``, in nats per token.
        reference: The run that the others are compared with.
        title: The figure's title.
        every: Steps between two losses, if not every step has one.

    Returns:
        The figure.

    Raises:
        UserError: ``reference`` is not one of the runs, or the runs differ in length.
    """
    if reference not in curves:
        raise UserError(f"loss_differences: no run is called {reference!r}; choose from {', '.join(curves)}")
    if len({len(losses) for losses in curves.values()}) > 1:
        raise UserError("loss_differences: the runs differ in length; give every run the same steps")
    fig = new_figure(title, width=13, height=4.6)
    left, right = fig.subplots(1, 2)
    steps = [every * number for number in range(1, len(curves[reference]) + 1)]
    for number, ((name, losses), colour, marker) in enumerate(
        zip(curves.items(), RANK_COLOURS, "os^Dv<>X", strict=False)
    ):
        later = len(curves) - 1 - number  # curves may coincide: earlier ones are wider, so that each stays visible
        left.plot(
            steps, losses, marker=marker, markersize=5 + 2 * later, linewidth=1.5 + 2 * later, color=colour, label=name
        )
        if name != reference:
            apart = [loss - base for loss, base in zip(losses, curves[reference], strict=True)]
            right.plot(steps, apart, marker=marker, markersize=6, color=colour, label=name)
    right.axhline(0, color=BLACK, linewidth=1.2)
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(left, "Training loss", "step", "nats per token")
    label_axes(right, f"Difference to {reference}", "step", "nats per token")
    legend_below(left)
    legend_below(right)
    return fig
