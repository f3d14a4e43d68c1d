"""Draw what each rank did when, on a common clock: overlap, pipeline schedules, waiting."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.plots.style import GREY, RANK_COLOURS, SMALL_SIZE, TEXT_SIZE, CourseFigure, ink_on, new_figure

TIME_UNITS = ((1.0, "seconds"), (1e-3, "milliseconds"), (1e-6, "microseconds"))
CHARACTER_WIDTH = 0.0085  # as a share of the axis


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
            axes.barh(lane, width, left=left, height=0.78, color=kinds[span.kind], edgecolor="white", linewidth=0.6)
            if span.text and (span.end - span.start) / (end - begin) >= CHARACTER_WIDTH * len(span.text):
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
    handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(kinds)), fontsize=SMALL_SIZE, frameon=False
    )
    return fig
