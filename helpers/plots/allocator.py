"""Draw how a caching allocator fills its segments over time."""

from collections.abc import Mapping, Sequence

from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.memory.allocator import Block, Segment
from helpers.memory.units import unit_for
from helpers.plots.style import VERMILION, CourseFigure, label_axes, legend_outside, new_figure

FREE_COLOUR = "#D9D9D9"


def allocator_history(history: Mapping[str, Sequence[Sequence[Segment]]], title: str) -> CourseFigure:
    """Draw the blocks of allocators over time, one panel per allocator and one column per snapshot.

    Segments are stacked in the order in which the allocator got them, with a line between them, and keep their place.

    Args:
        history: The segments at each snapshot, ``{allocator: [segments, segments, ...]}``.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: All snapshots are empty.
    """
    if not any(segments for snapshots in history.values() for segments in snapshots):
        raise UserError("allocator_history: there are no segments to draw")
    sizes = {name: _largest_sizes(snapshots) for name, snapshots in history.items()}
    unit = unit_for(sum(largest.values()) for largest in sizes.values())
    fig = new_figure(title, width=13, height=5.2)
    panels = fig.subplots(1, len(history), sharey=True, squeeze=False)[0]
    for axes, (name, snapshots) in zip(panels, history.items(), strict=True):
        bottoms, total = {}, 0  # by address
        for address, size in sizes[name].items():
            bottoms[address], total = total, total + size
        for used, colour in ((False, FREE_COLOUR), (True, VERMILION)):
            blocks = [
                (column, bottom, block.size)
                for column, segments in enumerate(snapshots)
                for segment in segments
                for bottom, block in _stacked_blocks(segment, bottoms[segment.address])
                if block.used == used
            ]
            if blocks:
                columns, starts, heights = zip(*blocks, strict=True)
                axes.bar(
                    columns, [height / unit.size for height in heights], 1.0, [start / unit.size for start in starts],
                    color=colour, linewidth=0,
                )  # fmt: skip
        for bottom in bottoms.values():
            axes.axhline(bottom / unit.size, color="white", linewidth=1.4)
        axes.set_xlim(-0.5, len(snapshots) - 0.5)
        label_axes(axes, name, "moment", f"segments ({unit.name})" if axes is panels[0] else "")
        axes.grid(visible=False)
    handles = [Patch(color=VERMILION, label="held by a tensor"), Patch(color=FREE_COLOUR, label="reserved, free")]
    legend_outside(fig, handles)
    return fig


def _largest_sizes(snapshots: Sequence[Sequence[Segment]]) -> dict[int, int]:
    """Find the largest size of each segment, by address: expandable segments grow."""
    sizes: dict[int, int] = {}
    for segments in snapshots:
        for segment in segments:
            sizes[segment.address] = max(segment.size, sizes.get(segment.address, 0))
    return sizes


def _stacked_blocks(segment: Segment, bottom: int) -> list[tuple[int, Block]]:
    """Pair each block with the height at which it starts."""
    stacked = []
    for block in segment.blocks:
        stacked.append((bottom, block))
        bottom += block.size
    return stacked
