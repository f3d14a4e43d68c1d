"""Draw which model states each rank holds, after figure 1 of the ZeRO paper (Rajbhandari et al. 2019)."""

from collections.abc import Collection, Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from helpers.errors import UserError
from helpers.plots.style import (
    CATEGORY_COLOURS,
    GREY,
    SMALL_SIZE,
    TEXT_SIZE,
    CourseFigure,
    ink_on,
    label_axes,
    legend_outside,
    new_figure,
)

# Bytes per parameter with 16-bit weights and Adam: its states are a master weight, momentum and variance in fp32.
BYTES = {"parameters": 2, "gradients": 2, "optimizer states": 12}
WIDTH = 0.8


def model_states(sharded: Mapping[str, Collection[str]], world_size: int, title: str) -> CourseFigure:
    """Draw one panel per technique and one bar per rank: what it holds is coloured, what other ranks hold is dotted.

    Args:
        sharded: ``{technique: states of which a rank holds its part only}``; the states are those of ``BYTES``.
        world_size: Ranks.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: No technique is given, or a state is unknown.
    """
    unknown = {state for states in sharded.values() for state in states} - set(BYTES)
    if unknown or not sharded:
        raise UserError(f"model_states: got {dict(sharded)}; name techniques, and shard some of {', '.join(BYTES)}")
    fig = new_figure(title, width=13, height=4.6)
    panels = fig.subplots(1, len(sharded), sharey=True, squeeze=False)[0]
    for axes, (technique, states) in zip(panels, sharded.items(), strict=True):
        for rank in range(world_size):
            _draw_rank(axes, rank, world_size, states)
        label_axes(axes, technique, "", "bytes per parameter" if axes is panels[0] else "")
        axes.set_xticks(range(world_size), [f"rank {rank}" for rank in range(world_size)])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, world_size - 0.4)
        axes.set_ylim(0, 1.15 * sum(BYTES.values()))
        axes.set_yticks(range(0, sum(BYTES.values()) + 1, 2))
    handles = [Patch(color=CATEGORY_COLOURS[state], label=state) for state in BYTES]
    handles.append(Patch(facecolor="none", edgecolor=GREY, linestyle=":", label="held by another rank"))
    legend_outside(fig, handles)
    return fig


def _draw_rank(axes: Axes, rank: int, world_size: int, sharded: Collection[str]) -> None:
    bottom, held = 0.0, 0.0
    for state, size in BYTES.items():
        colour = CATEGORY_COLOURS[state]
        part = size / world_size if state in sharded else size
        start = bottom + rank * part if state in sharded else bottom
        left = rank - WIDTH / 2
        axes.add_patch(Rectangle((left, bottom), WIDTH, size, facecolor="white", edgecolor=GREY, linestyle=":"))
        axes.add_patch(Rectangle((left, start), WIDTH, part, facecolor=colour, edgecolor="white", linewidth=0.8))
        if part > 1:
            middle, ink = start + part / 2, ink_on(colour)
            axes.text(rank, middle, f"{part:g}", ha="center", va="center", fontsize=SMALL_SIZE, color=ink)
        bottom, held = bottom + size, held + part
    axes.text(rank, bottom, f"{held:g}", ha="center", va="bottom", fontsize=TEXT_SIZE, fontweight="bold")
