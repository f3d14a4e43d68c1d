"""``run.json``: its encoding, and how it tells a failure."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_server import PYTHONPATH
from small_finetune import ONE_RANK

from helpers.finetune.run_folder import RunFile

WRITE = """
import sys
from pathlib import Path
from small_finetune import ONE_RANK
from helpers.finetune.run_folder import RunFile

RunFile(Path(sys.argv[1]), ONE_RANK, {"folder": "\\u8f93\\u51fa"}).update()
"""


def test_a_path_that_is_no_utf_8_is_written(tmp_path):
    folder = os.fsdecode("输出".encode("gbk"))
    RunFile(tmp_path / "run.json", ONE_RANK, {"folder": folder}).update()
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["folder"] == folder


def test_the_rank_that_fails_first_writes_the_reason(tmp_path):
    content = {"status": "running", "step": 3}
    first, second = (
        RunFile(tmp_path / "run.json", dataclasses.replace(ONE_RANK, rank=rank, world_size=2), dict(content))
        for rank in (0, 1)
    )
    first.update()
    second.update(status="never written: rank 0 does that")
    second.fail(ValueError("the cause"))
    first.fail(RuntimeError("connection closed by peer"))
    written = json.loads((tmp_path / "run.json").read_text())
    assert written == {"status": "failed", "step": 3, "error": "ValueError: the cause"}


@pytest.mark.slow
def test_the_file_is_utf_8_whatever_the_locale(tmp_path):
    path = tmp_path / "run.json"
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    environment["PYTHONPATH"] = os.pathsep.join([PYTHONPATH, str(Path(__file__).parent)])
    subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, env=environment)
    assert json.loads(path.read_bytes().decode("utf-8")) == {"folder": "输出"}
