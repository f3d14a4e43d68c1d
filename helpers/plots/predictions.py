"""Draw predictions: model sizes against GPU memory, and predicted against measured bytes."""

from collections.abc import Mapping

from matplotlib.lines import Line2D

from helpers.errors import UserError
from helpers.memory.units import GIB, unit_for
from helpers.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    SKY,
    SMALL_SIZE,
    TEXT_SIZE,
    VERMILION,
    CourseFigure,
    grid_along_x,
    label_axes,
    legend_outside,
    new_figure,
)


def model_sizes(
    models: Mapping[str, int], capacities: Mapping[str, int], title: str, capacity_label: str = "memory of one GPU"
) -> CourseFigure:
    """Draw what models need against the memory that GPUs have, on a logarithmic axis.

    Each model is a line from its 16-bit weights (2 bytes per parameter) to its model states in training (16 bytes per
    parameter: Rajbhandari et al. 2019, section 3.1).

    Args:
        models: ``{model: parameters}``.
        capacities: ``{label: bytes}``, drawn as vertical lines.
        title: The figure's title.
        capacity_label: The legend's name for the vertical lines.

    Returns:
        The figure.
    """
    fig = new_figure(title, width=13, height=2.5 + 0.5 * len(models))
    axes = fig.subplots()
    for row, parameters in enumerate(models.values()):
        weights, states = 2 * parameters / GIB, 16 * parameters / GIB
        axes.plot([weights, states], [row, row], color=GREY, linewidth=3, zorder=1)
        for size, marker, colour in ((weights, "o", BLUE), (states, "D", GREEN)):
            axes.plot(size, row, marker, color=colour, markersize=11)
        # On white, because a capacity may be drawn through the text.
        axes.annotate(
            f"{states:,.0f} GiB", (states, row), (12, 0), textcoords="offset points", va="center", fontsize=TEXT_SIZE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    for memory in capacities.values():
        axes.axvline(memory / GIB, color=VERMILION, linewidth=1.6, linestyle="--", zorder=0)
    axes.set_xscale("log")
    largest = max(16 * max(models.values()), *capacities.values()) / GIB
    axes.set_xlim(min(min(capacities.values()), 2 * min(models.values())) / GIB / 1.5, 3 * largest)
    axes.set_ylim(len(models) - 0.5, -0.6)
    label_axes(axes, "", "GiB, logarithmic", "")
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(models)), list(models), fontsize=TEXT_SIZE)
    ticks = [tick for tick in (1, 10, 100, 1000, 10_000, 100_000) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    above = axes.secondary_xaxis("top")
    above.set_xticks(
        [memory / GIB for memory in capacities.values()], list(capacities), fontsize=SMALL_SIZE, color=VERMILION
    )
    above.xaxis.minorticks_off()
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)
    handles = [
        Line2D([], [], color=BLUE, marker="o", linestyle="", markersize=9, label="weights in 16 bit"),
        Line2D(
            [], [], color=GREEN, marker="D", linestyle="", markersize=9,
            label="model states in training, 16 bytes per parameter",
        ),
        Line2D([], [], color=VERMILION, marker="", linestyle="--", markersize=9, label=capacity_label),
    ]  # fmt: skip
    legend_outside(fig, handles)
    return fig


def prediction_errors(configurations: Mapping[str, tuple[int, int]], title: str) -> CourseFigure:
    """Draw predicted and measured bytes of many configurations, and next to them the error of the prediction.

    The error is positive, to the right of 0, if the prediction is above the measurement.

    Args:
        configurations: ``{configuration: (predicted bytes, measured bytes)}``.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: ``configurations`` is empty, or a measurement is not above 0.
    """
    if not configurations:
        raise UserError("prediction_errors: there is no configuration to draw")
    for name, (_, measured_bytes) in configurations.items():
        if measured_bytes <= 0:
            raise UserError(f"prediction_errors: {name!r} measured {measured_bytes} bytes; give a number above 0")
    unit = unit_for(size for pair in configurations.values() for size in pair)
    rows = list(range(len(configurations)))
    predicted, measured = zip(*configurations.values(), strict=True)
    errors = [100 * (forecast / actual - 1) for forecast, actual in configurations.values()]
    fig = new_figure(title, width=13, height=2.0 + 0.36 * len(rows))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.barh(rows, [size / unit.size for size in measured], 0.7, color="#BDBDBD", label="measured by NVML")
    left.plot([size / unit.size for size in predicted], rows, "D", color=BLUE, markersize=8, label="predicted")
    left.set_yticks(rows, list(configurations))
    left.set_ylim(len(rows) - 0.4, -0.6)
    right.barh(rows, errors, 0.7, color=[VERMILION if error < 0 else SKY for error in errors])
    right.axvline(0, color=BLACK, linewidth=1.2)
    reach = 1.45 * max(1.0, *map(abs, errors))
    right.set_xlim(-reach, reach)
    for row, error in zip(rows, errors, strict=True):
        right.text(
            error, row, f" {error:+.1f} ", va="center", ha="left" if error >= 0 else "right", fontsize=SMALL_SIZE
        )
    label_axes(left, "Peak of the fullest GPU", f"GPU memory ({unit.name})", "")
    label_axes(right, "Error of the prediction", "percent of what was measured", "")
    for axes in (left, right):
        grid_along_x(axes)
    right.tick_params(axis="y", length=0, labelleft=False)
    legend_outside(fig)
    return fig
