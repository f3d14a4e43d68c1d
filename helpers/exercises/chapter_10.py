"""Chapter 10: ZeRO-Infinity's own functions, which other modules judge, and what its exercises ask for."""

from helpers.exercises.answers import NotYet, exercise
from helpers.exercises.drive import ahead_by, fetch_and_store, reading_ahead
from helpers.exercises.layers_on_disk import drop_and_load, on_gradient, sharded, tiled

__all__ = [
    "ahead_by",
    "drop_and_load",
    "fast_enough",
    "fetch_and_store",
    "how_many_drives",
    "on_gradient",
    "reading_ahead",
    "sharded",
    "tiled",
]

GPU, DRIVE = 200e12, 5e9  # FLOP/s and bytes per second
INTENSITY = 65_536 / 4  # operations per byte of optimizer states, with 65,536 tokens per step


def _efficiency(drives: int) -> float:
    fed = INTENSITY * drives * DRIVE
    return fed / (fed + GPU)


@exercise
def fast_enough(percent: float) -> None:
    """Judge the efficiency of a GPU of 200 TFLOP/s whose drive moves states at 5 GB/s, with 65,536 tokens per step.

    Args:
        percent: The answer.
    """
    if not abs(percent - 100 * _efficiency(1)) < 0.6:
        too = "high" if percent > 100 * _efficiency(1) else "low"
        raise NotYet(f"too {too}: look up the intensity of optimizer states, and the unit of each number")


@exercise
def how_many_drives(drives: float) -> None:
    """Judge the number of such drives that give 80 %.

    Args:
        drives: The answer.
    """
    if drives != int(drives):
        raise NotYet("there are only whole drives")
    if _efficiency(int(drives)) < 0.8:
        raise NotYet(f"too few: they reach {_efficiency(int(drives)):.0%}")
    if _efficiency(int(drives) - 1) >= 0.8:
        raise NotYet("too many: one drive less is enough, too")
