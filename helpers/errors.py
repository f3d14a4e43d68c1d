"""What commands do about wrong input: one exception with the remedy in it, one line, one exit status."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that names the value, the place and the remedy."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command-line ``main``; a :class:`UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def positive(text: str) -> int:
    """A whole number above 0, as a ``type`` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
