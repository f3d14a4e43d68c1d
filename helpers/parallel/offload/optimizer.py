"""AdamW whose states are in host memory."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import nn

from helpers.errors import UserError
from helpers.memory.categories import CATEGORIES
from helpers.memory.units import MIB
from helpers.parallel.buckets import BackwardHooks, assign_buckets, pop_gradient
from helpers.parallel.offload.bucket import OffloadedBucket, SendBuffer
from helpers.parallel.offload.copies import HostCopies

IN_FLIGHT = 2  # buckets whose gradients travel to the host while backward goes on


class OffloadedAdamW:
    """Run AdamW in host memory; the parameters stay on their device.

        optimizer = OffloadedAdamW(model, lr=1e-4)
        model(**batch).loss.backward()      # gradients leave the device as they are made; .grad is None afterwards
        optimizer.step()

    Several backward calls before a step add up, in fp32, on the host; one that fails adds nothing. With a process group
    each rank keeps and updates 1/N of every bucket, as in ZeRO-2: gradients are reduce-scattered (their mean) before
    they leave, updated values all-gathered. All ranks must start with equal parameters and use each parameter in every
    backward.

    Bytes, for parameters of s bytes on the device: on the host 16 + s per parameter that this rank owns (Adam's two
    moments, master and gradient in fp32; s in page-locked memory, through which gradients come and values go). On the
    device s per parameter, owned or not, and the buffers of ``IN_FLIGHT`` buckets.

    Args:
        model: Its parameters with ``requires_grad`` are trained; they must have one dtype and device.
        lr: AdamW's learning rate.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's term that keeps the denominator above 0.
        weight_decay: AdamW's decoupled weight decay.
        bucket_bytes: Bytes of gradients per copy.
        group: Ranks that share the optimizer; all by default.
        delay_after: Steps after which updates come one step late (the paper's delayed parameter update, section 5.2):
            :meth:`step` then gives the device the result of the step before, and Adam runs during the next forward and
            backward. None never delays. :meth:`flush` fetches the last result.

    Attributes:
        buckets: In the order in which gradients are sent.
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
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        rank = dist.get_rank(group) if dist.is_initialized() else 0
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.buckets = [
            OffloadedBucket(parameters, rank, self._world_size, settings)
            for parameters in assign_buckets(model, bucket_bytes)
        ]
        largest = max((bucket.flat for bucket in self.buckets), key=lambda flat: flat.nbytes)
        send_buffers = [SendBuffer(largest, self._world_size) for _ in self.buckets[:IN_FLIGHT]]
        self._send_buffers = send_buffers
        self._send_buffer_of = {
            bucket: send_buffers[index % len(send_buffers)] for index, bucket in enumerate(self.buckets)
        }
        self._copies = HostCopies(trained[0].device)
        self._steps = 0
        self._backwards = 0  # since the last step
        self._delay_after = delay_after
        self._thread = ThreadPoolExecutor(1)  # starts with the first delayed update
        self._delayed_update: Future[None] | None = None
        self._hooks = BackwardHooks(self, model, self.buckets, self._send_gradients, self._end_backward)

    @property
    def bytes_to_host(self) -> int:
        """Bytes that this rank has copied from the device to the host so far."""
        return self._copies.bytes_to_host

    @property
    def bytes_to_device(self) -> int:
        """Bytes that this rank has copied from the host to the device so far."""
        return self._copies.bytes_to_device

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters with the gradients since the last step.

        Raises:
            UserError: If there was no backward.
        """
        self._hooks.recover()
        if not self._backwards:
            raise UserError("OffloadedAdamW.step: no backward since the last step; there are no gradients")
        with self._copies.side_stream():
            if self._delay_after is not None and self._steps >= self._delay_after:
                self._publish_all()  # the update that the end of backward has waited for
                self._delayed_update = self._thread.submit(self._update_all)
            else:
                for bucket in self.buckets:  # the next bucket's Adam runs while this one's values travel
                    bucket.adam.step()
                    self._publish(bucket)
        self._copies.wait_stream()
        self._backwards = 0
        self._steps += 1

    @torch.no_grad()
    def flush(self) -> None:
        """Wait for a delayed update and copy it to the device; without one, do nothing."""
        if self._delayed_update is None:
            return
        self._wait_for_update()
        self._copies.synchronize(self._copies.record_event())  # the last step may still be reading the staging tensors
        with self._copies.side_stream():
            self._publish_all()
        self._copies.wait_stream()

    def bytes_by_role(self) -> dict[str, Mapping[str, int]]:
        """Count this rank's bytes between two steps, by what they are for: on a CPU both sides are RAM.

        Returns:
            ``{"device": {category: bytes}, "host": {category: bytes}}``, with the ledger's categories.
        """
        device = {
            "parameters": sum(p.numel() * p.element_size() for p in self._model.parameters())
            + sum(bucket.padding_bytes for bucket in self.buckets),
            "communication buffers": sum(buffer.nbytes for buffer in self._send_buffers),
        }
        host = {
            "gradients": sum(bucket.gradient.nbytes for bucket in self.buckets),
            "optimizer states": sum(bucket.optimizer_state_bytes for bucket in self.buckets),
            "communication buffers": sum(bucket.staging.nbytes for bucket in self.buckets),
        }
        return {
            role: {category: sizes.get(category, 0) for category in CATEGORIES}
            for role, sizes in (("device", device), ("host", host))
        }

    def _send_gradients(self, bucket: OffloadedBucket) -> None:
        """Start to copy a full bucket to the host; when this returns, its gradients' memory is free for reuse."""
        buffer = self._send_buffer_of[bucket]
        flat = buffer.flat[: bucket.flat.numel()]  # [world_size * shard_size]
        shard = buffer.shard[: bucket.shard_size] if self._world_size > 1 else flat  # [shard_size]
        self._copies.wait_event(buffer.sent)  # until then the buffer is full of an earlier bucket
        torch.cat([pop_gradient(parameter).reshape(-1) for parameter in bucket.parameters], out=flat[: bucket.elements])
        flat[bucket.elements :].zero_()
        work = None
        if self._world_size > 1:
            flat /= self._world_size  # the sum over ranks is then a mean
            work = dist.reduce_scatter_tensor(shard, flat, group=self._group, async_op=True)
        with self._copies.side_stream():
            if work is not None:
                work.wait()
            self._copies.copy_to_host(bucket.staging, shard)
            buffer.sent = self._copies.record_event()

    def _end_backward(self, complete: bool) -> None:
        self._wait_for_update()  # a delayed update still reads the gradients of the step before
        for buffer in self._send_buffers:
            self._copies.synchronize(buffer.sent)
        if not complete:  # as if this backward had not been
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.grad = None
            return
        for bucket in self.buckets:
            bucket.accumulate(first=self._backwards == 0)
        self._backwards += 1

    def _wait_for_update(self) -> None:
        if self._delayed_update is not None:
            self._delayed_update.result()
            self._delayed_update = None

    def _update_all(self) -> None:
        for bucket in self.buckets:
            bucket.adam.step()

    def _publish_all(self) -> None:
        for bucket in self.buckets:
            self._publish(bucket)

    def _publish(self, bucket: OffloadedBucket) -> None:
        """Copy a bucket's master values to the device, in the parameters' dtype, and gather all ranks' shards."""
        bucket.staging.copy_(bucket.master.detach())
        self._copies.copy_to_device(bucket.shard, bucket.staging)
        if self._world_size > 1:
            dist.all_gather_into_tensor(bucket.flat, bucket.shard, group=self._group)
