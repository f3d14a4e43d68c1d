"""Kernels for the notebooks without their imports: forked from one process that has done them.

A kernel imports torch and the libraries for seconds, and so does the server that its first launch starts: twice for
each notebook. ``WarmKernels`` imports them once and installs a kernel "warm" for Jupyter, whose program (the end of
this file) asks for a fork and stands for it: it passes signals on, and if it is killed, so is the kernel.

Fork and GPUs do not go together, so on a machine with GPUs notebooks get ordinary kernels.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REQUEST_BYTES = 1 << 17
NAME = "warm"


class WarmKernels:
    """The process that kernels are forked from. It ends with :meth:`close`, or with the process that created it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        address = f"{self._folder.name}/socket"
        spec = {
            "argv": [sys.executable, "-I", "-S", __file__, address, "{connection_file}"],
            "display_name": NAME,
            "language": "python",
        }
        kernel = Path(self._folder.name, "kernels", NAME)
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen()  # before the imports: who asks too early waits
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path},
            )

    @property
    def jupyter_path(self) -> str:
        """The folder in which Jupyter finds the kernel."""
        return self._folder.name

    def close(self) -> None:
        """End the process and remove the kernel."""
        self._process.communicate()
        self._folder.cleanup()


# --- in the process that is forked --------------------------------------------------------------------------------


def _import_everything() -> None:
    # First, as in the server of the launches: it holds what a GPU needs, and the libraries in the order that works.
    importlib.import_module("helpers.launch.preload")
    importlib.import_module("ipykernel.kernelapp")
    importlib.import_module("matplotlib.figure")
    import helpers

    for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
        # Kernels for GPUs need Triton, which torch's builds for CPUs lack: a notebook that uses it imports it itself.
        if not module.name.endswith(".__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()


def _start_launch_server() -> None:
    """Start the server that the notebook's ranks are forked from by a fork, too: all it imports is here."""
    from multiprocessing import forkserver, get_context, resource_tracker, util

    def fork(path: bytes, arguments: list[str], descriptors: list[int]) -> int:
        if pid := os.fork():
            return pid
        for descriptor in range(3, 1 + max(map(int, os.listdir("/proc/self/fd")))):
            if descriptor not in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        with contextlib.suppress(SystemExit):
            exec(arguments[-1], {"__name__": "__main__"})
        os._exit(0)

    get_context("forkserver").set_forkserver_preload(["helpers.launch.preload"])
    resource_tracker.ensure_running()
    spawn, util.spawnv_passfds = util.spawnv_passfds, fork
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawn


def _be_kernel(request: dict[str, Any], streams: list[int]) -> None:
    os.setsid()
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # instead of the folder of this file; ipykernel expects it there
    _start_launch_server()
    sys.argv = ["ipykernel_launcher", "-f", request["connection_file"]]
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


def _serve(listener: socket.socket) -> None:
    _import_everything()
    ends, wakes = socket.socketpair()
    ends.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    for source in (listener, ends, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    kernels: dict[Any, int] = {}  # by the connection of the program that stands for it
    while True:
        for source in [key.fileobj for key, _ in selector.select()]:
            if source is sys.stdin:  # who started this process is gone
                for pid in kernels.values():
                    _kill(pid)
                return
            if source is listener:
                connection, _ = listener.accept()
                message, streams, *_ = socket.recv_fds(connection, REQUEST_BYTES, 3)
                if (pid := os.fork()) == 0:
                    try:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for other in (selector, listener, ends, wakes, connection, *kernels):
                            other.close()
                        _be_kernel(json.loads(message), streams)
                    finally:
                        os._exit(1)
                for descriptor in streams:
                    os.close(descriptor)
                connection.send(str(pid).encode())
                selector.register(connection, selectors.EVENT_READ)
                kernels[connection] = pid
            elif source is ends:
                with contextlib.suppress(BlockingIOError):
                    ends.recv(REQUEST_BYTES)
            elif source in kernels:  # the program was killed
                _kill(kernels[source])
        for connection, pid in list(kernels.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
                selector.unregister(connection)
                connection.close()
                del kernels[connection]


def _kill(kernel: int) -> None:
    """Kill a kernel and its server, as Jupyter kills a kernel's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(kernel, signal.SIGKILL)


# --- in the program that stands for a kernel ----------------------------------------------------------------------


def _stand_for_a_kernel(address: str, connection_file: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        request = {"connection_file": connection_file, "cwd": os.getcwd(), "environ": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        pid = int(server.recv(REQUEST_BYTES))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return int(server.recv(REQUEST_BYTES) or 1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        sys.exit(_stand_for_a_kernel(*sys.argv[1:]))
