"""Start the fine-tune as a shell would: torchrun with one process per GPU."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from helpers.hardware import default_nprocs, describe_machine


def _short_path(path: Path | str) -> str:
    """Make an absolute path relative if it is nearby; leave everything else (a name on the Hub) as it is."""
    relative = os.path.relpath(path)
    return relative if Path(path).is_absolute() and relative.count("..") <= 1 else str(path)


def torchrun_command(
    data_dir: Path,
    model_dir: Path | str,
    config: Path,
    deepspeed: Path | None = None,
    *,
    output_dir: Path,
    nprocs: int | None = None,
    resume: bool = False,
) -> list[str]:
    """Build the command that fine-tunes on several ranks of this machine.

    Args:
        data_dir: Folder of the examples.
        model_dir: Folder of the checkpoint, or its name on the Hub.
        config: ``lora.yaml``.
        deepspeed: DeepSpeed JSON; None uses DistributedDataParallel.
        output_dir: Folder for the results.
        nprocs: Number of ranks; None starts one per GPU, or two without a GPU.
        resume: Continue from the newest checkpoint in ``output_dir``.

    Returns:
        The command, as a list of words.
    """
    nprocs = nprocs or default_nprocs(describe_machine())
    job = [_short_path(path) for path in (data_dir, model_dir, config, *([deepspeed] if deepspeed else []))]
    job += ["--output-dir", _short_path(output_dir)]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nprocs}"),
        *("-m", "helpers.finetune.train", *job, *(["--resume"] if resume else [])),
    ]


def format_command(command: list[str]) -> str:
    """Format a command the way you would type it into a shell.

    Args:
        command: A command of :func:`torchrun_command`, or any other.

    Returns:
        One line; ``python -m torch.distributed.run`` becomes ``torchrun``.
    """
    words = ["torchrun" if word == "torch.distributed.run" else word for word in command]
    return shlex.join(words[2:] if words[1:2] == ["-m"] else words)


def run_command(command: list[str]) -> int:
    """Run a command and print its output line by line, in a notebook too.

    Ctrl-C, or interrupting the kernel, asks the command to stop and waits until it has saved a checkpoint. SIGTERM and
    SIGHUP do so as well, and then end this process as they would have without the command.

    Args:
        command: The command, as a list of words.

    Returns:
        Its exit status.
    """
    print(f"$ {format_command(command)}", flush=True)
    # One thread per rank: what torchrun would choose, but without its warning.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        with _passing_signals_to(process):
            return _show_until_end(process)
    finally:  # an error here, such as a closed pipe, must not leave the command behind
        process.terminate()
        process.wait()


def _show_until_end(process: subprocess.Popen[str]) -> int:
    while True:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()


@contextlib.contextmanager
def _passing_signals_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP terminate ``process``; after the block, a signal that came does to us what it always does.

    torchrun passes a signal on to its ranks, and ends after them. Only a main thread may handle signals.
    """
    received: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.terminate()

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    # None is a handler that was not set from Python: it could not be restored. Under nohup, SIGHUP stays ignored.
    kept = {number: signal.getsignal(number) for number in numbers}
    replaced = {number: handler for number, handler in kept.items() if handler not in (None, signal.SIG_IGN)}
    for number in replaced:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if received:
            process.wait()
            signal.raise_signal(received[0])
