"""Run any pipeline schedule on the ranks of a process group, and record what ran when."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.errors import UserError
from helpers.parallel.clock import synchronize
from helpers.parallel.pipeline.deferred_gradients import defer_weight_gradients
from helpers.parallel.pipeline.schedules import Action, Schedule
from helpers.parallel.pipeline.stages import Stage, causal_lm_loss
from helpers.parallel.pipeline.timeline import (
    TimedAction,
    Transfer,
    needs,
    ranks_of_stages,
    result,
    transfer_batches,
)


@dataclass(frozen=True)
class StepResult:
    """What :meth:`Executor.step` returns on one rank.

    Attributes:
        loss: Mean loss over all sequences, on the rank with the last stage; None on the others.
        spans: What ran when on this rank; all ranks of a machine share the clock.
    """

    loss: float | None
    spans: list[TimedAction]


class Executor:
    """Run this rank's part of a schedule.

        executor = Executor(one_f_one_b(4, 8), stages)
        optimizer.zero_grad()
        step = executor.step(input_ids, labels)
        optimizer.step()

    Every rank of the group constructs one, with the same schedule.

    Args:
        schedule: The actions of each rank.
        stages: This rank's stages, by number.
        group: The ranks of the pipeline; all ranks by default.
        pace: Least seconds that an action lasts, by kind. The rest is slept away, so that ranks that share a core keep
            the same relative speed.
        loss: The mean loss of a micro-batch, from the last stage's output and the labels.

    Raises:
        UserError: The schedule cannot run, or does not match the group or the stages.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        group: dist.ProcessGroup | None = None,
        pace: Mapping[str, float] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = causal_lm_loss,
    ) -> None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        if len(schedule) != world_size:
            raise UserError(
                f"the schedule is for {len(schedule)} ranks but the group has {world_size}; build it for {world_size}"
            )
        ranks = ranks_of_stages(schedule)
        assigned = sorted(stage for stage, owner in ranks.items() if owner == rank)
        if not assigned:
            raise UserError(f"the schedule gives rank {rank} nothing to do; build it for fewer ranks")
        if sorted(stages) != assigned:
            raise UserError(f"rank {rank} has the stages {sorted(stages)} but the schedule assigns it {assigned}")
        self._actions, self._stages, self._group, self._rank = schedule[rank], stages, group, rank
        self._pace = pace or {}
        self._loss = loss
        self._last_stage = max(ranks)
        self._micro_batches = 1 + max(action.micro_batch for action in self._actions)
        self._split_stages = {action.stage for action in self._actions if action.kind == "W"}
        self._batches = transfer_batches(schedule, rank)
        parameter = next(stages[assigned[0]].parameters())
        self._device, self._dtype, self._hidden = parameter.device, parameter.dtype, stages[assigned[0]].hidden
        connect_neighbours(self._batches, self._device, group)

    def step(self, input_ids: Tensor, labels: Tensor) -> StepResult:
        """Run forward and backward; ``grad`` then holds the gradients of the mean loss.

        The loss is the mean of the micro-batches' means. It equals the mean over all tokens if every micro-batch has
        equally many labels that are not -100.

        Args:
            input_ids: [sequences, tokens]; every rank passes all of them and uses those that its stages need.
            labels: [sequences, tokens], not shifted; -100 is ignored.

        Returns:
            The loss and the recorded times.

        Raises:
            UserError: The sequences do not divide into the schedule's micro-batches.
        """
        count = self._micro_batches
        if len(input_ids) % count:
            raise UserError(
                f"{len(input_ids)} sequences do not divide into {count} micro-batches; change one of the two"
            )
        return _Run(self, input_ids.chunk(count), labels.chunk(count)).run()


