"""Draw what a layer saves for backward, and what it costs to save less."""

from collections.abc import Mapping

from matplotlib.patches import Patch

from helpers.errors import UserError
from helpers.plots.style import (
    GREY,
    RANK_COLOURS,
    SMALL_SIZE,
    TEXT_SIZE,
    CourseFigure,
    ink_on,
    label_axes,
    legend_outside,
    new_figure,
    paler,
)

CHARACTER_WIDTH = 0.0098  # as a share of the longest bar


def saved_tensor_bars(bars: Mapping[str, Mapping[str, float]], title: str, x_label: str) -> CourseFigure:
    """Draw stacked bars of named parts; a part shows its name if it is wide enough.

    A part has the same colour in all bars. A legend names the parts that are too narrow in every bar.

    Args:
        bars: ``{bar: {part: amount}}``.
        title: The figure's title.
        x_label: What the amounts are, with their unit.

    Returns:
        The figure.

    Raises:
        UserError: All bars are empty, or a part is negative.
    """
    if not any(bars.values()):
        raise UserError("saved_tensor_bars: there are no parts to draw; give at least one bar with one part")
    longest = max(sum(parts.values()) for parts in bars.values())
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    # After the six colours of the palette come the same six, paler.
    colours = {name: paler(RANK_COLOURS[n % 6], 0.45 * min(n // 6, 2)) for n, name in enumerate(names)}
    fig = new_figure(title, width=13, height=2.0 + 1.0 * len(bars))
    axes = fig.subplots()
    labelled: set[str] = set()
    for row, parts in enumerate(bars.values()):
        left = 0.0
        for name, amount in parts.items():
            if amount < 0:
                raise UserError(f"saved_tensor_bars: {name!r} is {amount}; give amounts of 0 or more")
            axes.barh(row, amount, left=left, height=0.66, color=colours[name], edgecolor="white", linewidth=0.8)
            room = amount / longest / CHARACTER_WIDTH - 0.5  # characters, and a margin
            lines = [name] if len(name) <= room else name.split(" ")
            if max(map(len, lines)) <= room:
                labelled.add(name)
                axes.text(
                    left + amount / 2, row, "\n".join(lines), ha="center", va="center", fontsize=SMALL_SIZE,
                    color=ink_on(colours[name]),
                )  # fmt: skip
            left += amount
        axes.text(left, row, f" {left:,.0f}", va="center", fontsize=TEXT_SIZE)
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlim(0, 1.1 * longest)
    label_axes(axes, "", x_label, "")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelsize=TEXT_SIZE, length=0)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items() if name not in labelled]
    if handles:
        legend_outside(fig, handles)
    return fig


def trade_off(points: Mapping[str, tuple[float, float]], title: str, x_label: str, y_label: str) -> CourseFigure:
    """Draw alternatives as named points: what each costs against what it needs.

    Both axes start at 0, so that distances are proportional. A point is hollow if another one is at least as good on
    both axes.

    Args:
        points: ``{name: (x, y)}``.
        title: The figure's title.
        x_label: Label of the axis, with its unit.
        y_label: Label of the axis, with its unit.

    Returns:
        The figure.

    Raises:
        UserError: ``points`` is empty.
    """
    if not points:
        raise UserError("trade_off: there are no points to draw")
    fig = new_figure(title, width=10, height=5)
    axes = fig.subplots()
    axes.set_xlim(0, 1.12 * max(x for x, _ in points.values()))
    axes.set_ylim(0, 1.15 * max(y for _, y in points.values()))
    beaten = {
        name
        for name, (x, y) in points.items()
        if any(other != (x, y) and other[0] <= x and other[1] <= y for other in points.values())
    }
    for (name, (x, y)), colour, marker in zip(points.items(), RANK_COLOURS, "os^Dv<>X", strict=False):
        face = "none" if name in beaten else colour
        axes.plot(x, y, marker, color=colour, markerfacecolor=face, markeredgewidth=2, markersize=13, label=name)
    if beaten:
        axes.plot([], [], "o", color=GREY, markerfacecolor="none", markersize=13, label="hollow: beaten on both axes")
    label_axes(axes, "", x_label, y_label)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    fig.legend(loc="outside right center", fontsize=SMALL_SIZE, frameon=False)
    return fig
