"""Draw what ranks send each other."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from helpers.memory.units import unit_for
from helpers.plots.schedule import Span, cut, lanes
from helpers.plots.style import (
    BLACK,
    BLUE,
    GREY,
    PURPLE,
    RANK_COLOURS,
    SKY,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    label_axes,
    new_figure,
)

# A backward pass has the colour that it has in pipeline schedules, a message that of communication buffers.
TRACE_COLOURS = {
    "matmuls and attention": BLUE,
    "other kernels": SKY,
    "copies": GREY,
    "communication": PURPLE,
}
OVERLAP_COLOURS = {"backward": VERMILION, "waits": "#D9D9D9", "all-reduce": PURPLE}


def collective(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], title: str) -> CourseFigure:
    """Draw the numbers that each rank holds before and after a collective, one row per rank.

    A number keeps the colour of the rank that held it before. A number that no rank held before was computed by the
    collective, and is grey. NaN is an empty place: memory that the rank does not hold. Ranks may hold different
    amounts, or nothing.

    Args:
        before: ``before[rank]`` are the numbers of that rank.
        after: The same after the collective.
        title: The figure's title.

    Returns:
        The figure.
    """
    return collective_rounds({"before": before, "after": after}, title)


def collective_rounds(
    rounds: Mapping[str, Sequence[Sequence[float]]], title: str, finished: Collection[float] = ()
) -> CourseFigure:
    """Draw the numbers that each rank holds at several times, one panel per time, as :func:`collective` does.

    Args:
        rounds: ``{time: rows}`` with ``rows[rank]`` the numbers of that rank; the first time determines the colours.
        title: The figure's title.
        finished: Numbers to draw in black, because they are what the collective is for.

    Returns:
        The figure.
    """
    first = next(iter(rounds.values()))
    colours = {value: RANK_COLOURS[rank % len(RANK_COLOURS)] for rank, row in enumerate(first) for value in row}
    colours |= dict.fromkeys(finished, BLACK)
    width = max(len(row) for rows in rounds.values() for row in rows)
    fig = new_figure(title, width=min(13.0, 3.4 + 0.75 * width * len(rounds)), height=1.1 + 0.62 * len(first))
    for axes, (when, rows) in zip(fig.subplots(1, len(rounds)), rounds.items(), strict=True):
        for rank, row in enumerate(rows):
            for column, value in enumerate(row):
                if math.isnan(value):
                    axes.barh(rank, 0.92, left=column - 0.46, height=0.8, color="none", edgecolor=GREY, linestyle=":")
                    continue
                weight = "bold" if value in finished else "normal"
                axes.barh(rank, 0.92, left=column - 0.46, height=0.8, color=colours.get(value, GREY))
                axes.text(
                    column, rank, f"{value:g}", ha="center", va="center", color="white", fontsize=TEXT_SIZE,
                    fontweight=weight,
                )  # fmt: skip
        axes.set_title(when, fontsize=TEXT_SIZE)
        axes.set_xlim(-0.6, width - 0.4)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xticks([])
        axes.set_yticks(range(len(rows)), [f"rank {rank}" for rank in range(len(rows))], fontsize=SMALL_SIZE)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return fig


def overlap(steps: Mapping[str, tuple[float, float, Sequence[tuple[float, float]]]], title: str) -> CourseFigure:
    """Draw backward passes and the all-reduces of their gradients: one lane for the device and one for its link.

    Args:
        steps: ``{name: (end of the computation, end of the step, [(begin, end) of each message])}`` in seconds since
            backward began. The device waits from the end of its computation to the end of the step.
        title: The figure's title.

    Returns:
        The figure.
    """
    rows = {}
    for name, (computed, done, messages) in steps.items():
        rows[f"{name}, computes"] = [Span("backward", 0.0, computed), Span("waits", computed, done)]
        rows[f"{name}, sends"] = [Span("all-reduce", *times, str(number)) for number, times in enumerate(messages)]
    return lanes(rows, title, OVERLAP_COLOURS)


def trace_lanes(
    traces: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]],
    title: str,
    window: tuple[float, float] | None = None,
) -> CourseFigure:
    """Draw what ranks computed and sent in a recorded step, one lane per stream or thread.

    Args:
        traces: ``{name: {lane: [(kind, begin, end)]}}`` in seconds since the step began
            (:class:`helpers.parallel.trace.StepTrace`).
        title: The figure's title.
        window: Draw only the time from the first to the second number, in seconds; cuts spans at its ends.

    Returns:
        The figure.
    """
    rows = {
        f"{name}, {lane}": cut([Span(*span) for span in spans], window)
        for name, trace in traces.items()
        for lane, spans in trace.items()
    }
    return lanes(rows, title, TRACE_COLOURS)


def transfer_times(
    seconds: Mapping[str, Mapping[int, float]],
    title: str,
    bends: Mapping[str, float] | None = None,
    x_label: str = "size of the tensor on each rank",
) -> CourseFigure:
    """Draw the time of collectives or copies over their size, with both axes logarithmic.

    Args:
        seconds: ``{collective: {bytes of the tensor on each rank: seconds}}``.
        title: The figure's title.
        bends: ``{collective: bytes}`` at which its curve bends, to mark; not drawn outside of the measured sizes.
        x_label: Label of the axis: what has the size.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=10, height=4.8)
    axes = fig.subplots()
    for number, ((name, curve), colour, marker) in enumerate(
        zip(seconds.items(), RANK_COLOURS, "os^Dv<>X", strict=False)
    ):
        sizes = sorted(curve)
        milliseconds = [1e3 * curve[size] for size in sizes]
        later = len(seconds) - 1 - number  # curves may coincide: earlier ones are wider, so that each stays visible
        axes.plot(
            sizes, milliseconds, f"{marker}-", color=colour, linewidth=1.8 + 0.9 * later, markersize=7 + 1.5 * later,
            label=name,
        )  # fmt: skip
        bend = (bends or {}).get(name)
        if bend and sizes[0] <= bend <= sizes[-1]:
            height = np.exp(np.interp(np.log(bend), np.log(sizes), np.log(milliseconds)))
            axes.plot(bend, height, "o", color=colour, markersize=17, markerfacecolor="none", markeredgewidth=2.2)
    if bends:
        axes.plot([], [], "o", color=GREY, markersize=13, markerfacecolor="none", markeredgewidth=2.2, label="bend")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = sorted({size for curve in seconds.values() for size in curve})
    labels = [f"{unit_for([size]).amount(size).removesuffix('.00')} {unit_for([size]).name}" for size in ticks]
    axes.set_xticks(ticks, labels, fontsize=SMALL_SIZE)
    axes.xaxis.minorticks_off()
    label_axes(axes, "", x_label, "milliseconds")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.legend(fontsize=SMALL_SIZE, frameon=False)
    return fig
