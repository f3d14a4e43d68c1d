"""Let learners note a guess before a measurement, and show both in one line after it.

    guessed = guess(gib=None)  # before: replace None by a number
    guessed.compare(peak_bytes / 2**30)  # after: your guess 80 GiB, measured 102 GiB: ...

A guess is optional: None prints no line. No value that a learner writes there stops a notebook.
"""

import math
from dataclasses import dataclass

from helpers.errors import UserError

# What can be guessed: the unit, and what a unit is worth in the number that is written. Shares are shown in percent.
UNITS = {
    "bytes": (" bytes", 1),
    "gib": (" GiB", 1),
    "seconds": (" s", 1),
    "times": (" times", 1),
    "idle": (" %", 100),
    "share": (" %", 100),
}


@dataclass(frozen=True)
class Guess:
    """A number that was noted before its measurement.

    Attributes:
        quantity: A key of ``UNITS``.
        value: In the unit of the quantity, shares between 0 and 1; None if nobody guessed.
    """

    quantity: str
    value: float | None

    def compare(self, measured: float | None) -> None:
        """Print the guess, if any, next to the measurement.

        Args:
            measured: In the unit of the guess; None if this machine cannot measure it.
        """
        if self.value is None:
            return
        if measured is None:
            print(f"your guess {self._text(self.value)}; this machine cannot measure it")
            return
        ratio = f": the guess is {_digits(self.value / measured)} times the measurement" if measured else ""
        print(f"your guess {self._text(self.value)}, measured {self._text(measured)}{ratio}")

    def _text(self, value: float) -> str:
        unit, factor = UNITS[self.quantity]
        return _digits(factor * value) + unit


def guess(**quantity: object) -> Guess:
    """Note a guess.

    If it is not a usable number, print a line about it and go on without a guess.

    Args:
        quantity: One of ``bytes``, ``gib``, ``seconds``, ``times``, ``idle`` and ``share`` with a number of 0 or more,
            or with None for no guess. The last two are shares between 0 and 1.

    Returns:
        The guess, to be compared with the measurement.

    Raises:
        UserError: It is not one of these quantities.
    """
    if len(quantity) != 1 or not quantity.keys() <= UNITS.keys():
        raise UserError(
            f"guess({', '.join(quantity)}) is not known: write one of {', '.join(UNITS)}, as in guess(gib=8)"
        )
    ((name, value),) = quantity.items()
    largest = 1.0 if UNITS[name][1] == 100 else math.inf
    if value is None:
        return Guess(name, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest or value == math.inf:
        limit = "from 0 to 1 (0.3 is 30 %)" if largest == 1 else "of 0 or more"
        print(f"{name}={value!r} is not compared: a guess is a number {limit}")
        return Guess(name, None)
    return Guess(name, float(value))


def _digits(value: float) -> str:
    """Return three significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
