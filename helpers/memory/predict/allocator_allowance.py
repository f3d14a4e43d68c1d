"""Predict what torch's caching allocator holds beyond the tensors: rounded sizes, unusable holes, free segments.

The causes below were inferred from runs on an H100 (notebooks/results/prediction.json). With expandable segments, two
configurations added later are within 2 %. With the default allocator the runs agree to 11 %.
"""

from collections.abc import Mapping

from helpers.memory.allocator import LARGE_BUFFER, SMALL_BUFFER, segment_share
from helpers.memory.predict import constants, flat_tensors
from helpers.memory.predict.saved_tensors import FP32, saved_checkpoints, total_bytes
from helpers.memory.predict.step import LOSS_BACKWARD, REDUCTIONS, STEP, Step


def allowance_bytes(step: Step, sizes: Mapping[str, int]) -> int:
    """Predict the bytes that the allocator holds beyond the tensors.

    Expandable segments grow by a page at their end, one segment per pool (``map_block`` in CUDACachingAllocator.cpp):
    the tensors are rounded up, and the small pool adds a page. A hole remains if every later tensor is larger than it:
    the block of the 16-bit logits once the loss asks for fp32 ones, or what flattening left behind. Only the larger of
    the two counts, because the other can be placed inside it.

    DeepSpeed's flat tensors of all parameters are simulated one by one (flat_tensors.py).

    The default allocator, moreover, cannot join free blocks of different segments. Only the clear causes are derived
    here; the rest depends on the order of every allocation.

    Args:
        step: The step of the configuration.
        sizes: Bytes of tensors at each phase of the step.
    """
    c = step.configuration
    if c.expandable_segments:
        offloads = c.strategy.offload_optimizer or c.strategy.offload_parameters
        if c.strategy.zero_stage and c.lora is None and not offloads:
            most = max(sizes.values())
            return max(flat_tensors.reserved_bytes(step, sizes) - most, _logits_block(step)) + SMALL_BUFFER
        holes = max(_logits_block(step), _left_by_flattening(step, sizes)) + _fetched_early(step)
        return -max(sizes.values()) % LARGE_BUFFER + SMALL_BUFFER + holes
    return _fragmented(step) + _left_by_flattening(step, sizes) + _fetched_early(step) + _beside_buckets(step, sizes)


def _logits_block(step: Step) -> int:
    """Return the size of the 16-bit logits' block: free when the loss asks for fp32 ones, but too small for them."""
    c = step.configuration
    return step.logits * c.compute_bytes if c.compute_bytes < FP32 else 0


def _fragmented(step: Step) -> int:
    """Predict the holes that activations and logits leave.

    With sequences of one length: each saved tensor's share of its segment, and the block of the 16-bit logits. With
    sequences of different lengths: the measured share of the activations, which includes both.
    """
    saved = [*step.saved, *(step.layer if step.configuration.checkpointing else [])]
    if step.configuration.padded:
        return int(constants.FRAGMENTED_SHARE_OF_ACTIVATIONS * total_bytes(saved))
    return _logits_block(step) + sum(max(0, t.count) * (segment_share(t.size) - t.size) for t in saved)


def _left_by_flattening(step: Step, sizes: Mapping[str, int]) -> int:
    """Predict the free segments that DeepSpeed's flat tensors cannot use, because none is large enough by itself.

    First, the trained parameters as the model was built with them: DeepSpeed flattens them into new memory if the GPU
    has room (``flatten_on_accelerator`` in stage_1_and_2.py), ZeRO-3 only those of this rank, and none that are in host
    memory. Second, this rank's flat gradients once more. That these are the two is inferred: ZeRO-1 and ZeRO-2 held
    4.00 bytes per parameter beyond their tensors (notebooks/results/prediction.json), 6.00 with buckets of 1 GB.

    Those runs peaked in the optimizer's step. If ZeRO-1 or ZeRO-2 peak before it, activations use the memory of the
    flat gradients: chapters 06 and 07 held 2.2 bytes per parameter, of which the built ones are 2. And expandable
    segments leave one free block as large as the fp32 gradients, with which DeepSpeed initialises Adam's states. If
    activations leave enough of it, the flat gradients lie there: "wide, full, ZeRO-2, checkpointing" held 2.0.
    """
    c, states = step.configuration, step.states
    if not c.strategy.zero_stage or c.strategy.offload_parameters:
        return 0
    partition = -(-c.trainable_parameters // (c.strategy.world_size if c.strategy.zero_stage == 3 else 1))
    gradients = max(states.kept, states.resident.get("gradients", 0))
    built = partition * c.trainable_bytes
    if c.strategy.zero_stage < 3:
        # Reductions use the memory of the later flat gradients, and free it before.
        before = max(size for phase, size in sizes.items() if phase not in (STEP, *REDUCTIONS))
        room = built + gradients // c.trainable_bytes * FP32 - gradients
        if before > sizes[STEP] or (c.expandable_segments and before - sum(states.resident.values()) <= room):
            gradients = 0
    return built + gradients


def _fetched_early(step: Step) -> int:
    """Predict the blocks of offloaded checkpoints that backward cannot use again in time.

    The copies from host memory run on a stream of their own. Python runs far ahead of the GPU, and a block that another
    stream has used is free only when that stream has got there (``record_stream``). So each layer's input takes new
    memory. That it is every layer's is inferred: lora_14gb.yaml on one GPU (finetune_6b.json).
    """
    c = step.configuration
    if not c.offloaded_checkpoints:
        return 0
    layer_input = saved_checkpoints(c)[0]
    return (c.shape.layers - layer_input.count) * layer_input.size


def _beside_buckets(step: Step, sizes: Mapping[str, int]) -> int:
    """Predict what backward of the loss leaves free when DeepSpeed allocates its buckets.

    If a bucket is larger than an fp32 copy of the logits, it cannot reuse their memory.
    """
    c, buckets = step.configuration, step.states.buckets
    bucket_bytes = c.strategy.reduce_bucket_size * c.trainable_bytes
    if c.padded or not buckets or bucket_bytes <= c.tokens * c.shape.vocab * FP32:
        return 0
    return max(0, sizes[LOSS_BACKWARD] + buckets - max(sizes.values()))
