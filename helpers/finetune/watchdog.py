"""End a rank that waits for another one for too long, and say for which, and where.

A rank that is stopped or cut off leaves the others in a collective, for good. So each rank tells the others once a
second that it lives, at which step, and in which line; threads do it, over the launcher's store and not over a GPU.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.config.blocks import training_setting
from helpers.errors import UserError
from helpers.finetune.beats import LONGEST_BEAT, Beat, Judge, where
from helpers.finetune.lost_rank import how_to_continue
from helpers.finetune.ranks import FAILED, Ranks
from helpers.finetune.run_folder import RunFile

BEAT_SECONDS = 1.0
END_SECONDS = 3.0  # after a verdict: the other ranks come to it as well, before a broken connection ends them


class Watchdog(TrainerCallback):
    """A context around the job: ends this rank if another is silent, or none moves, for ``ddp_timeout`` seconds.

    Args:
        ranks: This process's place; without others, the context does nothing.
        training: The configuration's ``training_args``.
        run_file: Gets the reason.
        end: Ends the process with a status.
    """

    def __init__(
        self, ranks: Ranks, training: dict[str, Any], run_file: RunFile, end: Callable[[int], object] = os._exit
    ) -> None:
        self.ranks, self.run_file, self.end = ranks, run_file, end
        limit = training_setting(training, "ddp_timeout")
        self.judge = Judge(ranks.rank, ranks.world_size, limit)
        self.step, self.number, self.host = 0, 0, socket.gethostname()
        self._finished, self._stop = False, threading.Event()
        self._talker = threading.Thread(target=self._talk, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._barked = False

    def __enter__(self) -> "Watchdog":
        if self.ranks.store is not None and self.ranks.world_size > 1:
            self._talker.start()
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._barked:  # this error follows from the verdict: another rank was faster
            self._watcher.join()
        self._finished = kind is None  # a rank that fails and then hangs is silent
        self._stop.set()
        if self._talker.ident:
            self._talker.join(LONGEST_BEAT)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.step = state.global_step

    def exchange(self, store: dist.Store) -> None:
        """Tell the others of this rank, and ask for what they have told."""
        self.number += 1
        line, stack = where(sys._current_frames().get(threading.main_thread().ident or 0))
        beat = Beat(self.number, self.host, self.step, line, stack, self._finished)
        store.set(f"beat_{self.ranks.rank}", json.dumps(asdict(beat)))
        self.judge.hear(self.ranks.rank, beat)
        for rank in range(self.ranks.world_size):
            if rank != self.ranks.rank and store.check([f"beat_{rank}"]):
                self.judge.hear(rank, Beat(**json.loads(store.get(f"beat_{rank}"))))
        self.judge.answered = self.judge.now

    def _talk(self) -> None:
        """Exchange beats until the block ends, over a connection of its own: the main thread may wait in another."""
        store = None
        while True:
            last = self._stop.is_set()
            try:
                store = store or self.ranks.store.clone()  # type: ignore[union-attr]
                self.exchange(store)
            except dist.DistError:
                store = None  # a broken connection stays broken
            if last:
                return
            self._stop.wait(BEAT_SECONDS)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            now = time.monotonic()
            self.judge.pass_time(now - before)
            before = now
            if verdict := self.judge.verdict():
                return self.bark(verdict)

    def bark(self, verdict: str) -> None:
        """Say the verdict in one line, here and in ``run.json``, and end this rank."""
        self._barked = True
        line = f"{verdict}; {how_to_continue(self.run_file.path.parent)}"
        with suppress(OSError):  # nobody may read any more
            print(f"error: {line}", file=sys.stderr, flush=True)
        # In a thread: a dead disk or store must not keep this rank.
        threading.Thread(target=self._write, args=[line], daemon=True).start()
        time.sleep(END_SECONDS)
        self.end(2)

    def _write(self, line: str) -> None:
        with suppress(OSError):
            self.run_file.fail(UserError(line))
        with suppress(dist.DistError):
            self.ranks.store.clone().compare_set(FAILED, "", line)  # type: ignore[union-attr]
