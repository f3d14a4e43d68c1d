"""How a command ends: one line and a status, and no traceback when its reader has gone."""

import os
import subprocess
import sys

import pytest

PRINT = "from helpers.errors import exit_with_one_line; exit_with_one_line(lambda: print('line\\n' * {}))"
COMMANDS = {
    "more than a pipe holds": PRINT.format(100_000),
    "less than the buffer": PRINT.format(1),
    "predict": "import runpy; runpy.run_module('helpers.memory.predict', run_name='__main__', alter_sys=True)",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_stops_reading_ends_a_command_without_a_word(command):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does after its lines
    process = subprocess.Popen([sys.executable, "-c", command], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (141, b"")


@pytest.mark.slow
def test_a_closed_stdout_is_no_error():
    command = [sys.executable, "-c", COMMANDS["less than the buffer"]]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
