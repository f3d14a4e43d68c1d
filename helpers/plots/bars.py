"""Bars side by side: one quantity on several ranks, in several ways of doing the same."""

from collections.abc import Mapping, Sequence

from helpers.errors import UserError
from helpers.plots.style import BLACK, RANK_COLOURS, SMALL_SIZE, TEXT_SIZE, CourseFigure, label_axes, new_figure


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
