"""Report bad input as one line with the remedy, and end a command with one exit status."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable

CLOSED_PIPE = 128 + signal.SIGPIPE  # exit status


class UserError(Exception):
    """Bad input: the message is one line that names the value, its place and the remedy."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's ``main``; turn a :class:`UserError` into one line on stderr and exit status 2.

    A reader that stops reading (``| head``) ends the command without a word, with the status of a shell's SIGPIPE.
    """
    allow_any_text()
    try:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        finally:  # after --help as well: when Python flushes at its end, nothing can catch the error
            print(end="", flush=True)
    except BrokenPipeError:
        discard_output()
        sys.exit(CLOSED_PIPE)


def allow_any_text() -> None:
    """Print what the terminal's encoding has no character for (a path, an answer) as ``\\u4e0d`` instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stderr is like this from the start


def discard_output() -> None:
    """Send to nowhere what is left in stdout's buffer, and all later output: nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive_int(text: str) -> int:
    """Parse an integer above 0; to be used as ``type`` of an argparse argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
