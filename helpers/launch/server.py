"""Start the server that ranks are forked from.

Three ways to start a process, and why only the third serves a notebook:

- *fork* copies this process. CUDA does not survive a fork, and a notebook has usually used its GPU.
- *spawn* starts a fresh Python, which imports torch and the libraries for several seconds, in every rank, every time.
- *forkserver* starts one fresh process that imports the libraries once and never touches CUDA. Ranks are forked from
  it in a fraction of a second and share the pages of the imported libraries.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

from helpers.launch.environment import environment

ROOT = Path(__file__).resolve().parents[2]
_lock = threading.Lock()
_announced = False


def start_server() -> None:
    """Start the server unless it runs; it ends with this process."""
    global _announced
    with _lock:
        first, _announced = not _announced, True
        if first:
            print("first launch: importing torch, transformers, peft, deepspeed for all launches to come", flush=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["helpers.launch.preload"])
        # The server imports that module before it receives this process's sys.path.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with environment({"PYTHONPATH": path}):
            forkserver.ensure_running()


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Hide ``__main__`` while a rank starts.

    multiprocessing would run the caller's script again in every rank, to be able to unpickle its functions. Here the
    function travels by value (cloudpickle), so the script needs no ``if __name__ == "__main__"``.
    """
    with _lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
