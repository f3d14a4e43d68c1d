"""Show what a rank prints, line by line and marked with the rank."""

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import wait
from typing import TextIO

from helpers.libraries.quiet import SILENCED_LINES

UNFINISHED_SECONDS = 0.5  # after which a line is shown though its end has not come
UPDATE_SECONDS = 1.0  # between two updates of a progress bar


class RankOutput:
    """A pipe that replaces a rank's stdout or stderr; its complete lines appear on ``stream``.

    An incomplete line waits for its end, or lines of several ranks would be mixed. If the end takes long, the line is
    shown without it. A progress bar returns to the start of its line for each update: some of these are shown.
    """

    def __init__(self, rank: int, stream: TextIO) -> None:
        self._prefix = f"[rank {rank}] "
        self._stream = stream
        self._pieces: list[bytes] = []  # of the incomplete line; joined once, however long it gets
        self._returned = False  # whether one of them has a carriage return
        self._begun = False  # whether a part of the incomplete line has been shown
        self._last_data = self._last_update = 0.0
        self.open = True
        self.read_end, self.write_end = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.read_end.fileno(), False)

    @property
    def incomplete(self) -> bool:
        """Whether a line has begun that :meth:`show_incomplete` may show later."""
        return bool(self._pieces)

    def show(self) -> None:
        """Show the lines that have arrived."""
        try:
            data = os.read(self.read_end.fileno(), 1 << 16)
        except BlockingIOError:
            return
        self.open = bool(data)
        self._last_data = time.monotonic()
        *lines, rest = data.split(b"\n")
        for line in lines:
            whole = b"".join([*self._pieces, line])
            if whole or not self._begun:
                self._show_line(whole)
            self._pieces, self._returned, self._begun = [], False, False
        if rest:
            self._pieces.append(rest)
            self._returned |= b"\r" in rest

    def show_incomplete(self) -> None:
        """Show the incomplete line if its end is long in coming, or the newest update of a progress bar."""
        now = time.monotonic()
        if self._returned:
            if now - self._last_update >= UPDATE_SECONDS:
                self._last_update = now
                shown, _, begun = b"".join(self._pieces).rpartition(b"\r")
                # A bar writes its carriage return before an update or after it.
                self._show_line(begun or shown)
                self._pieces, self._returned, self._begun = [], False, True
        elif self._pieces and now - self._last_data >= UNFINISHED_SECONDS:
            self._show_line(b"".join(self._pieces))
            self._pieces, self._begun = [], True

    def finish(self) -> None:
        """Show everything that has arrived, an incomplete line included, and close the pipe.

        This does not wait for the pipe's end: a process that the rank started may hold it open.
        """
        while self.open and wait([self.read_end], 0):
            self.show()
        if self._pieces:
            self._show_line(b"".join(self._pieces))
        self.read_end.close()

    def _show_line(self, line: bytes) -> None:
        # What a terminal would show in the end: the text after the last carriage return.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
        if not any(silenced in text for silenced in SILENCED_LINES):
            with contextlib.suppress(ValueError):  # the caller has closed its stream
                print(self._prefix + text, file=self._stream, flush=True)
