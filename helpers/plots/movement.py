"""Draw how numbers move between ranks: one collective with arrows, and the rounds of a ring."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from helpers.errors import UserError
from helpers.plots.style import BLACK, GREY, RANK_COLOURS, SMALL_SIZE, TEXT_SIZE, CourseFigure, new_figure

Rows = Sequence[Sequence[float | None]]
Cell = tuple[int, int]  # rank, slot
GAP = 1.6  # between two grids, in cells
PALE = 0.3  # opacity of cells that have nothing to do with the followed rank


def movement(before: Rows, after: Rows, title: str, follow: int = 0) -> CourseFigure:
    """Draw the slots of each rank before and after a collective, and how one rank gets its numbers.

    A number keeps the colour of the rank that held it before; a number that no rank held is the sum of a column, and
    grey. An empty slot is outlined. Arrows lead from the ranks that send to the followed one, and its numbers and those
    that it needs stand out.

    Args:
        before: ``before[rank]`` are the slots of that rank; None is an empty slot.
        after: The same after the collective.
        title: The figure's title.
        follow: The rank that the arrows lead to.

    Returns:
        The figure.

    Raises:
        UserError: Rank ``follow`` does not exist, or the numbers of ranks before and after differ.
    """
    if len(before) != len(after) or not 0 <= follow < len(after):
        raise UserError(f"movement: {len(before)} ranks before, {len(after)} after, follow={follow}; give one of them")
    width = max(len(row) for row in (*before, *after))
    shift = width + GAP
    needed = _needed(before, after[follow])
    fig = new_figure(title, width=min(13.0, 1.6 + 0.62 * (2 * width + GAP)), height=1.2 + 0.5 * len(before))
    axes = fig.subplots()
    owners = {value: rank for rank, row in enumerate(before) for value in row if value is not None}
    for rows, left, strong in ((before, 0.0, needed), (after, shift, {(follow, slot) for slot in range(width)})):
        for rank, row in enumerate(rows):
            for slot, value in enumerate(row):
                colour = rank_colour(owners[value]) if value in owners else GREY
                _draw_cell(axes, left + slot, rank, value, colour, (rank, slot) in strong)
    for source in sorted({rank for rank, _ in needed}):
        arrow = FancyArrowPatch(
            (width - 0.42, source), (shift - 0.58, follow), arrowstyle="-|>", mutation_scale=18, linewidth=2.4,
            color=rank_colour(source), shrinkA=0, shrinkB=0,
        )  # fmt: skip
        axes.add_patch(arrow)
    for text, left in (("before", 0.0), ("after", shift)):
        axes.text(left + (width - 1) / 2, -0.6, text, ha="center", va="bottom", fontsize=TEXT_SIZE)
    axes.set_xlim(-0.6, shift + width - 0.4)
    axes.set_ylim(len(before) - 0.45, -1.1)
    axes.set_xticks([])
    axes.set_yticks(range(len(before)), [f"rank {rank}" for rank in range(len(before))], fontsize=SMALL_SIZE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return fig


def _needed(before: Rows, received: Sequence[float | None]) -> set[Cell]:
    """Find the cells that a rank's numbers come from: the cell with the same number, or the column of that sum."""
    places = {value: (rank, slot) for rank, row in enumerate(before) for slot, value in enumerate(row)}
    needed: set[Cell] = set()
    for value in received:
        if value is None:
            continue
        if value in places:
            needed.add(places[value])
            continue
        for column in range(max(map(len, before))):
            cells = {(rank, column): row[column] for rank, row in enumerate(before) if column < len(row)}
            if sum(number or 0 for number in cells.values()) == value:
                needed |= set(cells)
    return needed


def rank_colour(rank: int) -> str:
    """Return the colour of a rank; ranks beyond the palette begin again."""
    return RANK_COLOURS[rank % len(RANK_COLOURS)]


