"""Draw what connects GPUs: a sketch of two nodes."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from helpers.plots.style import BLUE, GREEN, ORANGE, PURPLE, SMALL_SIZE, TEXT_SIZE, CourseFigure, new_figure

GPUS = 4  # drawn per node; a real one often has 8
NODE_WIDTH = 6.4
NODE_GAP = 2.6


def cluster_sketch(rates: Mapping[str, str], title: str) -> CourseFigure:
    """Draw two nodes with their GPUs and everything that bytes travel over.

    Args:
        rates: Text below the name of each link, for "GPU memory", "NVLink", "PCIe" and "InfiniBand".
        title: The figure's title.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=13, height=5.0)
    axes = fig.subplots()
    for node in range(2):
        left = node * (NODE_WIDTH + NODE_GAP)
        _draw_node(axes, left, node, rates)
    # The line between the two network adapters, and its name above.
    begin, end = NODE_WIDTH - 0.2, NODE_WIDTH + NODE_GAP + 0.2
    axes.plot([begin, end], [0.7, 0.7], color=PURPLE, linewidth=5, zorder=0)
    _label(axes, (begin + end) / 2, 0.95, "InfiniBand", rates["InfiniBand"], PURPLE)
    axes.set_xlim(-0.1, 2 * NODE_WIDTH + NODE_GAP + 0.1)
    axes.set_ylim(-0.15, 5.5)
    axes.axis("off")
    return fig


def _draw_node(axes: Axes, left: float, node: int, rates: Mapping[str, str]) -> None:
    _box(axes, left, 0.0, NODE_WIDTH, 5.0, "none", "#999999")
    axes.text(left + NODE_WIDTH / 2, 5.08, f"node {node}", ha="center", va="bottom", fontsize=TEXT_SIZE)
    # A mirrored order puts the network adapters next to each other.
    host, adapter = (left + 0.2, left + 4.5) if node == 0 else (left + 2.3, left + 0.2)
    for number in range(GPUS):
        x = left + 0.2 + 1.54 * number
        _box(axes, x, 2.75, 1.38, 0.95, "#DCEBF5", BLUE)
        axes.text(x + 0.69, 3.38, f"GPU {number}", ha="center", va="center", fontsize=TEXT_SIZE)
        axes.text(x + 0.69, 3.0, rates["GPU memory"], ha="center", va="center", fontsize=SMALL_SIZE, color=BLUE)
        axes.plot([x + 0.69] * 2, [3.75, 4.05], color=GREEN, linewidth=4)
        axes.plot([x + 0.69] * 2, [1.75, 2.7], color=ORANGE, linewidth=2.5)
    axes.plot([left + 0.89, left + 5.51], [4.05, 4.05], color=GREEN, linewidth=5)
    _label(axes, left + NODE_WIDTH / 2, 4.2, "NVLink", rates["NVLink"], GREEN)
    axes.plot([left + 0.89, left + 5.51], [1.75, 1.75], color=ORANGE, linewidth=2.5)
    _label(axes, left + NODE_WIDTH / 2, 1.85, "PCIe", rates["PCIe"], "#9A6A00")
    for x, width, text in ((host, 3.9, "CPU and host memory"), (adapter, 1.7, "network\nadapter")):
        _box(axes, x, 0.25, width, 0.9, "#EFEFEF", "#777777")
        axes.text(x + width / 2, 0.7, text, ha="center", va="center", fontsize=SMALL_SIZE)
        axes.plot([x + width / 2] * 2, [1.2, 1.75], color=ORANGE, linewidth=2.5)


def _label(axes: Axes, x: float, y: float, name: str, rate: str, colour: str) -> None:
    text = axes.text(x, y, f"{name}, {rate}", ha="center", va="bottom", fontsize=SMALL_SIZE, color=colour)
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", linewidth=1.4)
    shape.set(facecolor=colour, edgecolor=edge)
    axes.add_patch(shape)
