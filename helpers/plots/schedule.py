"""Draw what each rank did when, on a common clock: overlap, pipeline schedules, waiting; and the order of messages."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RANK_COLOURS,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    ink_on,
    legend_outside,
    new_figure,
)

TIME_UNITS = ((1.0, "seconds"), (1e-3, "milliseconds"), (1e-6, "microseconds"))
CHARACTER_WIDTH = 0.0085  # as a share of the axis
NARROW = 0.004  # as a share of the axis: a white edge would hide such a bar, and look like waiting
PASSES = {"F": "forward", "B": "backward", "I": "backward: input", "W": "backward: weights"}
PASS_COLOURS = {
    "forward": BLUE,
    "backward": VERMILION,
    "backward: input": ORANGE,
    "backward: weights": GREEN,
    "forward, second chunk": "#8FC3E6",
    "backward, second chunk": "#F2B48C",
}

Action = tuple[str, int, int]  # kind ("F", "B", "I" or "W"), stage, micro-batch
Message = tuple[Action, int, int]  # the result that is sent, source, target


class Span(NamedTuple):
    """An interval in which one thing happened.

    Attributes:
        kind: What happened; it determines the colour.
        start: In seconds.
        end: In seconds.
        text: Written in the bar if there is room for it.
    """

    kind: str
    start: float
    end: float
    text: str = ""


def lanes(
    rows: Mapping[str, Sequence[Span]], title: str, colours: Mapping[str, str] | None = None, unit: str | None = None
) -> CourseFigure:
    """Draw one lane of bars per entry, from top to bottom, on a clock that starts with the first span.

    A kind has the same colour in all lanes.

    Args:
        rows: ``{lane: spans}``.
        title: The figure's title.
        colours: ``{kind: colour}``; other kinds get the next colour of the palette.
        unit: Of the axis, if the spans are not in seconds (steps of an ideal schedule, for example).

    Returns:
        The figure.

    Raises:
        UserError: All lanes are empty.
    """
    spans = [span for row in rows.values() for span in row]
    if not spans:
        raise UserError("lanes: there are no spans to draw")
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    size, name = (
        (1.0, unit) if unit else next((s, n) for s, n in TIME_UNITS if end - begin >= s or s == TIME_UNITS[-1][0])
    )
    colours = colours or {}
    others = (colour for colour in RANK_COLOURS if colour not in colours.values())
    kinds = {kind: colours.get(kind) or next(others, GREY) for kind in dict.fromkeys(span.kind for span in spans)}
    fig = new_figure(title, width=13, height=1.5 + 0.52 * len(rows))
    axes = fig.subplots()
    for lane, row in enumerate(rows.values()):
        for span in row:
            width = (span.end - span.start) / size
            left = (span.start - begin) / size
            share = (span.end - span.start) / (end - begin)
            edge = 0.6 if share >= NARROW else 0.0
            axes.barh(lane, width, left=left, height=0.78, color=kinds[span.kind], edgecolor="white", linewidth=edge)
            if span.text and share >= CHARACTER_WIDTH * len(span.text):
                axes.text(
                    left + width / 2, lane, span.text, ha="center", va="center", fontsize=SMALL_SIZE,
                    color=ink_on(kinds[span.kind]),
                )  # fmt: skip
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=SMALL_SIZE)
    axes.set_xlim(0, (end - begin) / size)
    axes.set_xlabel(name, fontsize=TEXT_SIZE)
    axes.tick_params(labelsize=SMALL_SIZE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    legend_outside(fig, [Patch(color=colour, label=kind) for kind, colour in kinds.items()])
    return fig


def cut(spans: Sequence[Span], window: tuple[float, float] | None) -> list[Span]:
    """Keep what happens in a window; cut the spans at its ends.

    Args:
        spans: What happened.
        window: From the first to the second number, in seconds; None keeps everything.

    Returns:
        The spans in the window, in their order.
    """
    begin, end = window or (-math.inf, math.inf)
    return [
        span._replace(start=max(span.start, begin), end=min(span.end, end))
        for span in spans
        if span.start < end and span.end > begin
    ]


def schedule_lanes(
    runs: Mapping[str, Sequence[Sequence[tuple[Action, float, float]]]], title: str, unit: str | None = None
) -> CourseFigure:
    """Draw runs of pipeline schedules, one lane per rank; bars carry the number of the micro-batch.

    Args:
        runs: ``{label: ranks}`` with ``ranks[r]`` the actions of rank r with their start and end. A lane is called
            after its label and rank, and the clock of each run starts with its first action.
        title: The figure's title.
        unit: Of the axis, if times are not in seconds.

    Returns:
        The figure.
    """
    rows = {}
    for label, ranks in runs.items():
        begin = min(start for actions in ranks for _, start, _ in actions)
        for rank, actions in enumerate(ranks):
            rows[f"{label} {rank}"] = [
                Span(_pass(action, len(ranks)), start - begin, end - begin, str(action[2]))
                for action, start, end in actions
            ]
    fig = lanes(rows, title, PASS_COLOURS, unit)
    edges = accumulate(map(len, runs.values()))
    for edge in list(edges)[:-1]:  # between two runs
        fig.axes[0].axhline(edge - 0.5, color=GREY, linewidth=1.2, linestyle=":")
    return fig


def _pass(action: Action, world_size: int) -> str:
    kind, stage, _ = action
    return PASSES[kind] + (", second chunk" if stage >= world_size else "")


def partition_lanes(partitions: Mapping[str, Sequence[range]], head: float, title: str) -> CourseFigure:
    """Draw how long one micro-batch's forward keeps each stage busy, one lane per stage; bars carry the layer's number.

    Args:
        partitions: ``{label: partition}`` with the layer numbers of each stage.
        head: Cost of the output layer, in layers; it belongs to the last stage.
        title: The figure's title.

    Returns:
        The figure.
    """
    rows = {}
    for label, partition in partitions.items():
        for stage, layers in enumerate(partition):
            spans = [Span("layer", place, place + 1, str(number)) for place, number in enumerate(layers)]
            rows[f"{label}, stage {stage}"] = spans
        spans.append(Span("output layer", len(layers), len(layers) + head, "head"))
    return lanes(rows, title, unit="time of one layer")


def message_orders(
    orders: Mapping[str, Sequence[Sequence[Message]]], stuck: Collection[Message], title: str
) -> CourseFigure:
    """Draw in which order each rank starts its messages, one panel per order, with an arrow per message.

    Args:
        orders: ``{name: ranks}`` with ``ranks[r]`` the messages of rank r in its order; each has a source and a target.
        stuck: Messages of the first panel that never happen, drawn dashed.
        title: The figure's title.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=13, height=3.4)
    for number, (axes, (name, ranks)) in enumerate(zip(fig.subplots(1, len(orders)), orders.items(), strict=True)):
        places = {(rank, message): place for rank, order in enumerate(ranks) for place, message in enumerate(order)}
        for (rank, message), place in places.items():
            (kind, _, micro_batch), source, target = message
            colour = PASS_COLOURS[PASSES[kind]]
            label = f"{'send' if rank == source else 'receive'} {kind}{micro_batch}"
            axes.barh(rank, 0.9, left=place - 0.45, height=0.34, color=colour)
            axes.text(place, rank, label, ha="center", va="center", fontsize=SMALL_SIZE, color=ink_on(colour))
            if rank == source:
                down = 0.17 if target > source else -0.17
                waits = number == 0 and message in stuck
                axes.annotate(
                    "", (places[target, message], target - down), (place, source + down),
                    arrowprops={"arrowstyle": "-|>", "color": BLACK, "lw": 2, "ls": "--" if waits else "-"},
                )  # fmt: skip
        axes.set_title(name, fontsize=TEXT_SIZE)
        axes.set_xlim(-0.6, max(map(len, ranks)) - 0.4)
        axes.set_ylim(len(ranks) - 0.7, -0.3)
        axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))], fontsize=SMALL_SIZE)
        axes.set_xticks([])
        axes.set_xlabel("order in which the rank starts them", fontsize=SMALL_SIZE)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return fig
