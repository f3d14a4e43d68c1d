"""End a rank that waits for another one for too long, and say for which, and where.

A rank that is stopped or cut off leaves the others in a collective, for good. So each rank tells the others once a
second that it lives, at which step, and in which line; threads do it, over the launcher's store and not over a GPU.
The stopped rank itself is killed when the others have reported it.
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.config.blocks import training_setting
from helpers.errors import UserError
from helpers.finetune.beats import LONGEST_BEAT, Beat, Judge, where
from helpers.finetune.checkpoints import MANIFEST
from helpers.finetune.last_resort import LastResort
from helpers.finetune.lost_rank import how_to_continue
from helpers.finetune.ranks import FAILED, Ranks
from helpers.finetune.run_folder import RunFile

BEAT_SECONDS = 1.0
END_SECONDS = 3.0  # after a verdict: the other ranks come to it as well, before a broken connection ends them
LAST_RESORT_SECONDS = 6.0  # after the limit: the others have had their say


class Watchdog(TrainerCallback):
    """A context around the job: ends this rank if another is silent, or none moves, for ``ddp_timeout`` seconds.

    Args:
        ranks: This process's place; without others, the context does nothing.
        training: The configuration's ``training_args``.
        output_dir: The run's folder, whose newest checkpoint is named.
        end: Ends the process with a status.

    Attributes:
        run_file: Gets the reason; None until it exists.
    """

    def __init__(
        self, ranks: Ranks, training: dict[str, Any], output_dir: Path, end: Callable[[int], object] = os._exit
    ) -> None:
        self.ranks, self.output_dir, self.end = ranks, output_dir, end
        self.run_file: RunFile | None = None
        self.limit = training_setting(training, "ddp_timeout")
        self.judge = Judge(ranks.rank, ranks.world_size, self.limit)
        self.step, self.number, self.host = 0, 0, socket.gethostname()
        self._finished, self._stop = False, threading.Event()
        self._talker = threading.Thread(target=self._talk, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._last_resort: LastResort | None = None
        self._barked = False
        self._reported: str | None = None
        self._reported_seconds = 0.0

    def __enter__(self) -> "Watchdog":
        if self.ranks.store is not None and self.ranks.world_size > 1:
            self._last_resort = LastResort(self.limit + LAST_RESORT_SECONDS)
            self._talker.start()
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.wait_for_verdict()
        self._finished = kind is None  # a rank that fails and then hangs is silent
        self._stop.set()
        if self._last_resort is not None:
            self._talker.join(LONGEST_BEAT)
            self._last_resort.end()

    def wait_for_verdict(self) -> None:
        """After an error: if another rank's verdict has led to it, wait for this rank's own, which ends it."""
        if self._barked:
            self._watcher.join()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.step = state.global_step

    def exchange(self, store: dist.Store) -> None:
        """Tell the others of this rank, and ask for what they have told."""
        self.number += 1
        line, stack = where(sys._current_frames().get(threading.main_thread().ident or 0))
        if self.run_file is None:
            stack = hash((stack, self._busy()))
        beat = Beat(self.number, self.host, self.step, line, stack, self._finished)
        store.set(f"beat_{self.ranks.rank}", json.dumps(asdict(beat)))
        self.judge.hear(self.ranks.rank, beat)
        for rank in range(self.ranks.world_size):
            if rank != self.ranks.rank and store.check([f"beat_{rank}"]):
                self.judge.hear(rank, Beat(**json.loads(store.get(f"beat_{rank}"))))
        self.judge.answered = self.judge.now
        if self._reported is None and store.check([FAILED]):
            self._reported = store.get(FAILED).decode()

    def _busy(self) -> int:
        """Count how often this rank and its children have computed for a tenth of the limit.

        While data are read, processes may work for a long time for a rank that stands still.
        """
        own = psutil.Process()
        seconds = 0.0
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
        return int(10 * seconds / self.limit)

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
            if self._last_resort is not None:
                self._last_resort.live()
            now = time.monotonic()
            self.judge.pass_time(now - before)
            if self._reported is not None:
                self._reported_seconds += now - before
            before = now
            if verdict := self.judge.verdict():
                return self.bark(verdict)
            if self._reported is not None and self._reported_seconds > END_SECONDS:
                return self._end_with(self._reported)

    def bark(self, verdict: str) -> None:
        """Say the verdict in one line, here and in ``run.json``, and end this rank."""
        self._barked = True
        line = f"{verdict}; {how_to_continue(self.output_dir)}"
        with suppress(OSError):  # nobody may read any more
            print(f"error: {line}", file=sys.stderr, flush=True)
        # In a thread: a dead disk or store must not keep this rank.
        threading.Thread(target=self._write, args=[line], daemon=True).start()
        time.sleep(END_SECONDS)
        self.end(2)

    def _end_with(self, reported: str) -> None:
        """End this rank, which has not met the error that another rank has reported: it waits for that rank."""
        self._barked = True
        saving = self.output_dir / f"checkpoint-{self.step}"
        if self.ranks.is_first and not (saving / MANIFEST).exists():
            shutil.rmtree(saving, ignore_errors=True)
        assert self.ranks.store is not None
        store = self.ranks.store.clone()  # type: ignore[attr-defined]
        replace(self.ranks, store=store).exit_with_error(UserError(reported))

    def _write(self, line: str) -> None:
        with suppress(OSError):
            if self.run_file is not None:
                self.run_file.fail(UserError(line))
        with suppress(dist.DistError):
            self.ranks.store.clone().compare_set(FAILED, "", line)  # type: ignore[union-attr]
