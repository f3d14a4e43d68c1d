"""Draw number formats against the values that they have to represent."""

from collections.abc import Mapping, Sequence

from helpers.errors import UserError
from helpers.plots.style import GREY, RANK_COLOURS, CourseFigure, label_axes, new_figure


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
