"""Where the levels of a number format lie in what they have to represent."""

from collections.abc import Mapping, Sequence

from helpers.errors import UserError
from helpers.plots.style import GREY, RANK_COLOURS, CourseFigure, label_axes, new_figure


def levels_in_histogram(
    values: Sequence[float], levels: Mapping[str, Sequence[float]], title: str, x: str
) -> CourseFigure:
    """A histogram of ``values``, and for each format of ``levels`` a panel with a line at each of its levels.

    Raises :class:`UserError` where there is no format or no value.
    """
    if not levels or not len(values):
        raise UserError("there are no levels, or no values, to draw")
    fig = new_figure(title, width=9, height=1.2 + 2.4 * len(levels))
    panels = fig.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, places), colour in zip(panels, levels.items(), RANK_COLOURS, strict=False):
        axes.hist(values, bins=120, density=True, color=GREY, alpha=0.5)
        for place in places:
            axes.axvline(place, color=colour, linewidth=1.8)
        label_axes(axes, f"{name}: {len(places)} levels", "", "density")
    panels[-1].set_xlabel(x, fontsize=panels[-1].yaxis.label.get_size())
    return fig
