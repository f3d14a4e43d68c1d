"""Ranks without the ten seconds of imports that each of them would need: forked from a process that has done them.

``RankServer`` does for its ranks what torchrun does: it gives them a rank, a store to meet at, and ends all of them
when one fails. Each rank is a process of its own, with its own output, environment and limits. Tests of what torchrun
itself does (signals, many ranks and one message) start torchrun.
"""

import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
# What this process finds, another Python must find too: packages may be on the PYTHONPATH only.
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
REQUEST_BYTES = 1 << 16


class RankServer:
    """A context: the process that ranks are forked from, on the CPU and with one thread per rank.

    Args:
        limit: seconds after which a run counts as hung.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __enter__(self) -> "RankServer":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        return self

    def __exit__(self, *_: object) -> None:
        # Not only closed: a process that was forked from this one may hold the socket, too.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.wait()

    def run(
        self,
        script: Path,
        *arguments: object,
        nprocs: int | None = None,
        file_bytes: int | None = None,
    ) -> subprocess.CompletedProcess:
        """Run a Python file on ``nprocs`` ranks, as ``torchrun --nproc_per_node`` would.

        Args:
            script: the file.
            arguments: its command line.
            nprocs: how many ranks; None for one process without torchrun.
            file_bytes: no file that a rank writes can grow beyond this, as if the disk were full.

        Returns:
            What the ranks printed, and 0, or the status of the first rank that failed.

        Raises:
            subprocess.TimeoutExpired: after ``limit`` seconds; the server and all ranks are killed.
        """
        # The ranks are clients of this store, as of torchrun's. The system chooses the port.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        request = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "nprocs": nprocs,
            "port": store.port,
            "file_bytes": file_bytes,
            "cwd": os.getcwd(),
        }
        pipes = [os.pipe() for _ in ("stdout", "stderr")]
        socket.send_fds(self._socket, [json.dumps(request).encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        with ThreadPoolExecutor(len(pipes)) as pool:
            printed = [pool.submit(_read, read) for read, _ in pipes]
            try:
                self._socket.settimeout(self.limit)
                status = int(self._socket.recv(REQUEST_BYTES) or b"-9")
            except TimeoutError:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired([str(script), *request["arguments"]], self.limit) from None
        stdout, stderr = (future.result() for future in printed)
        return subprocess.CompletedProcess([str(script), *request["arguments"]], status, stdout, stderr)


def _read(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8") as pipe:
        return pipe.read()


# --- in the server ------------------------------------------------------------------------------------------------


def _be_rank(rank: int, request: dict[str, Any], output: list[int]) -> int:
    """What a forked rank does; its exit status."""
    for stream, descriptor in zip((1, 2), output, strict=True):
        os.dup2(descriptor, stream)
    # The server's own may be a file, whose objects remember that they can seek.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    os.chdir(request["cwd"])
    if request["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if nprocs := request["nprocs"]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(nprocs), "LOCAL_WORLD_SIZE": str(nprocs)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    sys.argv = [request["script"], *request["arguments"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve(connection: socket.socket) -> None:
    from helpers.libraries.quiet import quiet_libraries

    quiet_libraries()
    import deepspeed  # noqa: F401

    import helpers.finetune.train  # noqa: F401

    while True:
        message, output, *_ = socket.recv_fds(connection, REQUEST_BYTES, 2)
        if not message:
            return
        request = json.loads(message)
        ranks = []
        for rank in range(request["nprocs"] or 1):
            if (pid := os.fork()) == 0:
                connection.close()
                status = _be_rank(rank, request, output)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            ranks.append(pid)
        for descriptor in output:
            os.close(descriptor)
        failed = 0
        while ranks:
            pid, state = os.wait()
            ranks.remove(pid)
            if (status := os.waitstatus_to_exitcode(state)) and not failed:
                failed = status
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        connection.send(str(failed).encode())


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
