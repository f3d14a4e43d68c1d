"""Share one style among all figures: palette, text sizes, and a figure that notebooks show as PNG."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from helpers.errors import UserError
from helpers.files import atomic_write

# Okabe and Ito's palette (Color Universal Design, 2008), with grey instead of yellow, which is too pale for lines.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#8C8C8C",
)
RANK_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY)
# A category of memory has the same colour in every chapter.
CATEGORY_COLOURS = {
    "parameters": BLUE,
    "gradients": ORANGE,
    "optimizer states": GREEN,
    "activations": VERMILION,
    "communication buffers": PURPLE,
    "buffers": SKY,
    "other": GREY,
    # Categories that only predictions or only measurements distinguish: tints of the nearest category, greys, browns.
    "logits and loss": "#F4B183",
    "not counted: temporaries": "#F0E442",
    "allocator allowance": "#E3E3E3",
    "allocator cache": "#C4C4C4",
    "not told apart": "#A6A6A6",
    "NCCL": "#B08A52",
    "CUDA context and NCCL": "#6E5A3C",
    "CUDA context": "#2B2B2B",
}
# An allowance, which a run may not need: hatched.
CATEGORY_HATCHES = {"allocator allowance": "///"}
# A technique has the same colour in every chapter.
TECHNIQUE_COLOURS = {
    "data parallel": BLACK,
    "DDP": BLACK,
    "tensor parallel": "#882255",  # the palette is used up: wine of Paul Tol's muted scheme
    "ZeRO-1": BLUE,
    "ZeRO-2": GREEN,
    "ZeRO-3": VERMILION,
    "GPipe": GREY,
    "1F1B": SKY,
    "interleaved 1F1B": ORANGE,
    "zero-bubble": PURPLE,
}

TEXT_SIZE = 13
SMALL_SIZE = 11.5
TITLE_SIZE = 15
DPI = 110


class CourseFigure(Figure):
    """A matplotlib figure that notebooks display as PNG, without pyplot, and describe by its title."""

    def __repr__(self) -> str:
        return f"figure: {self.get_suptitle()}"

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        # 256 colours look the same and take a third of the bytes; a notebook must stay small.
        palette = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        palette.save(buffer, format="png", optimize=True)
        return buffer.getvalue(), {"alt": repr(self)}


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write a figure to a file, atomically: until it is complete, an older file stays.

    Args:
        fig: The figure.
        path: Of the file; the suffix selects the format (.png, .svg, .pdf).

    Raises:
        UserError: Matplotlib cannot write this format.
    """
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in fig.canvas.get_supported_filetypes():
        raise UserError(f"cannot write a figure to {path}: give a name that ends in .png, .svg or .pdf")
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format=suffix, dpi=DPI)


def new_figure(title: str, width: float, height: float) -> CourseFigure:
    """Make an empty figure; ``width`` and ``height`` are in inches."""
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    fig = CourseFigure(figsize=(width, height), layout=layout)
    fig.suptitle(title, fontsize=TITLE_SIZE, fontweight="bold")
    return fig


def colours_for(names: Iterable[str]) -> dict[str, str]:
    """Choose a colour for each name: its technique's, or the next one of the palette that no technique here has.

    Args:
        names: Techniques of ``TECHNIQUE_COLOURS`` or anything else; grey is left if there are more than colours.

    Returns:
        Colours by name, in the order of ``names``.
    """
    unique = list(dict.fromkeys(names))
    techniques = {name: TECHNIQUE_COLOURS[name] for name in unique if name in TECHNIQUE_COLOURS}
    free = (colour for colour in RANK_COLOURS if colour not in techniques.values())
    return {name: techniques.get(name) or next(free, GREY) for name in unique}


def paler(colour: str, share: float) -> str:
    """Mix a colour with white.

    Args:
        colour: As ``#RRGGBB``.
        share: Of white, from 0 to 1.

    Returns:
        The mixture, as ``#rrggbb``.
    """
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return to_hex((red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share))


def ink_on(colour: str) -> str:
    """Choose black text on pale colours and white text on dark ones, by relative luminance (WCAG 2)."""
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return BLACK if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.35 else "white"


class PlainNumbers(ScalarFormatter):
    """Write ticks as the text writes numbers: thousands apart, no powers of ten, no offset to add."""

    def __init__(self) -> None:
        super().__init__(useOffset=False)
        self.set_scientific(False)

    def __call__(self, x: float, pos: int | None = None) -> str:
        if abs(x) >= 1000 and float(x).is_integer():
            return self.fix_minus(f"{x:,.0f}")
        return super().__call__(x, pos)


def label_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set title and labels, plain numbers, a horizontal grid, and no frame at the top and right."""
    for axis in (axes.xaxis, axes.yaxis):
        if type(axis.get_major_formatter()) is ScalarFormatter:  # neither names nor a scale with ticks of its own
            axis.set_major_formatter(PlainNumbers())
    axes.set_title(title, fontsize=TEXT_SIZE)
    axes.set_xlabel(x_label, fontsize=TEXT_SIZE)
    axes.set_ylabel(y_label, fontsize=TEXT_SIZE)
    axes.tick_params(labelsize=SMALL_SIZE)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def grid_along_x(axes: Axes) -> None:
    """Draw vertical grid lines, for horizontal bars, instead of the horizontal ones of :func:`label_axes`."""
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)


def legend_below(axes: Axes) -> None:
    """Put the legend below the x label, where it covers no curve, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    grid = axes.get_gridspec()
    width = cast(Figure, axes.figure).get_figwidth() / (grid.ncols if grid else 1)  # inches
    axes.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=_columns_that_fit(labels, 0.9 * 72 * width),
        fontsize=SMALL_SIZE,
        frameon=False,
    )


def legend_outside(fig: Figure, handles: Sequence[Artist | Container] = (), size: float = SMALL_SIZE) -> None:
    """Put the legend of a figure below all axes, in as many columns as fit.

    Args:
        fig: The figure.
        handles: What the legend shows, with their labels; by default everything in the axes that has a label.
        size: Of the text, in points.
    """
    handles = handles or [handle for axes in fig.axes for handle in axes.get_legend_handles_labels()[0]]
    labels = [str(handle.get_label()) for handle in handles]
    if labels:
        columns = _columns_that_fit(labels, 0.95 * 72 * fig.get_figwidth(), size)
        # Matplotlib takes containers as handles, too; its types do not say so.
        artists = cast(Sequence[Artist], handles)
        fig.legend(artists, labels, loc="outside lower center", ncols=columns, fontsize=size, frameon=False)


def _columns_that_fit(labels: Sequence[str], available: float, size: float = SMALL_SIZE) -> int:
    """Choose the largest number of columns of a legend that are together at most ``available`` points wide."""
    widths = [TextPath((0, 0), label, size=size).get_extents().width for label in labels]
    for columns in range(len(labels), 1, -1):
        widest = [max(column) for column in np.array_split(widths, columns)]  # as matplotlib fills them
        # A handle and its pad take 2.8 em, the space between two columns 2 em: matplotlib's defaults.
        if sum(widest) + size * (2.8 * columns + 2 * (columns - 1)) <= available:
            rows = -(-len(labels) // columns)
            return -(-len(labels) // rows)  # as few as fill these rows
    return 1
