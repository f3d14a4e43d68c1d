"""Predict how long a step takes on H100s, to compare ways to run a job: people choose for speed as often as for memory.

Chapter 05's model (helpers/parallel/step_time.py): operations / rate + bytes / bandwidth, nothing overlaps. For small
batches it lacks the host, which needs a time per layer to start the kernels, however few tokens there are. The
constants are rates of single runs in notebooks/results; each line names its own. The order of all runs in
finetune_6b.json checks them (tests/test_step_seconds.py).
"""

from helpers.memory.predict.configuration import Configuration

# Operations per second: speed_6b.json, "packing", "lora_fast.yaml" and "lora_fp8.yaml", 4,096 tokens on one H100.
EAGER, COMPILED, COMPILED_FP8 = 347e12, 511e12, 713e12
# Seconds of the host per layer for forward and backward: "ZeRO-2, published 5e8 buckets, 1 GPU" and "lora_24gb.yaml".
HOST_EAGER, HOST_COMPILED = 9.3e-3, 3.4e-3
# And for ZeRO-3's hooks: "ZeRO-3, 1 GPU".
HOST_ZERO_3 = 12.7e-3
# Bytes per second that a GPU sends: "lora_fast.yaml, not compiled, ZeRO-3" on two GPUs against one, NVLink. Over PCIe,
# to host memory, what chapter 09 measured for pinned copies.
LINK, PCIE = 95e9, 50e9
# Parameters per second that DeepSpeed's Adam updates on 16 CPU threads: offload_6b.json, "24 GiB budget".
CPU_ADAM = 0.9e9


def step_seconds(configuration: Configuration, sent: int) -> float:
    """Predict the seconds of one optimizer step.

    Per parameter of a matrix and token, forward takes 2 operations, backward 4, or 2 if the matrix is frozen;
    checkpointing repeats forward. Attention takes 4 · length · width per layer and token forward, twice that backward.

    Args:
        configuration: The job.
        sent: Bytes that each GPU sends per step (``planner.traffic``).

    Returns:
        Seconds on H100s with NVLink.
    """
    c, shape = configuration, configuration.shape
    forward = 2 * (shape.layers * shape.layer_matrices + shape.embedding)
    # The rows of a pack do not see each other, and they are short.
    attention = 0 if c.packed else 4 * shape.layers * c.sequence_length * shape.query
    passes = (1 if c.lora else 2) + 1 + int(c.checkpointing)
    operations = c.tokens * (forward * passes + attention * (3 + int(c.checkpointing)))
    rate = (COMPILED_FP8 if c.fp8 else COMPILED) if c.compiled else EAGER
    host = HOST_COMPILED if c.compiled else HOST_EAGER
    if c.strategy.zero_stage == 3:
        host += HOST_ZERO_3
    host *= shape.layers * (1.5 if c.checkpointing else 1)
    seconds = c.gradient_accumulation_steps * max(operations / rate, host) + sent / LINK
    own = c.trainable_parameters / c.strategy.world_size
    if c.strategy.offload_optimizer:
        seconds += own / CPU_ADAM + own * 2 * c.trainable_bytes / PCIE
    if c.strategy.offload_parameters:
        everything = (c.frozen_parameters + c.trainable_parameters) * c.residual_bytes
        seconds += c.gradient_accumulation_steps * 2 * everything / c.strategy.world_size / PCIE
    return seconds
