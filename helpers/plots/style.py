"""What the figures share: palette, text sizes, and the figure that a notebook shows as PNG."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.errors import UserError
from helpers.files import atomic_write

# Okabe and Ito's palette (Color Universal Design, 2008), its yellow, which is too pale for lines, replaced by grey.
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
# Where the bytes go: the same colour for the same category in every chapter.
CATEGORY_COLOURS = {
    "parameters": BLUE,
    "gradients": ORANGE,
    "optimizer states": GREEN,
    "activations": VERMILION,
    "communication buffers": PURPLE,
    "buffers": SKY,
    "other": GREY,
    # What only a prediction, or only a measurement, tells apart: tints of what it is near to, greys, browns.
    "logits and loss": "#F4B183",
    "not counted: temporaries": "#F0E442",
    "allocator rounding": "#E3E3E3",
    "allocator cache": "#C4C4C4",
    "not told apart": "#A6A6A6",
    "NCCL": "#B08A52",
    "CUDA context and NCCL": "#6E5A3C",
    "CUDA context": "#2B2B2B",
}

TEXT_SIZE = 13
SMALL_SIZE = 11.5
TITLE_SIZE = 15
DPI = 110


class CourseFigure(Figure):
    """A figure that notebooks show as PNG by itself."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write ``fig`` in the format of the path's suffix (.png, .svg, .pdf); an older file stays until it is whole."""
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in fig.canvas.get_supported_filetypes():
        raise UserError(f"cannot write a figure to {path}: give a name that ends in .png, .svg or .pdf")
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format=suffix, dpi=DPI)


def new_figure(title: str, width: float, height: float) -> CourseFigure:
    fig = CourseFigure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    fig.suptitle(title, fontsize=TITLE_SIZE, fontweight="bold")
    return fig


def ink_on(colour: str) -> str:
    """Black on pale colours, white on dark ones (relative luminance, WCAG 2)."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return BLACK if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.35 else "white"


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=TEXT_SIZE)
    axes.set_xlabel(x, fontsize=TEXT_SIZE)
    axes.set_ylabel(y, fontsize=TEXT_SIZE)
    axes.tick_params(labelsize=SMALL_SIZE)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def grid_along_x(axes: Axes) -> None:
    """Grid lines where values run to the right, as lying bars do, instead of :func:`label_axes`'s."""
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)


def legend_below(axes: Axes) -> None:
    """A legend under the axis label, in as many columns as fit: it never covers a curve."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    figure_width = axes.figure.get_figwidth() / axes.get_gridspec().ncols
    columns = max(1, int(figure_width * 72 / (SMALL_SIZE * (4 + 0.55 * max(map(len, labels))))))
    axes.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=min(columns, len(labels)),
        fontsize=SMALL_SIZE,
        frameon=False,
    )
