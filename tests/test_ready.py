"""helpers.ready: what each machine is told, from facts that a test makes up, and one look at this machine."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import launch, ready
from helpers.hardware import Gpu, Machine
from helpers.launch import RankError
from helpers.ready import GIB, Facts, judge, ranks_that_fit

ROOT = Path(__file__).resolve().parents[1]
LAPTOP = Machine((), None, 4, 16 * GIB, "Linux x86_64", {}, ("NVML: not available",))
WORKSTATION = replace(LAPTOP, gpus=(Gpu("NVIDIA T4", 15 * GIB, (7, 5)),), driver="580.1", notes=())
GLOO = "two ranks over gloo on the CPU"
GOOD = Facts(
    "Linux",
    "6.8.0-60-generic",
    (3, 12),
    ((3, 11), (3, 14)),
    ("fork", "spawn", "forkserver"),
    8 * GIB,
    50 * GIB,
    {"torch": ("2.13.0", "2.13.0+cpu"), "numpy": ("2.4.6", "2.4.6")},
    LAPTOP,
    10 * GIB,
    {GLOO: 9.0},
)

needs_every_package = pytest.mark.skipif(
    any(found is None for _, found in ready._packages().values()),
    reason="the check starts ranks only if every package of pyproject.toml is installed",
)


def printed(**changes):
    return [str(line) for line in judge(replace(GOOD, **changes))]


def test_a_good_laptop_has_no_problem_and_learns_how_many_ranks_it_can_run():
    lines = printed()
    assert not [line for line in lines if line.startswith("problem")]
    assert any("room for 62 ranks on the CPU" in line and "more than 4 take turns" in line for line in lines)
    assert "ok       2 packages, at the versions of pyproject.toml" in lines  # whatever the build is for


def test_a_gpu_is_named():
    assert "ok       1 GPU(s): NVIDIA T4, driver 580.1" in printed(machine=WORKSTATION)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"python": (3, 9), "packages": {}}, "problem", ["Python 3.9", "3.11 to 3.13", "make PYTHON="]),
        ({"python": (3, 14), "packages": {}}, "problem", ["Python 3.14", "3.11 to 3.13"]),
        ({"system": "Windows", "release": "11", "start_methods": ("spawn",)}, "problem", ["Windows 11", "WSL2"]),
        ({"release": "4.4.0-19041-Microsoft"}, "problem", ["WSL 1", "--set-version"]),
        ({"release": "5.15.90.1-microsoft-standard-WSL2"}, "ok", ["WSL2"]),
        ({"system": "Darwin", "release": "24.1.0", "shared_bytes": None}, "note", ["Darwin", "tested on Linux"]),
        ({"packages": {"peft": ("0.21.2", None)}}, "problem", ["not installed: peft==0.21.2", "pip install"]),
        ({"packages": {"torch": ("2.13.0", "2.11.0")}}, "note", ["torch 2.11.0 instead of 2.13.0", "pip install"]),
        ({"shared_bytes": 0}, "problem", ["/dev/shm", "--shm-size"]),
        ({"shared_bytes": 64 * 2**20}, "note", ["0.1 GiB of shared memory", "--shm-size"]),
        ({"disk_bytes": GIB // 2}, "problem", ["0.5 GiB free", "2 GiB must be free"]),
        ({"free_bytes": 2 * GIB}, "problem", ["2.0 of 16.0 GiB", "2.5 GiB", "close other programs"]),
        ({"free_bytes": 3 * GIB}, "note", ["room for 6 ranks", "chapter 05 starts 8"]),
        ({}, "note", ["no GPU"]),
        ({"launches": {GLOO: "rank 1 of 2 died"}}, "problem", [GLOO, "rank 1 of 2 died", "Containerfile"]),
    ],
)
def test_each_difficulty_has_its_line(changes, kind, words):
    assert [line for line in printed(**changes) if line.startswith(f"{kind} ") and all(word in line for word in words)]


def test_what_could_not_be_checked_is_said():
    assert "not checked" in printed(packages={"torch": ("2.13.0", None)}, machine=None, free_bytes=None)[-1]


def test_little_memory_has_room_for_two_ranks_or_none():
    assert [ranks_that_fit(size) for size in (0, ready.COURSE_BYTES - 1, ready.COURSE_BYTES)] == [0, 0, 2]


@pytest.mark.parametrize("file", ["helpers/ready.py", "helpers/__init__.py", "helpers/libraries/quiet.py"])
def test_an_old_python_can_read_the_check(file):
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_without_its_packages_it_still_answers():
    """``-I -S`` is a Python without any package."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from helpers.ready import main; main()"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "not installed: torch==" in done.stdout and not done.stderr


@needs_every_package
def test_a_launch_that_fails_is_one_line(monkeypatch):
    def fails(*arguments, **options):
        raise RankError("rank 0 of 2 raised RuntimeError; its traceback:", 0, details="line\nRuntimeError: no address")

    monkeypatch.setattr(launch, "run", fails)
    expected = "rank 0 of 2 raised RuntimeError; its traceback: RuntimeError: no address"
    assert ready.look().launches[GLOO] == expected


@needs_every_package
@pytest.mark.slow
def test_this_machine_is_looked_at_and_two_ranks_add_up(capsys):
    assert isinstance(ready.look().launches[GLOO], float)