def connect_neighbours(
    batches: Sequence[Sequence[Transfer]], device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Exchange a tiny message with every rank that this rank will send to or receive from, both directions at once.

    NCCL connects a direction when it is first used, and a batch waits until all of its directions are connected. The
    batch that sends the last activation and receives the first gradient would therefore wait for the neighbour's send,
    which waits for that activation.

    Args:
        batches: This rank's messages. A rank that gets activations sends gradients, so neighbours name each other.
        device: Of the messages.
        group: The ranks of the pipeline; all ranks by default.
    """
    rank = dist.get_rank(group)
    neighbours = sorted({end for batch in batches for t in batch for end in (t.source, t.target)} - {rank})
    operations = [
        dist.P2POp(operation, torch.zeros(1, device=device), group=group, group_peer=neighbour)
        for neighbour in neighbours
        for operation in (dist.isend, dist.irecv)
    ]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()


class _Run:
    """One step: the tensors kept per micro-batch, the messages under way, and what ran when."""

    def __init__(self, executor: Executor, input_ids: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        self._executor, self._input_ids, self._labels = executor, input_ids, labels
        self._pending = deque(executor._batches)  # not started yet, in the order common to all ranks
        self._messages: dict[Action, tuple[dist.Work, Tensor]] = {}  # started: a tensor must live until it is sent
        self._local_results: dict[Action, Tensor] = {}  # passed between two stages of this rank
        # By stage and micro-batch: the input and output of forward, and its deferred weight gradients.
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor, defer_weight_gradients | None]] = {}
        self._deferred: dict[tuple[int, int], defer_weight_gradients] = {}
        self._losses: list[Tensor] = []
        self._spans: list[TimedAction] = []

    def run(self) -> StepResult:
        work = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._backward_weight}
        for action in self._executor._actions:
            received = self._receive_input(action)
            with self._timed(action):
                output = work[action.kind](action.stage, action.micro_batch, received)
            if output is not None:
                self._pass_on(result(action), output)
        for sent, _ in self._messages.values():
            sent.wait()
        return StepResult(float(sum(self._losses)) if self._losses else None, self._spans)

    def _forward(self, stage: int, number: int, x: Tensor | None) -> Tensor | None:
        # The input is a leaf of the graph: after backward its grad is what the previous stage waits for.
        x = self._input_ids[number] if x is None else x.requires_grad_()
        deferred = defer_weight_gradients() if stage in self._executor._split_stages else None
        with deferred or nullcontext():
            y = self._executor._stages[stage](x)
        is_last = stage == self._executor._last_stage
        if is_last:
            # Divide by the number of micro-batches: their gradients then add up to that of the mean over the batch.
            y = self._executor._loss(y, self._labels[number]) / len(self._labels)
            self._losses.append(y.detach())
        self._kept[stage, number] = x, y, deferred
        return None if is_last else y.detach()

    def _backward(self, stage: int, number: int, gradient: Tensor | None) -> Tensor | None:
        x, y, deferred = self._kept.pop((stage, number))
        y.backward(gradient)
        if deferred:
            self._deferred[stage, number] = deferred
        return x.grad  # None for the first stage: token ids have no gradient

    def _backward_weight(self, stage: int, number: int, _: Tensor | None) -> None:
        self._deferred.pop((stage, number)).backward_weight()

    def _receive_input(self, action: Action) -> Tensor | None:
        """Wait for the tensor that the action needs from a neighbouring stage; return None if it needs none."""
        executor = self._executor
        needed = next((need for need in needs(action, executor._last_stage) if need.stage != action.stage), None)
        if needed is None:
            return None
        if needed.kind == "I" and (sent := self._messages.pop(Action("F", action.stage, action.micro_batch), None)):
            # The next stage has computed with this activation, so it has arrived: waiting only frees its memory.
            sent[0].wait()
        if needed in self._local_results:
            return self._local_results.pop(needed)
        self._start_until(needed)
        work, tensor = self._messages.pop(needed)
        work.wait()
        return tensor

    def _pass_on(self, produced: Action, tensor: Tensor) -> None:
        """Send a result to the rank that needs it, or keep it if that is this rank."""
        if any(transfer.result == produced for batch in self._pending for transfer in batch):
            self._start_until(produced, tensor.contiguous())
        else:
            self._local_results[produced] = tensor

    def _start_until(self, wanted: Action, sent: Tensor | None = None) -> None:
        """Start the messages up to that of ``wanted``, which is what this rank sends if ``sent`` is given.

        Receives wait until here, because a message that waits for its other side takes multiprocessors from the GPU.
        """
        group = self._executor._group
        while wanted not in self._messages:
            batch, operations = self._pending.popleft(), []
            for transfer in batch:
                if sent is not None and transfer.result == wanted:
                    operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=transfer.target))
                else:
                    operations.append(dist.P2POp(dist.irecv, self._buffer(), group=group, group_peer=transfer.source))
            works = dist.batch_isend_irecv(operations)
            # NCCL returns one handle for the whole batch, gloo one per operation.
            for transfer, operation, work in zip(batch, operations, works * len(batch), strict=False):
                self._messages[transfer.result] = work, operation.tensor

    def _buffer(self) -> Tensor:
        # [sequences, tokens, hidden]: activations and their gradients have the same shape at every boundary.
        shape = (*self._input_ids[0].shape, self._executor._hidden)
        return torch.empty(shape, device=self._executor._device, dtype=self._executor._dtype)

    @contextmanager
    def _timed(self, action: Action) -> Iterator[None]:
        """Record what runs in the block, GPU work included, and make it last at least its pace."""
        synchronize(self._executor._device)
        start = time.monotonic()  # the machine's clock, so that times of different processes compare
        yield
        synchronize(self._executor._device)
        time.sleep(max(0.0, self._executor._pace.get(action.kind, 0.0) - (time.monotonic() - start)))
        self._spans.append(TimedAction(action, start, time.monotonic()))
