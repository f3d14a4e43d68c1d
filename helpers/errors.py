"""The one exception that means: the input is wrong, and here is what to do about it."""

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
