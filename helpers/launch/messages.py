"""What the launcher and a rank send each other.

A rank receives its :class:`RankSetup` when it starts. It sends :class:`Ready`, any number of :class:`ProgressReport`,
then :class:`Done` or :class:`Failed`. The launcher sends two commands: ``REPORT_LOCATION``, which a rank answers with
its :class:`Location`, and ``EXIT``. Timestamps are ``time.time()``: all ranks run on one machine and share its clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.memory.measured import RankMemory

REPORT_LOCATION, EXIT = "report location", "exit"


@dataclass(frozen=True)
class RankSetup:
    """The settings and the pickled function with which a rank starts."""

    rank: int
    world_size: int
    backend: str
    folder: Path  # temporary, shared by the ranks of one run
    environ: Mapping[str, str]
    working_directory: str
    sources: Mapping[str, tuple]  # entries of linecache: the source of notebook cells, which is in no file
    threads: int
    timeout: float  # seconds
    payload: bytes  # the pickled (function, keyword arguments)


@dataclass(frozen=True)
class Ready:
    """The rank has joined the process group and is about to call the function."""

    timestamp: float


@dataclass(frozen=True)
class ProgressReport:
    """The arguments of one call of ``report_progress``."""

    done: int
    total: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """The function returned; ``result`` is pickled."""

    result: bytes
    memory: RankMemory
    timestamp: float


@dataclass(frozen=True)
class Failed:
    """The function raised: the type of its exception, and the traceback from the function on."""

    type: str
    traceback: str
    timestamp: float


@dataclass(frozen=True)
class Location:
    """Where a rank is: the collective it waits in (None if in none), and the user's line that called it."""

    collective: str | None
    line: str
    pending_on_gpu: tuple[str, ...]  # collectives that NCCL has started and not finished
