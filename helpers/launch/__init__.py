"""Run a function of a notebook cell on N ranks: see :func:`run`."""

from helpers.launch.environment import environment
from helpers.launch.failure import RankError
from helpers.launch.launcher import RunResult, run
from helpers.launch.processes import Progress
from helpers.launch.worker import device, report_progress

__all__ = ["Progress", "RankError", "RunResult", "device", "environment", "report_progress", "run"]
