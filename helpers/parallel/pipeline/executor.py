"""The one executor: it runs any table of actions on the ranks of a process group, and records what ran when."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.errors import UserError
from helpers.parallel.pipeline.deferred_gradients import defer_weight_gradients
from helpers.parallel.pipeline.schedules import Action, Table
from helpers.parallel.pipeline.stages import Stage, causal_loss
from helpers.parallel.pipeline.timeline import Timed, needs, ranks_of_stages, result, transfers


@dataclass(frozen=True)
class Step:
    """``loss``: the mean over all rows on the rank with the last stage, None on the others; ``spans``: what ran when.

    The clock of the spans is the same for all ranks of one machine.
    """

    loss: float | None
    spans: list[Timed]


class Executor:
    """This rank's row of ``table`` on its ``stages``, by number.

        executor = Executor(one_f_one_b(4, 8), stages)
        optimizer.zero_grad()
        step = executor.step(ids, labels)
        optimizer.step()

    All ranks of ``group`` (the world where None) make one, with the same table. ``pace`` gives the least seconds that
    an action of a kind lasts; what is missing is slept, so that ranks that share cores behave as if each had its own.

    ``loss`` makes a micro-batch's mean loss of the last stage's output and the labels.

    Raises :class:`UserError` for a table that cannot run, or that is not for these ranks or these stages.
    """

    def __init__(
        self,
        table: Table,
        stages: Mapping[int, Stage],
        group: dist.ProcessGroup | None = None,
        pace: Mapping[str, float] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = causal_loss,
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if len(table) != size:
            raise UserError(f"a table for {len(table)} ranks in a group of {size}; make it for {size}")
        ranks = ranks_of_stages(table)
        wanted = sorted(stage for stage, owner in ranks.items() if owner == rank)
        if not wanted:
            raise UserError(f"the table gives rank {rank} nothing to do; make it for fewer ranks")
        if sorted(stages) != wanted:
            raise UserError(f"rank {rank} has the stages {sorted(stages)} but the table gives it {wanted}")
        self._row, self._stages, self._group, self._rank = table[rank], stages, group, rank
        self._pace = pace or {}
        self._loss = loss
        self._last = max(ranks)
        self._micro_batches = 1 + max(action.micro_batch for action in self._row)
        self._split = {action.stage for action in self._row if action.kind == "W"}
        self._transfers = [t for t in transfers(table) if rank in (t.source, t.target)]
        parameter = next(stages[wanted[0]].parameters())
        self._device, self._dtype, self._hidden = parameter.device, parameter.dtype, stages[wanted[0]].hidden

    def step(self, ids: Tensor, labels: Tensor) -> Step:
        """Forward and backward of ``ids`` and ``labels`` [rows, length]: gradients of the mean loss in every ``grad``.

        The mean of the micro-batches' means, which is that over all tokens where no label is -100, or equally many.
        Every rank is given all rows; it uses those that its stages need. Raises :class:`UserError` where the rows do
        not divide into the table's micro-batches.
        """
        if len(ids) % self._micro_batches:
            raise UserError(
                f"{len(ids)} rows do not divide into {self._micro_batches} micro-batches; change one of the two"
            )
        return _Run(self, ids.chunk(self._micro_batches), labels.chunk(self._micro_batches)).run()


class _Run:
    """One step: what is kept of each micro-batch, what is on its way, what ran when."""

    def __init__(self, executor: Executor, ids: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        self._executor, self._ids, self._labels = executor, ids, labels
        self._pending = deque(executor._transfers)
        self._receives: dict[Action, tuple[dist.Work, Tensor]] = {}
        self._sends: dict[Action, tuple[dist.Work, Tensor]] = {}
        self._results: dict[Action, Tensor] = {}  # of a neighbouring stage on this rank, until they are used
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor, defer_weight_gradients | None]] = {}
        self._undone: dict[tuple[int, int], defer_weight_gradients] = {}
        self._losses: list[Tensor] = []
        self._spans: list[Timed] = []

    def run(self) -> Step:
        work = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._weights}
        for action in self._executor._row:
            taken = self._take(action)
            with self._timed(action):
                made = work[action.kind](action.stage, action.micro_batch, taken)
            if made is not None:
                self._pass_on(result(action), made)
        for sent, _ in self._sends.values():
            sent.wait()
        return Step(sum(self._losses).item() if self._losses else None, self._spans)

    def _forward(self, stage: int, number: int, x: Tensor | None) -> Tensor | None:
        x = self._ids[number] if x is None else x.requires_grad_()
        deferred = defer_weight_gradients() if stage in self._executor._split else None
        with deferred or nullcontext():
            y = self._executor._stages[stage](x)
        last = stage == self._executor._last
        if last:
            # A part of the mean over all rows, so that the micro-batches' gradients add up to that of the whole batch.
            y = self._executor._loss(y, self._labels[number]) / len(self._labels)
            self._losses.append(y.detach())
        self._kept[stage, number] = x, y, deferred
        return None if last else y.detach()

    def _backward(self, stage: int, number: int, gradient: Tensor | None) -> Tensor | None:
        x, y, deferred = self._kept.pop((stage, number))
        y.backward(gradient)
        if deferred:
            self._undone[stage, number] = deferred
        return x.grad

    def _weights(self, stage: int, number: int, _: Tensor | None) -> None:
        self._undone.pop((stage, number)).finish()

    def _take(self, action: Action) -> Tensor | None:
        """What the action needs of a neighbouring stage: its input, or the gradient of its output; None at the ends."""
        wanted = next((need for need in needs(action, self._executor._last) if need.stage != action.stage), None)
        if wanted is None:
            return None
        if wanted.kind == "I" and (sent := self._sends.pop(Action("F", action.stage, action.micro_batch), None)):
            sent[0].wait()  # it has arrived long ago, or there would be no gradient; now its memory is free
        if wanted in self._results:
            return self._results.pop(wanted)
        if wanted not in self._receives:
            self._start_until(wanted)
        work, tensor = self._receives.pop(wanted)
        work.wait()
        return tensor

    def _pass_on(self, made: Action, tensor: Tensor) -> None:
        if any(transfer.result == made for transfer in self._pending):
            self._start_until(made, tensor.contiguous())
        else:
            self._results[made] = tensor

    def _start_until(self, wanted: Action, tensor: Tensor | None = None) -> None:
        """Start this rank's transfers in their order up to ``wanted``; where that is a send, it sends ``tensor``."""
        executor = self._executor
        while True:
            transfer = self._pending.popleft()
            if transfer.source == executor._rank:
                work = dist.isend(tensor, group=executor._group, group_dst=transfer.target)
                self._sends[transfer.result] = work, tensor
            else:
                buffer = torch.empty(
                    *self._ids[0].shape, executor._hidden, device=executor._device, dtype=executor._dtype
                )
                work = dist.irecv(buffer, group=executor._group, group_src=transfer.source)
                self._receives[transfer.result] = work, buffer
            if transfer.result == wanted:
                return

    @contextmanager
    def _timed(self, action: Action) -> Iterator[None]:
        """Record what runs in the block, a GPU's work included, and make it last at least its pace."""
        self._synchronize()
        start = time.monotonic()  # the machine's clock: it compares between processes
        yield
        self._synchronize()
        time.sleep(max(0.0, self._executor._pace.get(action.kind, 0.0) - (time.monotonic() - start)))
        self._spans.append(Timed(action, start, time.monotonic()))

    def _synchronize(self) -> None:
        if self._executor._device.type == "cuda":
            torch.cuda.current_stream(self._executor._device).synchronize()
