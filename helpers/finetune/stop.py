"""What Ctrl-C, SIGTERM and SIGHUP do: save a checkpoint while training, and end at once before and after it."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.finetune.ranks import SIGNALS, STOP_AT, Ranks

GRACE_SECONDS = 30  # of torchrun: torch/distributed/elastic/multiprocessing/api.py, PContext.close


class StoppedBySignal(BaseException):
    """A signal has come while there is nothing to save: while libraries or the model load, or after training."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number  # what shells report


@contextmanager
def restored_signals() -> Iterator[None]:
    """Put the signals' handlers back after the block, for whoever runs a job inside of a program of its own."""
    kept = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:  # it was not set from Python, and cannot be
                signal.signal(number, handler)


def end_at_signals(ranks: Ranks) -> None:
    """Let a signal raise :class:`StoppedBySignal` from now on."""

    def end(number: int, frame: FrameType | None) -> None:
        ignore_signals()  # one is enough: torchrun passes on what the whole process group has got already
        raise StoppedBySignal(number)

    _handle(end, ranks)


def _handle(handler: Callable[[int, FrameType | None], Any], ranks: Ranks) -> None:
    """Handle the signals; a single process under ``nohup`` goes on ignoring SIGHUP."""
    for number in SIGNALS:
        under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
        if ranks.store is not None or not under_nohup:
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore the signals from now on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ignore_signals_in_worker(start: Callable[[int], object] | None, worker: int) -> None:
    """Start a data loader's worker that leaves signals to its rank: a worker that ends takes the rank with it.

    Args:
        start: What the worker would have called at its start.
        worker: Its number.
    """
    ignore_signals()
    if start is not None:
        start(worker)


def kill_workers() -> None:
    """Kill the data loader's workers that are left when Python ends.

    Something may hold their loader until then: the traceback of an error, or FSDP2's hooks. Python would end them with
    a signal that they ignore (:func:`ignore_signals_in_worker`), and wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports a worker that ends
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class StopOnSignal(TrainerCallback):
    """On a signal, finish the step, save a checkpoint and end training on every rank at the same step.

    A rank that gets the signal writes the step to stop at into the store. The gradients' all-reduce keeps ranks within
    one step of each other, so two steps ahead is late enough for every rank to see it, without another collective.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.stopped = False
        self._signalled = False

    def install(self) -> None:
        """Handle the signals in this way from now on."""
        _handle(self._on_signal, self.ranks)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._signalled:
            grace = "" if self.ranks.store is None else f"; torchrun kills the ranks after {GRACE_SECONDS} s"
            self.ranks.print_once(f"\nstopping: saving a checkpoint after this step{grace}")
        self._signalled = True

    def _stop_step(self, step: int) -> int | None:
        store = self.ranks.store
        if store is None:
            return step if self._signalled else None
        if self._signalled and not store.check([STOP_AT]):
            store.compare_set(STOP_AT, "", str(step + 2))
        return int(store.get(STOP_AT)) if store.check([STOP_AT]) else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        stop_step = self._stop_step(state.global_step)
        if stop_step is not None and state.global_step >= stop_step and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