def _draw_cell(axes: Axes, x: float, y: float, value: float | None, colour: str, strong: bool) -> None:
    if value is None:
        axes.barh(y, 0.86, left=x - 0.43, height=0.74, color="none", edgecolor="#BBBBBB", linestyle=":", linewidth=1.2)
        return
    axes.barh(y, 0.92, left=x - 0.46, height=0.8, color=colour, alpha=1.0 if strong else PALE)
    ink = "white" if strong else BLACK
    axes.text(x, y, f"{value:g}", ha="center", va="center", color=ink, fontsize=TEXT_SIZE)


def ring_all_reduce(world_size: int, title: str) -> CourseFigure:
    """Draw the rounds of a ring all-reduce: whose numbers are in each slot of each rank.

    In every round each rank sends one slot to the next rank: the first N - 1 rounds add what arrives (reduce-scatter),
    the last N - 1 replace (all-gather). A slot shows the colours of the ranks that are summed up in it. A black frame
    marks what has just arrived.

    Args:
        world_size: N, the number of ranks; 2 or more.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: There are fewer than 2 ranks.
    """
    if world_size < 2:
        raise UserError(f"ring_all_reduce: {world_size} ranks make no ring; give 2 or more")
    rounds = ring_rounds(world_size)
    fig = new_figure(title, width=13, height=1.5 + 0.3 * world_size)
    axes = fig.subplots()
    step = world_size + GAP
    for number, (slots, arrived) in enumerate(rounds):
        left = number * step
        for rank, row in enumerate(slots):
            for slot, ranks in enumerate(row):
                for place, owner in enumerate(sorted(ranks)):
                    width = 0.84 / len(ranks)
                    corner = (left + slot - 0.42 + place * width, rank - 0.36)
                    axes.add_patch(Rectangle(corner, width, 0.72, facecolor=rank_colour(owner), linewidth=0))
                if (rank, slot) in arrived:
                    frame = (left + slot - 0.45, rank - 0.39)
                    axes.add_patch(Rectangle(frame, 0.9, 0.78, fill=False, edgecolor=BLACK, linewidth=2.4))
        name = f"round {number}" if number else "start"
        axes.text(left + (world_size - 1) / 2, -0.7, name, ha="center", va="bottom", fontsize=SMALL_SIZE)
    for text, first in (("reduce-scatter", 1), ("all-gather", world_size)):
        begin, end = first * step - 0.5, (first + world_size - 2) * step + world_size - 0.5
        axes.plot([begin, end], [world_size - 0.3] * 2, color=BLACK, linewidth=1.5)
        axes.text((begin + end) / 2, world_size - 0.15, text, ha="center", va="top", fontsize=TEXT_SIZE)
    axes.set_xlim(-0.6, len(rounds) * step - GAP - 0.4)
    axes.set_ylim(world_size + 0.6, -1.4)
    axes.set_xticks([])
    axes.set_yticks(range(world_size), [f"rank {rank}" for rank in range(world_size)], fontsize=SMALL_SIZE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return fig


def ring_rounds(world_size: int) -> list[tuple[list[list[frozenset[int]]], set[Cell]]]:
    """Simulate a ring all-reduce of a tensor of ``world_size`` slots.

    Args:
        world_size: The number of ranks.

    Returns:
        At the start and after each round: the ranks whose numbers are summed up in each slot, ``[rank][slot]``, and the
        cells that arrived in this round.
    """
    slots = [[frozenset({rank})] * world_size for rank in range(world_size)]
    rounds: list[tuple[list[list[frozenset[int]]], set[Cell]]] = [([list(row) for row in slots], set())]
    for number in range(2 * (world_size - 1)):
        # The slot that a rank sends is the one that it received in the round before.
        sent = [(rank - number) % world_size for rank in range(world_size)]
        messages = [slots[rank][slot] for rank, slot in enumerate(sent)]
        arrived = set()
        for rank, (slot, message) in enumerate(zip(sent, messages, strict=True)):
            receiver = (rank + 1) % world_size
            slots[receiver][slot] |= message  # the union of a complete sum and a part of it is the complete sum
            arrived.add((receiver, slot))
        rounds.append(([list(row) for row in slots], arrived))
    return rounds
