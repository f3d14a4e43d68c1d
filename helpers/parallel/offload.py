"""Optimizer offload: Adam, its moments and fp32 master weights live in host memory; the device keeps the parameters.

Backward copies gradients to the host bucket by bucket, Adam runs there, and updated values are copied back
(ZeRO-Offload, Ren et al. 2021). Chapter 09 derives what is here.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from helpers.errors import UserError
from helpers.memory.categories import CATEGORIES
from helpers.memory.units import MIB
from helpers.parallel.data import in_buckets

IN_FLIGHT = 2  # buckets whose gradients are on their way to the host while backward goes on


class OffloadedAdamW:
    """AdamW over the trained parameters of ``model``, in host memory; the parameters stay where they are.

        optimizer = OffloadedAdamW(model, lr=1e-4)
        model(**batch).loss.backward()      # gradients leave the device as they come; .grad is None afterwards
        optimizer.step()

    Several backward calls before a step add up, in fp32, on the host. With a process group each rank keeps and updates
    1/N of every bucket, as in ZeRO-2: gradients are reduce-scattered (their mean) before they leave, updated values
    all-gathered. All ranks must begin with equal parameters and use each parameter in every backward.

    ``delay_after`` is the number of steps after which updates come one step late (the paper's delayed parameter
    update): ``step`` then hands the device the result of the step before, and Adam works beside the next forward and
    backward. None never delays. ``flush`` fetches what is still under way.

    Bytes of each parameter that a rank owns, of s bytes on the device: on the host 16 + s (Adam's two moments, master,
    gradient, all fp32; one pinned buffer through which gradients come and values go); on the device s for each
    parameter, owned or not.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bucket_bytes: int = 64 * MIB,
        group: dist.ProcessGroup | None = None,
        delay_after: int | None = None,
    ) -> None:
        if bucket_bytes <= 0:
            raise UserError(f"OffloadedAdamW: bucket_bytes is {bucket_bytes}; give a size above 0")
        if delay_after is not None and delay_after < 0:
            raise UserError(f"OffloadedAdamW: delay_after is {delay_after}; give a number of steps, or None")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise UserError("OffloadedAdamW: no parameter requires a gradient; there is nothing to train")
        kinds = sorted({f"{parameter.dtype} on {parameter.device}" for parameter in trained})
        if len(kinds) > 1:
            raise UserError(
                f"OffloadedAdamW: trained parameters are {' and '.join(kinds)}; give them one type and device"
            )
        self._model = model
        self._group = group
        self._ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._delay_after = delay_after
        self._steps = 0
        self._device = trained[0].device
        self._copies = _Copies(self._device)
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._buckets = [
            _Bucket(parameters, self._rank, self._ranks, settings) for parameters in in_buckets(model, bucket_bytes)
        ]
        largest = max(self._buckets, key=lambda bucket: bucket.values.nbytes).values
        self._outgoing = [_Outgoing(largest, self._ranks) for _ in range(min(IN_FLIGHT, len(self._buckets)))]
        self._next = 0  # the bucket that leaves next: all ranks must send theirs in one order
        self._folded = 0  # backward calls since the last step
        self._thread = ThreadPoolExecutor(1) if delay_after is not None else None
        self._update: Future[None] | None = None
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @property
    def to_host(self) -> int:
        """Bytes that this rank has copied from the device to the host so far."""
        return self._copies.to_host

    @property
    def to_device(self) -> int:
        """Bytes that this rank has copied from the host to the device so far."""
        return self._copies.to_device

    @torch.no_grad()
    def step(self) -> None:
        """One update with the gradients since the last; raises :class:`UserError` where there was no backward."""
        if not self._folded:
            raise UserError("OffloadedAdamW.step: no backward since the last step; there are no gradients")
        delayed = self._delay_after is not None and self._steps >= self._delay_after
        with self._copies.beside():
            if delayed:
                self._publish_all()  # the update that the end of backward has waited for
                self._update = self._thread.submit(self._update_all)
            else:
                for bucket in self._buckets:  # the next bucket's Adam runs while this one's values travel
                    bucket.update()
                    self._publish(bucket)
        self._copies.rejoin()
        self._folded = 0
        self._steps += 1

    @torch.no_grad()
    def flush(self) -> None:
        """Wait for a delayed update and hand it to the device; without one under way nothing happens."""
        if self._update is None:
            return
        self._wait()
        self._copies.arrived(self._copies.mark())  # the buffers still hold the values that the last step sent
        with self._copies.beside():
            self._publish_all()
        self._copies.rejoin()

    def bytes_by_role(self) -> dict[str, Mapping[str, int]]:
        """``{"device": {category: bytes}, "host": {category: bytes}}`` of this rank, between two steps.

        Categories are the ledger's. On a CPU both are RAM, and roles are all that tells them apart.
        """
        states = sum(bucket.states_bytes() for bucket in self._buckets)
        device = {
            "parameters": sum(p.numel() * p.element_size() for p in self._model.parameters())
            + sum(bucket.padding_bytes for bucket in self._buckets),
            "communication buffers": sum(outgoing.nbytes for outgoing in self._outgoing),
        }
        host = {
            "gradients": sum(bucket.gradient.nbytes for bucket in self._buckets),
            "optimizer states": states,
            "communication buffers": sum(bucket.staging.nbytes for bucket in self._buckets),
        }
        return {
            name: {category: held.get(category, 0) for category in CATEGORIES}
            for name, held in (("device", device), ("host", host))
        }

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._next == 0 and all(len(b.missing) == len(b.parameters) for b in self._buckets):  # first of a backward
            Variable._execution_engine.queue_callback(self._finish)
        self._bucket_of[parameter].missing.discard(parameter)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send(self._buckets[self._next], self._outgoing[self._next % len(self._outgoing)])
            self._next += 1

    def _send(self, bucket: "_Bucket", outgoing: "_Outgoing") -> None:
        """Start a full bucket's way to the host; its gradients are free for reuse when this returns."""
        whole = outgoing.whole[: bucket.values.numel()]
        share = outgoing.share[: bucket.share.numel()]
        self._copies.wait_for(outgoing.left)  # the bucket that used this buffer before
        torch.cat([parameter.grad.reshape(-1) for parameter in bucket.parameters], out=whole[: bucket.elements])
        whole[bucket.elements :].zero_()
        for parameter in bucket.parameters:
            parameter.grad = None
        work = None
        if self._ranks > 1:
            whole /= self._ranks
            work = dist.reduce_scatter_tensor(share, whole, group=self._group, async_op=True)
        with self._copies.beside():
            if work is not None:
                work.wait()
            self._copies.down(bucket.staging, share if work is not None else whole)
            outgoing.left = self._copies.mark()

    def _finish(self) -> None:
        """At the end of backward: gradients have arrived, and are added to those of earlier backward calls."""
        late = {parameter for bucket in self._buckets for parameter in bucket.missing}
        if late:
            name = next(name for name, parameter in self._model.named_parameters() if parameter in late)
            raise UserError(
                f"OffloadedAdamW: backward made no gradient for {name} ({len(late)} such parameters); freeze it "
                "(requires_grad_(False)) before the optimizer is made, or use it"
            )
        self._wait()  # a delayed update still reads the gradients of the step before
        for outgoing in self._outgoing:
            self._copies.arrived(outgoing.left)
        for bucket in self._buckets:
            bucket.fold(first=self._folded == 0)
            bucket.missing = set(bucket.parameters)
        self._next = 0
        self._folded += 1

    def _wait(self) -> None:
        if self._update is not None:
            self._update.result()
            self._update = None

    def _update_all(self) -> None:
        for bucket in self._buckets:
            bucket.update()

    def _publish_all(self) -> None:
        for bucket in self._buckets:
            self._publish(bucket)

    def _publish(self, bucket: "_Bucket") -> None:
        """Give all ranks' devices this bucket's master values, in the parameters' own type."""
        bucket.staging.copy_(bucket.master.detach())
        self._copies.up(bucket.share, bucket.staging)
        if self._ranks > 1:
            dist.all_gather_into_tensor(bucket.values, bucket.share, group=self._group)


