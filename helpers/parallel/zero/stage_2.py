"""ZeRO-2: each rank keeps its shard of the gradients as well (chapter 07)."""

from collections.abc import Sequence

from torch import nn

from helpers.parallel.buckets import BackwardHooks
from helpers.parallel.zero.bucket import ZeroBucket
from helpers.parallel.zero.stage_1 import MakeOptimizer, Zero1


class Zero2(Zero1):
    """Shard gradients as well: each bucket is reduce-scattered during backward, and a rank keeps its shard only.

    Full gradients exist for the bucket in flight and for those that backward is filling. These are three in all if a
    bucket is at least as large as a layer, whose gradients do not come in the order of its parameters.

    Every backward sends, since a rank keeps no full gradients to add the next ones to. So k micro-batches per step send
    k times the gradients. A parameter without a gradient makes backward raise :class:`UserError`. After a backward that
    failed, :meth:`zero_grad` drops what it has made.

    Args and attributes are those of :class:`Zero1`.
    """

    def _set_up(self, model: nn.Module, buckets: Sequence[ZeroBucket], make_optimizer: MakeOptimizer) -> None:
        super()._set_up(model, buckets, make_optimizer)
        self._in_flight: ZeroBucket | None = None
        self._hooks = BackwardHooks(self, model, buckets, self._send, self._end_backward)

    def reduce(self) -> None:
        """As in :class:`Zero1`, for what backward has not sent because an error broke it off."""
        self._hooks.recover()
        super().reduce()

    def zero_grad(self) -> None:
        """Free the gradients since the last step, those of a backward that failed as well."""
        self._hooks.recover()
        super().zero_grad()

    def _send(self, bucket: ZeroBucket) -> None:
        self._finish_in_flight()  # one at a time: its unreduced gradients are freed before the next ones travel
        bucket.start_reduce_scatter()
        self._in_flight = bucket

    def _finish_in_flight(self) -> None:
        if self._in_flight is not None:
            self._in_flight.finish_reduce_scatter()
            self._in_flight = None

    def _end_backward(self, complete: bool) -> None:
        self._finish_in_flight()
