"""Draw measured rates below the roof that computation and memory set."""

from collections.abc import Mapping

from matplotlib.ticker import LogLocator, NullFormatter

from helpers.errors import UserError
from helpers.plots.style import BLACK, BLUE, GREEN, VERMILION, CourseFigure, label_axes, legend_below, new_figure


def roofline(rates: Mapping[float, float], peak: float, bandwidth: float, title: str) -> CourseFigure:
    """Draw rates over arithmetic intensity, below the roof min(peak, bandwidth x intensity) (Williams et al. 2009).

    Args:
        rates: ``{FLOP per byte: FLOP per second}``.
        peak: FLOP per second that the device can compute at most: the flat part of the roof.
        bandwidth: Bytes per second between memory and the processor: the slope.
        title: The figure's title.

    Returns:
        The figure.

    Raises:
        UserError: No rates are given, or a number is not above 0.
    """
    if not rates or min(*rates, *rates.values(), peak, bandwidth) <= 0:
        raise UserError("roofline: give at least one rate, and only numbers above 0")
    fig = new_figure(title, width=9, height=4.8)
    axes = fig.subplots()
    ridge = peak / bandwidth
    begin, end = min(*rates, ridge) / 2, max(*rates, ridge) * 2
    axes.plot([begin, ridge], [bandwidth * begin / 1e12, peak / 1e12], color=GREEN, linewidth=3, label="memory bound")
    axes.plot([ridge, end], [peak / 1e12] * 2, color=VERMILION, linewidth=3, label="compute bound")
    axes.plot([ridge] * 2, [0, peak / 1e12], ":", color=BLACK, linewidth=1.2)
    intensities = sorted(rates)
    measured = [rates[intensity] / 1e12 for intensity in intensities]
    axes.plot(intensities, measured, "o", color=BLUE, markersize=9, label="measured matmul")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(begin, end)
    axes.set_ylim(min(bandwidth * begin / 1e12, *measured) / 1.5, 2 * max(peak / 1e12, *measured))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1,), numticks=8))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    label_axes(axes, "", "arithmetic intensity (FLOP per byte)", "TFLOP/s")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    legend_below(axes)
    return fig
