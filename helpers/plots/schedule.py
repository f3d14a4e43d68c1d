"""What each rank did when, as bars on a common clock: overlap, pipeline schedules, waiting."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.plots.style import GREY, RANK_COLOURS, SMALL_SIZE, TEXT_SIZE, CourseFigure, ink_on, new_figure

UNITS = ((1.0, "seconds"), (1e-3, "milliseconds"), (1e-6, "microseconds"))
CHARACTER = 0.0085  # width of one, as a share of the axis


class Span(NamedTuple):
    """Something of one ``kind``, from ``start`` to ``end`` in seconds; ``text`` stands in its bar where it has room."""

    kind: str
    start: float
    end: float
    text: str = ""


def lanes(
    rows: Mapping[str, Sequence[Span]], title: str, colours: Mapping[str, str] | None = None, unit: str | None = None
) -> CourseFigure:
    """One row of bars for each entry of ``rows``, top to bottom, on one clock that begins with the first span.

    A kind has one colour in all rows: that of ``colours``, or the palette's next. ``unit`` names the axis where time
    is not in seconds (an ideal schedule in steps, say). Raises :class:`UserError` where there is nothing to draw.
    """
    spans = [span for row in rows.values() for span in row]
    if not spans:
        raise UserError("there are no spans to draw")
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    size, name = (1.0, unit) if unit else next((s, n) for s, n in UNITS if end - begin >= s or s == UNITS[-1][0])
    colours = colours or {}
    others = (colour for colour in RANK_COLOURS if colour not in colours.values())
    kinds = {kind: colours.get(kind) or next(others, GREY) for kind in dict.fromkeys(span.kind for span in spans)}
    fig = new_figure(title, width=13, height=1.5 + 0.52 * len(rows))
    axes = fig.subplots()
    for place, row in enumerate(rows.values()):
        for span in row:
            width = (span.end - span.start) / size
            left = (span.start - begin) / size
            axes.barh(place, width, left=left, height=0.78, color=kinds[span.kind], edgecolor="white", linewidth=0.6)
            if span.text and (span.end - span.start) / (end - begin) >= CHARACTER * len(span.text):
                axes.text(
                    left + width / 2, place, span.text, ha="center", va="center", fontsize=SMALL_SIZE,
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
