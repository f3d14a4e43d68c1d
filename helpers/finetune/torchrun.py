"""Start the fine-tune as a shell would: one torchrun, one process per GPU."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from helpers.hardware import default_nprocs, describe_machine


def _short(path: Path | str) -> str:
    """A path as one would type it here; what is far away, or no path (a name on the hub), stays as it is."""
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
    """The command that fine-tunes on ``nprocs`` ranks; by default one per GPU, two on a CPU."""
    nprocs = nprocs or default_nprocs(describe_machine())
    job = [_short(path) for path in (data_dir, model_dir, config, *([deepspeed] if deepspeed else []))]
    job += ["--output-dir", _short(output_dir)]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nprocs}"),
        *("-m", "helpers.finetune.train", *job, *(["--resume"] if resume else [])),
    ]


def as_typed(command: list[str]) -> str:
    """A command of :func:`torchrun_command` (or any other) as one would type it into a shell."""
    words = ["torchrun" if word == "torch.distributed.run" else word for word in command]
    return shlex.join(words[2:] if words[1:2] == ["-m"] else words)


def run_command(command: list[str]) -> int:
    """Run ``command``, print its lines as they come (in a notebook too), return its exit status.

    A Ctrl-C or a kernel interrupt is passed on, and the command gets the time to save a checkpoint.
    """
    print(f"$ {as_typed(command)}", flush=True)
    # One thread a rank, as torchrun would choose, but without its warning.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    while True:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
