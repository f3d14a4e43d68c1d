"""Simulate the allocator on DeepSpeed's flat tensors, which are too large for most free blocks.

If all parameters are trained, a few tensors decide what the allocator holds: DeepSpeed's flat copies, the logits, norms
in fp64 and Adam's states. Here only they are simulated one by one, with all others as small pieces, which fit anywhere.
Read off DeepSpeed 0.19's runtime/zero/stage_1_and_2.py and stage3.py, and what traced.py allocates.
"""

from collections.abc import Mapping

from helpers.memory.allocator import LARGE_BUFFER, SimulatedAllocator
from helpers.memory.predict.saved_tensors import FP32
from helpers.memory.predict.states import ADAM, FP64, largest_trained, sub_groups
from helpers.memory.predict.step import LOSS_BACKWARD, REDUCTIONS, STEP, Step

PIECES = 600  # of 20 MiB, unless there were more: that would take longer than the rest of a prediction


def reserved_bytes(step: Step, sizes: Mapping[str, int]) -> int:
    """Simulate the start and two steps of a job that trains all parameters under ZeRO, on the GPU.

    Args:
        step: The step of the configuration.
        sizes: Bytes of tensors at each phase of the step.

    Returns:
        The most that the allocator holds in its pools of large tensors.
    """
    heap = _Heap(step, sizes)
    groups = heap.start()
    for is_first in (True, False):
        heap.forward_and_backward(is_first)
        heap.optimizer(groups, is_first)
    return heap.allocator.reserved


class _Heap:
    def __init__(self, step: Step, sizes: Mapping[str, int]) -> None:
        self._step, self._sizes = step, sizes
        self._c = step.configuration
        self.allocator = SimulatedAllocator(self._c.expandable_segments)
        self._kept: list[int] = []

    def _pieces(self, nbytes: int) -> list[int]:
        size = max(LARGE_BUFFER, nbytes // PIECES)
        return [self.allocator.allocate(size) for _ in range(nbytes // size)]

    def _free(self, tensors: list[int]) -> None:
        for tensor in tensors:
            self.allocator.free(tensor)

    def start(self) -> list[int]:
        """Allocate what stays, and free what made it.

        Returns:
            Elements of each group of parameters that the optimizer updates at once.
        """
        c, allocate = self._c, self.allocator.allocate
        partition = -(-c.trainable_parameters // c.strategy.world_size)
        if c.strategy.zero_stage == 3:
            groups = sub_groups(c)
            allocate(partition * c.trainable_bytes)
            casts: list[int] = []
            for group in groups:  # the cast of the last group stays until there is another
                casts.append(allocate(FP32 * group))
                self._free(casts[:-1])
                del casts[:-1]
                allocate(FP32 * group)
            self._free(casts)
            allocate(self._step.states.resident["communication buffers"])
            allocate(partition * c.residual_bytes)
        else:
            groups = [partition]
            built = self._pieces(c.trainable_parameters * c.trainable_bytes)
            allocate(c.trainable_parameters * c.trainable_bytes)
            self._free(built)
            allocate(FP32 * partition)
        self._free([allocate(FP32 * group) for group in groups[:1]])  # initialize_optimizer_states
        return groups

    def forward_and_backward(self, is_first: bool) -> None:
        """Allocate activations, logits and gradients, and free all but the gradients that are kept."""
        c, states, allocate = self._c, self._step.states, self.allocator.allocate
        resident = sum(states.resident.values())
        fp32 = FP32 * self._step.logits
        if is_first:
            allocate(c.machine.cublas_workspace)
        saved = self._pieces(self._sizes[LOSS_BACKWARD] - resident - 3 * fp32)
        half = allocate(c.compute_bytes * self._step.logits)
        logits = [allocate(fp32), allocate(fp32)]
        self._free([half, logits.pop(0)])
        self._free([*logits, allocate(fp32), allocate(fp32)])
        output = [allocate(c.compute_bytes * self._step.logits), allocate(c.shape.embedding * c.trainable_bytes)]
        if is_first:
            allocate(c.machine.cublas_workspace)
        most = max(size for phase, size in self._sizes.items() if phase not in (STEP, LOSS_BACKWARD, *REDUCTIONS))
        buckets = [allocate(states.buckets)] if states.buckets else []
        kept = allocate(states.kept, 1 if c.strategy.overlap_comm else 0) if states.at_once else 0
        self._free([*output, *saved])
        self._free(self._pieces(most - resident - (states.kept if states.at_once else 0) - states.buckets))
        if states.kept and not states.at_once:
            gradients = self._pieces(states.gradients)
            kept = allocate(states.kept)
            self._free(gradients)
        self._free(buckets)
        self._kept = [kept] if states.kept else []

    def optimizer(self, groups: list[int], is_first: bool) -> None:
        """Allocate norms and flat gradients; Adam's states at the first step."""
        c, allocate = self._c, self.allocator.allocate
        part = largest_trained(c)
        if c.strategy.zero_stage == 3:
            part = -(-part // c.strategy.world_size)
        self._free([allocate(FP64 * min(part, sum(groups)))])
        for group in groups:
            flat = allocate(c.trainable_bytes * group)
            gradients = allocate(FP32 * group)
            self._free([flat, *self._kept])
            self._kept = []
            if is_first:
                for _ in range(ADAM):
                    allocate(FP32 * group)
            self._free([gradients])
