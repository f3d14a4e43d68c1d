"""The error that a cell shows if a rank fails."""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers.launch.messages import Failed, Location
from helpers.launch.worker import LIBRARIES

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = re.compile("|".join(f"^{re.escape(str(folder) + os.sep)}" for folder in (*LIBRARIES, _ROOT)))


class RankError(RuntimeError):
    """Raised by ``run`` if a rank failed; all ranks have been ended by then.

    Args:
        headline: The first line of the message.
        rank: The rank that failed; None if all ranks together exceeded the time limit.
        type: The name of the exception that the rank raised; None if it raised none.
        details: The following lines, for instance the rank's traceback.
    """

    def __init__(self, headline: str, rank: int | None, type: str | None = None, details: str = "") -> None:
        super().__init__(f"{headline}\n{details}" if details else headline)
        self.rank = rank
        self.type = type

    def _render_traceback_(self) -> list[str]:
        """Show the rank's traceback in IPython, without the launcher's own frames above it."""
        first, *rest = str(self).split("\n")
        return [f"{type(self).__name__}: {first}", *rest]


def exception_error(rank: int, world_size: int, failed: Failed) -> RankError:
    """Describe a rank whose function raised."""
    headline = f"rank {rank} of {world_size} raised {failed.type}; its traceback:"
    return RankError(headline, rank, failed.type, name_cells(failed.traceback).rstrip())


def exit_error(rank: int, world_size: int, exit_code: int) -> RankError:
    """Describe a rank whose process ended without a message; a negative ``exit_code`` is the signal that killed it."""
    if exit_code >= 0:
        return RankError(
            f"rank {rank} of {world_size} ended with status {exit_code} before its function returned", rank
        )
    hint = " (the system does that when its memory runs out)" if -exit_code == signal.SIGKILL else ""
    return RankError(f"rank {rank} of {world_size} was killed by {signal.Signals(-exit_code).name}{hint}", rank)


def timeout_error(seconds: float, locations: Mapping[int, Location | None], finished: Mapping[int, bool]) -> RankError:
    """Describe ranks that did not return in time; the location of a rank that did not answer is None."""
    lines = []
    for rank, location in locations.items():
        if finished[rank]:
            lines.append(f"rank {rank} had returned")
        elif location is None:
            lines.append(f"rank {rank} did not report where it is")
        else:
            state = f"waits in {location.collective}" if location.collective else "is in no collective"
            pending = f"; pending on its GPU: {', '.join(location.pending_on_gpu)}" if location.pending_on_gpu else ""
            lines.append(f"rank {rank} {state}: {name_cells(location.line)}{pending}")
    headline = f"no result after {seconds:g} s (run's timeout), all ranks were ended"
    return RankError(headline, None, details="\n".join(lines))


def name_cells(traceback: str) -> str:
    """Make a traceback readable in a notebook: replace cells' temporary files by "Cell In[n]", shorten other paths."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return traceback

    def label(match: re.Match) -> str:
        cell = shell.compile.format_code_name(match[1])
        return " ".join(cell) if cell else f'File "{_FOLDERS.sub("", match[1])}"'

    return re.sub(r'File "([^"]+)"', label, traceback)
