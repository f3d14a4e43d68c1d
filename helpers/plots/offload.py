"""Draw when device, bus and host work in a step whose optimizer runs in host memory."""

from collections.abc import Sequence

from helpers.errors import UserError
from helpers.plots.schedule import Span, cut, lanes
from helpers.plots.style import BLUE, GREEN, ORANGE, SKY, VERMILION, CourseFigure

LANES = ("device", "bus", "host")
# Passes have the colours that they have in pipeline schedules; gradients and Adam those of their memory.
KIND_COLOURS = {
    "forward": BLUE,
    "backward": VERMILION,
    "gradients down": ORANGE,
    "values up": SKY,
    "Adam": GREEN,
}
Work = tuple[str, Span]


def offload_lanes(work: Sequence[Work], title: str, window: tuple[float, float] | None = None) -> CourseFigure:
    """Draw one lane for the device's processors, one for the bus and one for the host's processor.

    Args:
        work: (lane, span) of everything that was timed; the lanes are those of ``LANES``.
        title: The figure's title.
        window: Draw only the time from the first to the second number, in seconds; cuts spans at its ends.

    Returns:
        The figure.

    Raises:
        UserError: Nothing happens in the window, or a lane is unknown.
    """
    unknown = {lane for lane, _ in work} - set(LANES)
    if unknown:
        raise UserError(f"offload_lanes: there is no lane {', '.join(sorted(unknown))}; use {', '.join(LANES)}")
    rows = {lane: cut([span for own, span in work if own == lane], window) for lane in LANES}
    return lanes(rows, title, KIND_COLOURS)
