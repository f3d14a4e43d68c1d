"""Kill a rank that can no longer end itself: a process that is stopped, or stuck inside a library.

torchrun asks such a rank to end and kills it half a minute later, and only if another rank on its host has ended. So a
helper process per rank reads one byte per second from it, and kills it when they stop coming. The helper runs this file
as a script, so it imports none of the packages that would take a rank's memory.
"""

import os
import select
import signal
import subprocess
import sys
import time

READ_SECONDS = 0.5
LONGEST_WAIT = 5.0  # whoever was stopped itself (a suspended job or machine) has waited for nobody meanwhile


class LastResort:
    """The helper process of this rank.

    Args:
        limit: Seconds without :meth:`live` after which it kills this process.
    """

    def __init__(self, limit: float) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(limit)]
        self._process = subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)

    def live(self) -> None:
        """Send a sign of life."""
        try:
            os.write(self._write, b".")
        except OSError:  # it was killed, or is stopped and its pipe is full: the rank goes on without it
            pass

    def end(self) -> None:
        """End the helper process."""
        os.close(self._write)
        self._process.kill()
        self._process.wait()


def watch(rank: int, limit: float, pipe: int = 0) -> None:
    """Kill a process when it has been silent for too long; return when it has ended.

    Args:
        rank: The process, this one's parent.
        limit: Seconds of silence.
        pipe: Where it writes.
    """
    silence, before = 0.0, time.monotonic()
    while os.getppid() == rank:
        ready, _, _ = select.select([pipe], [], [], READ_SECONDS)
        now = time.monotonic()
        silence += min(now - before, LONGEST_WAIT)
        before = now
        if ready:
            if not os.read(pipe, 1 << 16):
                return
            silence = 0.0
        elif silence > limit:
            os.kill(rank, signal.SIGKILL)
            return


if __name__ == "__main__":
    # torchrun signals a rank's whole process group. Ctrl-Z stops it, this process included.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(int(sys.argv[1]), float(sys.argv[2]))
