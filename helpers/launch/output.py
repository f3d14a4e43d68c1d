"""Show what a rank prints, line by line and marked with the rank."""

import multiprocessing
import os
from multiprocessing.connection import wait
from typing import TextIO

from helpers.libraries.quiet import SILENCED_LINES


class RankOutput:
    """A pipe that replaces a rank's stdout or stderr; its complete lines appear on ``stream``."""

    def __init__(self, rank: int, stream: TextIO) -> None:
        self._prefix = f"[rank {rank}] "
        self._stream = stream
        self._incomplete = b""
        self.open = True
        self.read_end, self.write_end = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.read_end.fileno(), False)

    def show(self) -> None:
        """Show the lines that have arrived."""
        try:
            data = os.read(self.read_end.fileno(), 1 << 16)
        except BlockingIOError:
            return
        self.open = bool(data)
        # An incomplete line waits for its end: otherwise lines of several ranks would be mixed.
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        for line in lines:
            self._show_line(line)

    def finish(self) -> None:
        """Show everything that has arrived, an incomplete line included, and close the pipe.

        This does not wait for the pipe's end: a process that the rank started may hold it open.
        """
        while self.open and wait([self.read_end], 0):
            self.show()
        if self._incomplete:
            self._show_line(self._incomplete)
        self.read_end.close()

    def _show_line(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if not any(silenced in text for silenced in SILENCED_LINES):
            print(self._prefix + text, file=self._stream, flush=True)
