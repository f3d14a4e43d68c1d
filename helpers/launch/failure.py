"""What a cell shows when a rank fails."""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers.launch.worker import LIBRARIES, Failed, Whereabouts

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = re.compile("|".join(f"^{re.escape(str(folder) + os.sep)}" for folder in (*LIBRARIES, _ROOT)))


class RankError(RuntimeError):
    """A rank failed; the others were ended.

    ``rank`` is its number, or None where all ranks together exceeded the time limit; ``type`` names the exception
    that it raised, or is None where it raised none. The message has the rank's own traceback in it.
    """

    def __init__(self, headline: str, rank: int | None, type: str | None = None, details: str = "") -> None:
        super().__init__(f"{headline}\n{details}" if details else headline)
        self.rank = rank
        self.type = type

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: the cell shows the rank's traceback, without the launcher's own frames above it."""
        first, *rest = str(self).split("\n")
        return [f"{type(self).__name__}: {first}", *rest]


def raised(rank: int, nprocs: int, failed: Failed) -> RankError:
    """For a rank whose function raised."""
    headline = f"rank {rank} of {nprocs} raised {failed.type}; its traceback:"
    return RankError(headline, rank, failed.type, in_cells(failed.traceback).rstrip())


def died(rank: int, nprocs: int, exit_code: int) -> RankError:
    """For a rank whose process ended without a word."""
    if exit_code >= 0:
        return RankError(f"rank {rank} of {nprocs} ended with status {exit_code} before its function returned", rank)
    hint = " (the system does that when its memory runs out)" if -exit_code == signal.SIGKILL else ""
    return RankError(f"rank {rank} of {nprocs} was killed by {signal.Signals(-exit_code).name}{hint}", rank)


def hung(seconds: float, where: Mapping[int, Whereabouts | None], finished: Mapping[int, bool]) -> RankError:
    """For ranks that had not returned in time; ``where`` has None for a rank that did not answer."""
    lines = []
    for rank, at in where.items():
        if finished[rank]:
            lines.append(f"rank {rank} had returned")
        elif at is None:
            lines.append(f"rank {rank} did not say where it is")
        else:
            doing = f"waits in {at.collective}" if at.collective else "is in no collective"
            pending = f"; not ended on its GPU: {', '.join(at.pending_on_gpu)}" if at.pending_on_gpu else ""
            lines.append(f"rank {rank} {doing}: {in_cells(at.place)}{pending}")
    headline = f"no result after {seconds:g} s (run's timeout), all ranks were ended"
    return RankError(headline, None, details="\n".join(lines))


def in_cells(text: str) -> str:
    """``text`` of a traceback for a notebook: cells by their names, and the folders of installed code left out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return text

    def named(match: re.Match) -> str:
        label = shell.compile.format_code_name(match[1])
        return " ".join(label) if label else f'File "{_FOLDERS.sub("", match[1])}"'

    return re.sub(r'File "([^"]+)"', named, text)
