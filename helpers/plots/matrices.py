"""Draw which rank holds which part of a matrix."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from helpers.errors import UserError
from helpers.plots.style import GREY, RANK_COLOURS, SMALL_SIZE, TEXT_SIZE, CourseFigure, ink_on, new_figure

LONGEST_SIDE = 1.0  # of the largest matrix; other sides scale with the square root, so that small ones stay visible
GAP = 0.35
LABEL_HEIGHT = 0.3  # above a matrix, for its name and size


def matrix_parts(
    held: Mapping[str, Sequence[np.ndarray]], title: str, bands: Mapping[str, Sequence[str]] | None = None
) -> CourseFigure:
    """Draw matrices side by side, with each part in the colour of the rank that holds it.

    A part that several ranks hold is striped and shows all their numbers; a part that all ranks hold is grey.

    Args:
        held: ``{matrix: [mask of rank 0, of rank 1, ...]}``; a mask [rows, columns] is true if the rank holds the
            element.
        title: The figure's title.
        bands: ``{matrix: names}`` of equally high bands, from top to bottom, for a matrix that fuses several; a line
            parts them.

    Returns:
        The figure.

    Raises:
        UserError: ``held`` is empty, or the masks of a matrix differ in shape.
    """
    if not held:
        raise UserError("matrix_parts: there are no matrices to draw")
    for name, masks in held.items():
        if len({np.shape(mask) for mask in masks}) != 1 or np.ndim(masks[0]) != 2:
            raise UserError(f"matrix_parts: {name}: give one mask [rows, columns] per rank, all of one shape")
    longest = max(max(np.shape(masks[0])) for masks in held.values())
    sides = {
        name: [LONGEST_SIDE * (size / longest) ** 0.5 for size in np.shape(masks[0])] for name, masks in held.items()
    }
    slots = {name: max(width, 0.055 * len(name)) for name, (_, width) in sides.items()}  # at least as wide as the name
    total = sum(slots.values()) + GAP * (len(held) - 1)
    tallest = max(height for height, _ in sides.values())
    height = min(5.2, 1.0 + 12.5 * (tallest + LABEL_HEIGHT) / total)
    # As wide as the matrices at this height, and as the title.
    width = min(13.0, max(0.6 + (height - 1.0) * total / (tallest + LABEL_HEIGHT), 0.13 * len(title)))
    fig = new_figure(title, width, height)
    axes = fig.subplots()
    left = 0.0
    for name, masks in held.items():
        height, width = sides[name]
        start = left + (slots[name] - width) / 2
        rows, columns = np.shape(masks[0])
        axes.text(
            start + width / 2, -0.05, f"{name}\n{rows} x {columns}", ha="center", va="bottom", fontsize=SMALL_SIZE
        )
        for top, bottom, first, last, ranks in _blocks(np.asarray(masks, dtype=bool)):
            corner = (start + width * first / columns, height * top / rows)
            size = (width * (last - first) / columns, height * (bottom - top) / rows)
            _draw_block(axes, corner, size, ranks, len(masks))
        names = (bands or {}).get(name, ())
        for number, band in enumerate(names):
            middle = height * (number + 0.5) / len(names)
            axes.text(start - 0.03, middle, band, ha="right", va="center", fontsize=TEXT_SIZE)
            if number:
                edge = height * number / len(names)
                axes.plot([start - 0.12, start + width + 0.03], [edge, edge], color="black", linewidth=2)
        left += slots[name] + GAP
    axes.set_xlim(-0.05, total + 0.05)
    axes.set_ylim(tallest + 0.03, -LABEL_HEIGHT)
    axes.set_aspect("equal")
    axes.axis("off")
    return fig


def matmul_parts(equations: Mapping[str, Sequence[tuple[str, Sequence[np.ndarray]]]], title: str) -> CourseFigure:
    """Draw matrix multiplications X A = Y as rectangles, with each part in the colour of the rank that holds it.

    Args:
        equations: ``{name: [(label, masks) of X, of A, of Y]}``, side by side; masks as in :func:`matrix_parts`.
        title: The figure's title.

    Returns:
        The figure.
    """
    shapes = [np.shape(masks[0]) for factors in equations.values() for _, masks in factors]
    longest, tallest = max(map(max, shapes)), max(rows for rows, _ in shapes)
    widest = max(sum(np.shape(masks[0])[1] / longest + 0.4 for _, masks in factors) for factors in equations.values())
    inch = 12.6 / len(equations) / widest  # per unit of the drawing
    fig = new_figure(title, width=13, height=1.1 + inch * (tallest / longest + 0.44))
    for axes, (name, factors) in zip(np.atleast_1d(fig.subplots(1, len(equations))), equations.items(), strict=True):
        left = 0.0
        for (label, masks), sign in zip(factors, ("×", "=", ""), strict=True):
            rows, columns = np.shape(masks[0])
            height, width, top = rows / longest, columns / longest, (tallest - rows) / longest / 2
            for first, last, begin, end, ranks in _blocks(np.asarray(masks, dtype=bool)):
                corner = (left + width * begin / columns, top + height * first / rows)
                size = (width * (end - begin) / columns, height * (last - first) / rows)
                _draw_block(axes, corner, size, ranks, len(masks))
            text = f"{label}\n{rows} x {columns}"
            axes.text(left + width / 2, top - 0.03, text, ha="center", va="bottom", fontsize=SMALL_SIZE)
            axes.text(left + width + 0.2, tallest / longest / 2, sign, ha="center", va="center", fontsize=22)
            left += width + 0.4
        axes.set_title(name, fontsize=TEXT_SIZE, loc="left")
        axes.set_xlim(-0.1, widest)
        axes.set_ylim(tallest / longest + 0.02, -0.42)
        axes.set_aspect("equal")
        axes.axis("off")
    return fig


def _blocks(masks: np.ndarray) -> list[tuple[int, int, int, int, tuple[int, ...]]]:
    """List the rectangles that the same ranks hold: (top, bottom, first column, last column, ranks)."""
    edges = []
    for axis in (1, 2):
        changes = np.diff(masks.astype(np.int8), axis=axis).any(axis=(0, 3 - axis))
        edges.append([0, *(np.flatnonzero(changes) + 1).tolist(), masks.shape[axis]])
    rows, columns = edges
    return [
        (top, bottom, first, last, tuple(np.flatnonzero(masks[:, top, first]).tolist()))
        for top, bottom in pairwise(rows)
        for first, last in pairwise(columns)
    ]


def _draw_block(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], ranks: tuple[int, ...], world_size: int
) -> None:
    colours = [RANK_COLOURS[rank % len(RANK_COLOURS)] for rank in ranks]
    held_by_all = len(ranks) == world_size > 1
    colour = GREY if held_by_all else colours[0] if colours else "white"
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="white", linewidth=1.5))
    text = "all" if held_by_all else ", ".join(map(str, ranks))
    if len(colours) > 1 and not held_by_all:
        stripes = Rectangle(corner, *size, facecolor="none", edgecolor=colours[1], hatch="//", linewidth=0)
        axes.add_patch(stripes)
    if min(size) > 0.03:
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5} if len(colours) > 1 else None
        axes.text(
            corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", fontsize=TEXT_SIZE,
            color=ink_on(colour) if text else GREY, bbox=box,
        )  # fmt: skip
