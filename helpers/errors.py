"""Report bad input as one line with the remedy, and end a command with one exit status."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message is one line that names the value, its place and the remedy."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's ``main``; turn a :class:`UserError` into one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def positive_int(text: str) -> int:
    """Parse an integer above 0; to be used as ``type`` of an argparse argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
