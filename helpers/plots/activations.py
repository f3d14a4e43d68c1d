"""Figures of activation memory: what a layer keeps, what keeping less costs, and what an allocator makes of it."""

from collections.abc import Mapping, Sequence

from matplotlib.colors import to_hex
from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.memory.allocator import Block, Segment
from helpers.memory.units import unit_for
from helpers.plots.style import (
    RANK_COLOURS,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    ink_on,
    label_axes,
    new_figure,
)

FREE = "#D9D9D9"
CHARACTER = 0.0078  # width of one, as a share of the axis


def kept_tensors(bars: Mapping[str, Mapping[str, float]], title: str, x: str) -> CourseFigure:
    """Stacked bars of named parts, ``{bar: {part: amount}}``, each part with its name in it where it has room.

    A part has one colour in all bars; a legend names the parts that found no room anywhere. ``x`` labels the axis.
    Raises :class:`UserError` where there is nothing to draw, or a part is negative.
    """
    if not any(bars.values()):
        raise UserError("there are no parts to draw: give at least one bar with one part")
    longest = max(sum(parts.values()) for parts in bars.values())
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    # The palette, then the same colours paler.
    colours = {name: _shade(RANK_COLOURS[n % 6], n // 6) for n, name in enumerate(names)}
    fig = new_figure(title, width=13, height=2.0 + 1.0 * len(bars))
    axes = fig.subplots()
    written: set[str] = set()
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for name, amount in parts.items():
            if amount < 0:
                raise UserError(f"{name!r} of a bar is {amount}; give amounts of 0 or more")
            axes.barh(place, amount, left=left, height=0.66, color=colours[name], edgecolor="white", linewidth=0.8)
            lines = name.split(" ") if len(name) > 12 else [name]
            if amount / longest >= CHARACTER * max(map(len, lines)):
                written.add(name)
                axes.text(
                    left + amount / 2, place, "\n".join(lines), ha="center", va="center", fontsize=SMALL_SIZE,
                    color=ink_on(colours[name]),
                )  # fmt: skip
            left += amount
        axes.text(left, place, f" {left:,.0f}", va="center", fontsize=TEXT_SIZE)
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlim(0, 1.1 * longest)
    label_axes(axes, "", x, "")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelsize=TEXT_SIZE, length=0)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items() if name not in written]
    if handles:
        fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL_SIZE, frameon=False)
    return fig


def _shade(colour: str, paler: int) -> str:
    share = 0.45 * min(paler, 2)
    rgb = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return to_hex([channel + (1 - channel) * share for channel in rgb])


def trade_off(points: Mapping[str, tuple[float, float]], title: str, x: str, y: str) -> CourseFigure:
    """Ways to do the same, each a named point at what it costs and what it needs: ``{name: (x, y)}``.

    Both axes begin at 0, so that distances tell shares. Raises :class:`UserError` where there is no point.
    """
    if not points:
        raise UserError("there are no points to draw")
    fig = new_figure(title, width=10, height=5)
    axes = fig.subplots()
    axes.set_xlim(0, 1.12 * max(place for place, _ in points.values()))
    axes.set_ylim(0, 1.15 * max(height for _, height in points.values()))
    for (name, (place, height)), colour, marker in zip(points.items(), RANK_COLOURS, "os^Dv<>X", strict=False):
        axes.plot(place, height, marker, color=colour, markersize=13, label=name)
    label_axes(axes, "", x, y)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    fig.legend(loc="outside right center", fontsize=SMALL_SIZE, frameon=False)
    return fig


def memory_history(history: Mapping[str, Sequence[Sequence[Segment]]], title: str) -> CourseFigure:
    """What an allocator held at each moment, block by block: ``{allocator: [segments at moment 0, at 1, ...]}``.

    One panel for each allocator. A column is a moment; segments stand on one another in the order in which they came,
    parted by a line, and keep their place. Raises :class:`UserError` where there is nothing to draw.
    """
    if not any(segments for moments in history.values() for segments in moments):
        raise UserError("there are no segments to draw")
    sizes = {name: _largest(moments) for name, moments in history.items()}
    unit = unit_for(sum(held.values()) for held in sizes.values())
    fig = new_figure(title, width=13, height=5.2)
    panels = fig.subplots(1, len(history), sharey=True, squeeze=False)[0]
    for axes, (name, moments) in zip(panels, history.items(), strict=True):
        base, bottoms = 0, {}
        for address, size in sizes[name].items():
            bottoms[address], base = base, base + size
        for used, colour in ((False, FREE), (True, VERMILION)):
            bars = [
                (moment, bottom, block.size)
                for moment, segments in enumerate(moments)
                for segment in segments
                for bottom, block in _placed(segment, bottoms[segment.address])
                if block.used == used
            ]
            if bars:
                places, starts, heights = zip(*bars, strict=True)
                axes.bar(
                    places, [height / unit.size for height in heights], 1.0, [start / unit.size for start in starts],
                    color=colour, linewidth=0,
                )  # fmt: skip
        for bottom in bottoms.values():
            axes.axhline(bottom / unit.size, color="white", linewidth=1.4)
        axes.set_xlim(-0.5, len(moments) - 0.5)
        label_axes(axes, name, "moment", f"segments ({unit.name})" if axes is panels[0] else "")
        axes.grid(visible=False)
    handles = [Patch(color=VERMILION, label="held by a tensor"), Patch(color=FREE, label="reserved, free")]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL_SIZE, frameon=False)
    return fig


def _largest(moments: Sequence[Sequence[Segment]]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for segments in moments:
        for segment in segments:
            sizes[segment.address] = max(segment.size, sizes.get(segment.address, 0))
    return sizes


def _placed(segment: Segment, bottom: int) -> list[tuple[int, Block]]:
    placed = []
    for block in segment.blocks:
        placed.append((bottom, block))
        bottom += block.size
    return placed