class _Bucket:
    """Parameters that lie in one flat tensor on the device, and what this rank keeps of them on the host."""

    def __init__(self, parameters: list[nn.Parameter], rank: int, ranks: int, settings: Mapping[str, Any]) -> None:
        self.parameters = parameters
        self.missing = set(parameters)
        self.elements = sum(parameter.numel() for parameter in parameters)
        owned = -(-self.elements // ranks)
        first = parameters[0]
        self.values = torch.zeros(owned * ranks, dtype=first.dtype, device=first.device)
        self.share = self.values[owned * rank : owned * (rank + 1)]
        for parameter, place in zip(parameters, self.values.split(self._sizes(owned * ranks)), strict=False):
            parameter.data = place.view_as(parameter).copy_(parameter.data)
        pinned = first.device.type == "cuda"  # only such memory is copied while the host and the device go on working
        self.staging = torch.zeros(owned, dtype=first.dtype, pin_memory=pinned)
        self.gradient = torch.zeros(owned)
        self.master = self.share.detach().to("cpu", torch.float32, copy=True).requires_grad_()
        self.master.grad = self.gradient
        self._adam = torch.optim.AdamW([self.master], fused=True, **settings)

    @property
    def padding_bytes(self) -> int:
        """Bytes behind the last parameter, so that every rank owns as many elements."""
        return (self.values.numel() - self.elements) * self.values.element_size()

    def states_bytes(self) -> int:
        """Master and both moments; the moments come with the first update."""
        moments = [t for t in self._adam.state.get(self.master, {}).values() if t.numel() == self.master.numel()]
        return self.master.nbytes + sum(moment.nbytes for moment in moments)

    def fold(self, first: bool) -> None:
        """Add what has arrived to the fp32 gradient; the first of a step replaces what is there."""
        if first:
            self.gradient.copy_(self.staging)
        else:
            self.gradient.add_(self.staging)

    def update(self) -> None:
        """One step of Adam on the host."""
        self._adam.step()

    def _sizes(self, total: int) -> list[int]:
        return [*(parameter.numel() for parameter in self.parameters), total - self.elements]


class _Outgoing:
    """Room on the device for one bucket's gradients on their way to the host, and for this rank's share of them."""

    def __init__(self, largest: Tensor, ranks: int) -> None:
        self.whole = torch.empty_like(largest)
        self.share = self.whole.new_empty(largest.numel() // ranks if ranks > 1 else 0)
        self.left: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.whole.nbytes + self.share.nbytes


class _Copies:
    """Copies between device and host, on a stream of their own where the device is a GPU; counts their bytes.

    Without a GPU every copy is done when the call returns, and there is nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.to_host = 0
        self.to_device = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What the block starts comes after what the current stream has to do so far, and beside what follows."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def rejoin(self) -> None:
        """What the current stream gets from now on comes after the copies."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def down(self, host: Tensor, device: Tensor) -> None:
        """Device to host; the current stream is that of :meth:`beside`."""
        host.copy_(device, non_blocking=True)
        self.to_host += host.nbytes

    def up(self, device: Tensor, host: Tensor) -> None:
        """Host to device; the current stream is that of :meth:`beside`."""
        device.copy_(host, non_blocking=True)
        self.to_device += host.nbytes

    def mark(self) -> Any:
        """A mark behind the copies so far, for the two methods below; None without a stream."""
        return self._stream.record_event() if self._stream is not None else None

    def wait_for(self, mark: Any) -> None:
        """Let the current stream wait for a mark."""
        if mark is not None:
            mark.wait()

    def arrived(self, mark: Any) -> None:
        """Let the host wait for a mark."""
        if mark is not None:
            mark.synchronize()
