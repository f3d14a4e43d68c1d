"""The container file: its versions are the project's, it copies the course and nothing else, and it runs as a user."""

import re
from pathlib import Path

from helpers import ready

ROOT = Path(__file__).resolve().parents[1]
LINES = [
    line
    for line in (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]


def test_its_python_is_supported_and_all_packages_come_from_pyproject():
    version = re.fullmatch(r"FROM \S+/python:3\.(\d+)-slim", LINES[0])
    first, beyond = ready.supported_pythons()
    assert first <= (3, int(version[1])) < beyond
    assert not [line for line in LINES if "==" in line or "pip install" in line]
    assert "make .venv/installed" in LINES[-4]


def test_a_user_without_rights_installs_and_runs():
    user = LINES.index("USER learner")
    assert not [line for line in LINES[user:] if "apt-get" in line or line.startswith("USER root")]
    assert LINES[-1] == 'CMD ["make", "lab"]' and "$(LAB_OPTIONS)" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_what_git_ignores_stays_out():
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    assert {".git", ".venv", "output", "notebooks/practice"} <= ignored
