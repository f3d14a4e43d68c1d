"""Draw on one page what each rank stores and sends under every technique of the course."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from helpers.plots.style import (
    CATEGORY_COLOURS,
    SMALL_SIZE,
    TECHNIQUE_COLOURS,
    TEXT_SIZE,
    CourseFigure,
    legend_outside,
    new_figure,
)

RANKS = 4  # and as many layers, so that each stage of the pipeline has one
STATES = ("parameters", "gradients", "optimizer states")
Part = tuple[float, float, float, float]  # left, bottom, width, height, as shares of a state


def _whole(rank: int) -> list[Part]:
    return [(0, 0, 1, 1)]


def _layer(rank: int) -> list[Part]:  # rank 0 has the first layer, which is drawn on top
    return [(0, 1 - (rank + 1) / RANKS, 1, 1 / RANKS)]


def _slices(rank: int) -> list[Part]:
    return [(rank / RANKS, layer / RANKS, 1 / RANKS, 1 / RANKS) for layer in range(RANKS)]


# Parts of parameters, gradients and optimizer states; what a rank holds; what it sends in a step, and when.
ROWS: dict[str, tuple[tuple[Callable[[int], list[Part]], ...], str, str]] = {
    "data parallel": ((_whole, _whole, _whole), "everything",
        "gradients, all-reduced in backward:\n2Ψ (N−1)/N elements"),
    "tensor parallel": ((_slices, _slices, _slices), "a slice of each matrix",
        "activations, 4 all-reduces per layer:\n8bsh (N−1)/N elements per layer"),
    "pipeline parallel": ((_layer, _layer, _layer), "some of the layers",
        "activations to the next stage, their gradients\nto the one before: bsh elements each"),
    "ZeRO-1": ((_whole, _whole, _slices), "weights, gradients,\n1/N of Adam's states",
        "reduce-scatter of gradients, all-gather of\nnew weights: 2Ψ (N−1)/N elements"),
    "ZeRO-2": ((_whole, _slices, _slices), "weights, 1/N of\nthe rest",
        "as ZeRO-1, but gradients leave during\nbackward: 2Ψ (N−1)/N elements"),
    "ZeRO-3": ((_slices, _slices, _slices), "1/N of each layer",
        "all-gather of weights in forward and backward,\nreduce-scatter of gradients: 3Ψ (N−1)/N"),
}  # fmt: skip


def techniques(title: str) -> CourseFigure:
    """Draw a row per technique: the parts of the model states on each of four ranks, and what a rank sends per step.

    In each small square the layers lie one above the other; what a rank does not hold is white.

    Args:
        title: The figure's title.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=13, height=7.3)
    axes = fig.subplots()
    for rank in range(RANKS):
        axes.text(2.15 + 1.45 * rank + 0.6, -0.08, f"rank {rank}", ha="center", va="bottom", fontsize=SMALL_SIZE)
    for x, heading in ((8.05, "each rank stores"), (10.35, "and sends per step")):
        axes.text(x, -0.08, heading, va="bottom", fontsize=TEXT_SIZE, fontweight="bold")
    for row, (name, (parts, stores, sends)) in enumerate(ROWS.items()):
        colour = TECHNIQUE_COLOURS["1F1B" if name == "pipeline parallel" else name]
        axes.add_patch(Rectangle((0, row + 0.04), 0.12, 0.84, facecolor=colour, linewidth=0))
        axes.text(0.25, row + 0.46, name, va="center", fontsize=SMALL_SIZE, fontweight="bold")
        for rank in range(RANKS):
            for number, (state, part_of) in enumerate(zip(STATES, parts, strict=True)):
                _draw_state(axes, 2.15 + 1.45 * rank + 0.42 * number, row + 0.04, state, part_of(rank))
        axes.text(8.05, row + 0.46, stores, va="center", fontsize=SMALL_SIZE)
        axes.text(10.35, row + 0.46, sends, va="center", fontsize=SMALL_SIZE)
    axes.set_xlim(0, 14.7)
    axes.set_ylim(len(ROWS), -0.4)
    axes.axis("off")
    handles = [Patch(color=CATEGORY_COLOURS[state], label=state) for state in STATES]
    legend_outside(fig, handles)
    return fig


def _draw_state(axes: Axes, left: float, top: float, state: str, parts: list[Part]) -> None:
    width, height = 0.38, 0.84
    for x, y, share, part in parts:
        corner = (left + x * width, top + (1 - y - part) * height)
        axes.add_patch(Rectangle(corner, share * width, part * height, facecolor=CATEGORY_COLOURS[state], linewidth=0))
    for layer in range(RANKS):
        frame = Rectangle((left, top + layer * height / RANKS), width, height / RANKS, fill=False)
        frame.set(edgecolor="#BBBBBB", linewidth=0.8)
        axes.add_patch(frame)
