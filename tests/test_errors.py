"""How a command ends: one line and a status, and no traceback when its reader has gone."""

import os
import subprocess
import sys

import pytest

IMPORT = "import runpy, sys; from helpers.errors import UserError, exit_with_one_line as run; "
MODULE = "runpy.run_module('helpers.memory.predict', run_name='__main__')"
COMMANDS = {
    "more than a pipe holds": IMPORT + "run(lambda: print('line\\n' * 100_000))",
    "less than the buffer": IMPORT + "run(lambda: print('line'))",
    "an error": IMPORT + "run(lambda: (print('line'), (_ for _ in ()).throw(UserError('wrong'))))",
    "predict": IMPORT + MODULE,
    "train": (
        "import runpy, sys; from helpers.finetune import train; "
        "train._run = lambda *_: print('line', flush=True); train.main(['D', 'M', 'C'])"
    ),
    "predict --help": IMPORT + "sys.argv.append('--help'); " + MODULE,
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_stops_reading_ends_a_command_without_a_word(command):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does after its lines
    process = subprocess.Popen([sys.executable, "-c", command], stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(writing)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (141, b"error: wrong\n" if "wrong" in command else b"")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
@pytest.mark.parametrize("command", ["run(lambda: print(TEXT))", "train(['D', 'M', 'C'])"])
def test_text_that_the_terminal_cannot_show_is_no_error(command, encoding):
    text = "输出/裙👗\udcff"  # an emoji is not in GBK, a byte of a path that is no UTF-8 is in none
    code = f"TEXT = {text!r}; {IMPORT}"
    if "train" in command:
        code += "from helpers.finetune import train as t; t._run = lambda *_: print(TEXT, flush=True); train = t.main; "
    done = subprocess.run(
        [sys.executable, "-c", code + command], capture_output=True, env=ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == text.encode(encoding, errors="backslashreplace") + b"\n"


@pytest.mark.slow
def test_a_closed_stdout_is_no_error():
    command = [sys.executable, "-c", COMMANDS["less than the buffer"]]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
