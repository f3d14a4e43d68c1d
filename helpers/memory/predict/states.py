"""Model states: parameters, gradients, optimizer states, and the buffers that a strategy keeps for its communication.

Two views. :func:`published_states` is the formula of the ZeRO paper. :class:`States` is what the libraries really
allocate (torch DDP, DeepSpeed 0.19), which differs where a formula is silent: fp32 adapters, DDP's buckets, the fp32
copy of a gradient partition during the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.config.deepspeed import reduce_buffer_bytes
from helpers.errors import UserError
from helpers.memory.predict.configuration import Configuration

ADAM = 2
FP32 = 4
# bitsandbytes at 4 bits with double quantisation (QLoRA, Dettmers 2023): a scale of one byte for each block of 64
# weights, an fp32 scale for each 256 of those. Beside every matrix: the tables of 16 and 256 levels, and the scales'
# mean, in fp32.
BLOCK_4BIT = 64
BLOCK_SCALES = 256
TABLES_4BIT = (16 + 256 + 1) * FP32


@dataclass(frozen=True)
class States:
    """Bytes on one GPU.

    ``resident`` is there all the time; ``gradients`` grows during backward to that size; ``step`` is there only while
    the optimizer works (beside ``gradients``); ``buckets`` from the first gradient to the end of backward.
    ``gathered`` is the most that ZeRO-3 holds of other ranks' parameters at once. ``replaced`` is what DDP's first
    buckets still hold in the second step, until its first gradient is reduced.
    """

    resident: Mapping[str, int]
    gradients: int
    step: int
    buckets: int = 0
    gathered: int = 0
    replaced: int = 0


def published_states(parameters: int, zero_stage: int, world_size: int, *, tensor: int = 1, pipeline: int = 1) -> int:
    """Bytes of model states per GPU with 16-bit weights and Adam in fp32 (Rajbhandari 2019, figure 1).

    16Ψ; ZeRO-1 4Ψ + 12Ψ/N; ZeRO-2 2Ψ + 14Ψ/N; ZeRO-3 16Ψ/N. Tensor and pipeline parallelism divide Ψ before that:
    each of their ranks owns parameters/(tensor x pipeline). Raises UserError for a stage that does not exist.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise UserError(f"ZeRO stage {zero_stage} does not exist; choose 0 (none), 1, 2 or 3")
    for name, value in (
        ("parameters", parameters),
        ("world_size", world_size),
        ("tensor", tensor),
        ("pipeline", pipeline),
    ):
        if value < 1:
            raise UserError(f"published_states: {name} is {value}; give a whole number above 0")
    own = -(-parameters // (tensor * pipeline))
    whole, shared = {0: (16, 0), 1: (4, 12), 2: (2, 14), 3: (0, 16)}[zero_stage]
    return whole * own + -(-shared * own // world_size)


def matrix_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a matrix quantised by bitsandbytes to 8 or 4 ``bits``, its scales and tables included.

    8: a byte a weight, an fp32 scale a row. 4: half a byte a weight, 8/64 bit and 32/(64 x 256) bit for the scales.
    """
    if bits == 8:
        return rows * columns + rows * FP32
    blocks = -(-rows * columns // BLOCK_4BIT)
    return -(-rows * columns // 2) + blocks + -(-blocks // BLOCK_SCALES) * FP32 + TABLES_4BIT


def base_bytes(configuration: Configuration) -> int:
    """Bytes of the frozen weights, quantised where the configuration says so.

    transformers quantises every matrix of the layers and leaves the embedding, the output layer, biases and norms in
    the type of the residual stream.
    """
    c = configuration
    if c.quantization_bits == 16:
        return c.frozen_parameters * c.residual_bytes
    quantised = sum(matrix_bytes(rows, columns, c.quantization_bits) for rows, columns in c.shape.linears.values())
    return (
        c.shape.layers * quantised + (c.frozen_parameters - c.shape.layers * c.shape.layer_matrices) * c.residual_bytes
    )


def states(configuration: Configuration) -> States:
    """What this configuration's strategy allocates for model states."""
    c = configuration
    stage = c.strategy.zero_stage
    if stage == 0:
        return _replicated(c)
    return _zero_3(c) if stage == 3 else _zero_1_2(c)


def _replicated(c: Configuration) -> States:
    """One process, or DDP, whose buckets hold a copy of all gradients (torch/csrc/distributed/c10d/reducer.cpp).

    DDP makes its buckets anew before the second forward, in the order in which gradients came. The first ones are not
    gone then: ProcessGroupNCCL.cpp stashes what a collective uses (``stashed_for_allocator_safety_``); DDP waits for
    the collective's future, which leaves the stash; NCCL's watchdog, which looks every 100 ms, hands it over, and the
    next collective after that drops it. Whether that is before the second step's logits depends on the time a step
    takes, so this is the larger of both. An H100 held one copy of the gradients more in full training
    (notebooks/results/prediction.json); over gloo there is none, and that the stash is the reason is inferred.
    """
    trained = c.trainable_parameters * c.trainable_bytes
    buckets = trained if c.strategy.kind == "ddp" else 0
    resident = {
        "parameters": base_bytes(c) + trained,
        "optimizer states": ADAM * trained,
        "communication buffers": buckets,
    }
    return States(MappingProxyType(resident), gradients=trained, step=0, replaced=buckets)


def _zero_1_2(c: Configuration) -> States:
    """deepspeed/runtime/zero/stage_1_and_2.py.

    Resident: the flat 16-bit parameters, this rank's fp32 partition and Adam's two states of it. Backward: stage 2
    keeps this rank's part of the gradients (``grads_in_partition``), stage 1 all; ``setup_buckets`` allocates the
    bucket, two with overlap_comm, at the first gradient. Step: the part once more, flat, and once in fp32. With the
    optimizer in host memory stage 2's gradients go there from the bucket.
    """
    trained, world_size, strategy = c.trainable_parameters, c.strategy.world_size, c.strategy
    size = c.trainable_bytes
    part = -(-trained // world_size)
    on_gpu = not strategy.offload_optimizer
    resident = {
        "parameters": base_bytes(c) + trained * size,
        "optimizer states": (1 + ADAM) * FP32 * part if on_gpu else 0,
    }
    gradients = trained if strategy.zero_stage == 1 else part if on_gpu else 0
    buckets = reduce_buffer_bytes(strategy.reduce_bucket_size, strategy.overlap_comm, size)
    return States(
        MappingProxyType(resident), gradients * size, step=(size + FP32) * part if on_gpu else 0, buckets=buckets
    )


def _zero_3(c: Configuration) -> States:
    """deepspeed/runtime/zero/stage3.py and partitioned_param_coordinator.py.

    Every parameter is partitioned. Resident besides: ``grad_partitions_flat_buffer`` and one reduce bucket, both made
    at the start and of the weights' type. Gathered parameters stay below stage3_max_live_parameters; with one rank
    nothing is gathered. The step flattens the gradients of one sub-group at a time and, where they are in 16 bit, makes
    fp32 ones of that (``_prepare_fp32_grad_for_sub_group``).
    """
    world_size, strategy = c.strategy.world_size, c.strategy
    part = -(-c.trainable_parameters // world_size)
    frozen = -(-base_bytes(c) // world_size)
    on_gpu = not strategy.offload_optimizer
    resident = {
        "parameters": 0 if strategy.offload_parameters else frozen + part * c.trainable_bytes,
        "gradients": part * c.residual_bytes if on_gpu else 0,
        "optimizer states": (1 + ADAM) * FP32 * part if on_gpu else 0,
        "communication buffers": strategy.reduce_bucket_size * c.residual_bytes,
    }
    gathers = world_size > 1 or strategy.offload_parameters
    live = min(strategy.max_live_parameters, c.frozen_parameters + c.trainable_parameters) if gathers else 0
    flat = c.residual_bytes if c.residual_bytes < FP32 else 0
    step = (flat + FP32) * min(strategy.sub_group_size, part) if on_gpu else 0
    return States(MappingProxyType(resident), gradients=0, step=step, gathered=live * c.residual_bytes)
