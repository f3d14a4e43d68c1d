"""Draw what flows where: a layer under tensor parallelism, and the two memories of ZeRO-Offload."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    BLUE,
    CATEGORY_COLOURS,
    GREY,
    RANK_COLOURS,
    SMALL_SIZE,
    TECHNIQUE_COLOURS,
    TEXT_SIZE,
    CourseFigure,
    ink_on,
    new_figure,
)

# Of each block: name, first matrix, what a rank has between the two, second matrix.
BLOCKS = (
    ("attention", "q, k, v\ncolumn parallel\n[h, (h + 2k) / {n}]", "rank {r}:\nits heads\n[b, s, h / {n}]",
     "o_proj\nrow parallel\n[h / {n}, h]"),
    ("MLP", "gate, up\ncolumn parallel\n[h, 2i / {n}]", "rank {r}:\nsilu(gate) · up\n[b, s, i / {n}]",
     "down\nrow parallel\n[i / {n}, h]"),
)  # fmt: skip
PALE = "#F4F4F4"


def megatron_block(ranks: int, title: str) -> CourseFigure:
    """Draw both blocks of a layer under tensor parallelism, with the shapes that a rank has and f and g.

    Args:
        ranks: Ranks that share the layer; 2 to 4.
        title: The figure's title.

    Returns:
        The figure. In shapes b is sequences, s tokens, h the width, k the width of all keys, i the inside of the MLP.

    Raises:
        UserError: The lanes of so many ranks cannot be drawn.
    """
    if not 2 <= ranks <= 4:
        raise UserError(f"megatron_block: ranks={ranks}; give 2 to 4, one lane is drawn for each")
    fig = new_figure(title, width=13, height=1.7 + 0.9 * ranks * len(BLOCKS))
    panels = fig.subplots(len(BLOCKS), 1)
    for axes, (name, *inside) in zip(panels, BLOCKS, strict=True):
        _draw_block(axes, name, inside, ranks)
    fig.supxlabel(
        "f: passes on in forward, all-reduce in backward          g: all-reduce in forward, passes on in backward",
        fontsize=TEXT_SIZE, color=TECHNIQUE_COLOURS["tensor parallel"],
    )  # fmt: skip
    return fig


def _draw_block(axes: Axes, name: str, inside: Sequence[str], ranks: int) -> None:
    wine, middle = TECHNIQUE_COLOURS["tensor parallel"], (ranks - 1) / 2
    axes.text(0.0, ranks - 0.4, name, fontsize=TEXT_SIZE, fontweight="bold", va="bottom")
    for x, text in ((0.0, "norm(X)\non every rank\n[b, s, h]"), (11.3, "Y\non every rank\n[b, s, h]")):
        _box(axes, x, middle, 1.7, text, PALE, GREY)
    for x, letter in ((2.2, "f"), (10.05, "g")):
        _box(axes, x, middle, 0.6, letter, wine, wine, height=0.5 + 0.5 * ranks)
    _arrow(axes, (1.7, middle), (2.2, middle), GREY)
    _arrow(axes, (10.65, middle), (11.3, middle), GREY)
    for rank in range(ranks):
        y, colour = ranks - 1 - rank, RANK_COLOURS[rank]
        ends = (2.8, 3.55), (5.55, 5.85), (7.55, 7.85), (9.5, 10.05)
        for place, text in zip((3.55, 5.85, 7.85), inside, strict=True):
            matrix = place != 5.85
            _box(
                axes, place, y, 2.0 if place == 3.55 else 1.7, text.format(n=ranks, r=rank),
                colour if matrix else "#FFFFFF", colour,
            )  # fmt: skip
        for begin, end in ends:
            _arrow(
                axes,
                (begin, y if begin != 2.8 else _near(y, middle)),
                (end, y if end != 10.05 else _near(y, middle)),
                colour,
            )
    axes.set_xlim(-0.1, 13.1)
    axes.set_ylim(-0.55, ranks - 0.1)
    axes.axis("off")


def _near(y: float, middle: float) -> float:
    return middle + 0.5 * (y - middle)  # f and g are lower than all lanes together


def offload_memories(title: str) -> CourseFigure:
    """Draw what lives on the GPU and on the host under ZeRO-Offload, and what crosses PCIe in which phase.

    Args:
        title: The figure's title.

    Returns:
        The figure; sizes are bytes per parameter, with 16-bit weights and Adam.
    """
    fig = new_figure(title, width=13, height=6.0)
    axes = fig.subplots()
    colours = CATEGORY_COLOURS
    for left, name in ((0.0, "GPU"), (8.6, "host")):
        shape = FancyBboxPatch((left, 0.0), 4.4, 4.9, boxstyle="round,pad=0,rounding_size=0.1")
        shape.set(facecolor=PALE, edgecolor=GREY)
        axes.add_patch(shape)
        axes.text(left + 2.2, 5.0, f"{name} memory", ha="center", va="bottom", fontsize=TEXT_SIZE, fontweight="bold")
    _box(axes, 0.25, 4.2, 3.9, "parameters, 16 bit: 2 bytes", colours["parameters"], BLUE)
    _box(axes, 0.25, 2.45, 3.9, "activations", colours["activations"], colours["activations"])
    _box(axes, 0.25, 0.7, 3.9, "gradients, until the host has them", "#FFFFFF", colours["gradients"])
    _box(axes, 8.85, 4.2, 3.9, "new values, 16 bit, on their way", "#FFFFFF", colours["parameters"])
    _box(axes, 8.85, 2.45, 3.9, "fp32 weights and Adam's\ntwo moments: 12 bytes", colours["optimizer states"], GREY)
    _box(axes, 8.85, 0.7, 3.9, "gradients, read by Adam", colours["gradients"], colours["gradients"])
    _arrow(axes, (8.75, 4.2), (4.25, 4.2), colours["parameters"], 4)
    _arrow(axes, (4.25, 0.7), (8.75, 0.7), colours["gradients"], 4)
    _arrow(axes, (10.8, 1.15), (10.8, 2.0), BLACK, 2)
    _arrow(axes, (10.8, 2.9), (10.8, 3.75), BLACK, 2)
    for y, text in (
        (4.35, "3. after Adam\nnew weights up: 2 bytes"),
        (2.3, "1. forward: nothing crosses PCIe"),
        (0.85, "2. backward\ngradients down: 2 bytes"),
    ):
        axes.text(6.5, y, text, ha="center", va="bottom", fontsize=SMALL_SIZE)
    axes.text(10.95, 1.58, "Adam on the CPU", va="center", fontsize=SMALL_SIZE)
    axes.set_xlim(-0.1, 13.1)
    axes.set_ylim(-0.1, 5.5)
    axes.axis("off")
    return fig


def _box(
    axes: Axes, left: float, y: float, width: float, text: str, colour: str, edge: str, height: float = 0.84
) -> None:
    shape = FancyBboxPatch((left, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.06")
    shape.set(facecolor=colour, edgecolor=edge, linewidth=1.8)
    axes.add_patch(shape)
    axes.text(left + width / 2, y, text, ha="center", va="center", fontsize=SMALL_SIZE, color=ink_on(colour))


def _arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str, linewidth: float = 1.8
) -> None:
    arrow = FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12 + 2 * linewidth, shrinkA=0, shrinkB=0)
    arrow.set(color=colour, linewidth=linewidth)
    axes.add_patch(arrow)
