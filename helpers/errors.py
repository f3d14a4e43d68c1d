"""Report bad input as one line with the remedy, and end a command with one exit status."""

import argparse
import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message is one line that names the value, its place and the remedy."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's ``main``; turn a :class:`UserError` into one line on stderr and exit status 2.

    A reader that stops reading (``| head``) ends the command without a word, with the status of a shell's SIGPIPE.
    """
    try:
        main()
        print(end="", flush=True)  # here, and not when Python ends, where nothing can catch the error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Python flushes stdout once more at its end; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def positive_int(text: str) -> int:
    """Parse an integer above 0; to be used as ``type`` of an argparse argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
