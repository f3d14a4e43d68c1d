"""What a cell shows when a rank fails."""

import os
import re
import signal
import sys
from collections.abc import Mapping

from helpers.launch.worker import Failed, Whereabouts


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
        return [
            f"{type(self).__name__}: {line}" if not number else line
            for number, line in enumerate(str(self).split("\n"))
        ]


def raised(rank: int, nprocs: int, failed: Failed) -> RankError:
    """For a rank whose function raised."""
    headline = f"rank {rank} of {nprocs} raised {failed.type}; its traceback:"
    return RankError(headline, rank, failed.type, in_cells(failed.traceback).rstrip())


def died(rank: int, nprocs: int, exit_code: int) -> RankError:
    """For a rank whose process ended without a word."""
    if exit_code >= 0:
        return RankError(
            f"rank {rank} of {nprocs} ended with exit status {exit_code} before its function returned", rank
        )
    hint = " (the system does that when its memory runs out)" if -exit_code == signal.SIGKILL else ""
    return RankError(f"rank {rank} of {nprocs} was killed by {signal.Signals(-exit_code).name}{hint}", rank)


def hung(seconds: float, where: Mapping[int, Whereabouts | None], finished: Mapping[int, bool]) -> RankError:
    """For ranks that had not returned in time; ``where`` has None for a rank that did not answer."""
    lines = []
    for rank, whereabouts in where.items():
        if finished[rank]:
            lines.append(f"rank {rank} had returned")
        elif whereabouts is None:
            lines.append(f"rank {rank} did not say where it is")
        else:
            doing = f"waits in {whereabouts.collective}" if whereabouts.collective else "is in no collective"
            pending = (
                f"; not ended on its GPU: {', '.join(whereabouts.pending_on_gpu)}" if whereabouts.pending_on_gpu else ""
            )
            lines.append(f"rank {rank} {doing}: {in_cells(whereabouts.place)}{pending}")
    return RankError(
        f"no result after {seconds:g} s (run's timeout), all ranks were ended", None, None, "\n".join(lines)
    )


def in_cells(text: str) -> str:
    """``text`` of a traceback with the names that a notebook gives its cells in place of their temporary files."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return text

    def named(match: re.Match) -> str:
        label = shell.compile.format_code_name(match[1])
        return " ".join(label) if label else match[0].replace(os.getcwd() + os.sep, "")

    return re.sub(r'File "([^"]+)"', named, text)
