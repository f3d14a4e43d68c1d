"""Write each failure with its traceback to a file when it happens, also if pytest is killed later.

``pytest -p failures_at_once``; the environment variable FAILURES names the file.
"""

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a failure; of pytest-xdist's processes the first one does, which also knows of a worker that crashed."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["FAILURES"], "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"=== {report.nodeid} ({report.when})\n{report.capstdout}{report.capstderr}\n")
            file.write(f"{report.longreprtext}\n")
