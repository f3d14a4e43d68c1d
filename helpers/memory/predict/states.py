"""Predict model states: parameters, gradients, optimizer states, and the buffers of a strategy's communication.

There are two views. :func:`published_states` is the formula of the ZeRO paper. :class:`States` is what the libraries
really allocate (torch DDP, DeepSpeed 0.19). It adds what the formula leaves out: fp32 adapters, DDP's buckets, the fp32
copy of a gradient partition during the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.config.deepspeed import reduce_buffer_bytes
from helpers.errors import UserError
from helpers.memory.predict.configuration import Configuration

ADAM = 2
FP32, FP64 = 4, 8
# bitsandbytes at 4 bits with double quantisation (QLoRA, Dettmers et al. 2023, section 3): a scale of one byte per
# block of 64 weights, an fp32 scale per 256 of those. Each matrix adds the tables of 16 and 256 levels, and the scales'
# mean, in fp32.
BLOCK_4BIT = 64
BLOCK_SCALES = 256
TABLES_4BIT = (16 + 256 + 1) * FP32


@dataclass(frozen=True)
class States:
    """Bytes on one GPU.

    Attributes:
        resident: Allocated all the time, by item.
        gradients: Grows to this size during backward.
        kept: Gradients that are left when the optimizer's step begins.
        step: Allocated during the optimizer step only, besides the gradients.
        buckets: Allocated from the first gradient to the end of backward.
        replaced: DDP's first buckets, which stay allocated in the second step until its first gradient is reduced.
        at_once: Whether ``gradients`` are allocated whole at the first one.
    """

    resident: Mapping[str, int]
    gradients: int
    kept: int
    step: int
    buckets: int = 0
    replaced: int = 0
    at_once: bool = False


def published_states(parameters: int, zero_stage: int, world_size: int, *, tensor: int = 1, pipeline: int = 1) -> int:
    """Compute model states per GPU with 16-bit weights and Adam in fp32 (ZeRO, Rajbhandari et al. 2020, figure 1).

    16Ψ without ZeRO; ZeRO-1 4Ψ + 12Ψ/N; ZeRO-2 2Ψ + 14Ψ/N; ZeRO-3 16Ψ/N. Tensor and pipeline parallelism divide Ψ
    first: each of their ranks owns Ψ / (tensor · pipeline).

    Args:
        parameters: Ψ, all of them trained.
        zero_stage: 0 (none), 1, 2 or 3.
        world_size: N, the ranks that ZeRO partitions over.
        tensor: Tensor-parallel ranks.
        pipeline: Pipeline-parallel ranks.

    Returns:
        Bytes.

    Raises:
        UserError: The stage does not exist, or a number is below 1.
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
    """Compute the bytes of a matrix quantised to 8 or 4 ``bits``, with its scales and tables.

    8 bits, bitsandbytes' or fp8: a byte per weight, an fp32 scale per row. 4 bits, bitsandbytes': half a byte per
    weight, and 8/64 + 32/(64 · 256) bits per weight for the scales (QLoRA, Dettmers et al. 2023, section 3).
    """
    if bits == 8:
        return rows * columns + rows * FP32
    blocks = -(-rows * columns // BLOCK_4BIT)
    return -(-rows * columns // 2) + blocks + -(-blocks // BLOCK_SCALES) * FP32 + TABLES_4BIT


def base_bytes(configuration: Configuration) -> int:
    """Compute the bytes of the frozen weights, quantised as configured.

    transformers quantises every matrix of the layers and leaves the embedding, the output layer, biases and norms in
    the type of the residual stream.

    Args:
        configuration: The job.

    Returns:
        Bytes of all frozen weights, before ZeRO-3 partitions them.
    """
    c = configuration
    if not c.quantized:
        return c.frozen_parameters * c.residual_bytes
    bits = 8 if c.fp8 else c.quantization_bits
    quantised = sum(matrix_bytes(rows, columns, bits) for rows, columns in c.shape.linears.values())
    others = c.frozen_parameters - c.shape.layers * c.shape.layer_matrices
    second = c.shape.layer_matrices if c.fp8_transposed else 0  # a byte per weight
    return c.shape.layers * (quantised + second) + others * c.residual_bytes


def states(configuration: Configuration) -> States:
    """Predict what the configuration's strategy allocates for model states."""
    c = configuration
    stage = c.strategy.zero_stage
    if stage == 0:
        return _replicated(c)
    return _zero_3(c) if stage == 3 else _zero_1_2(c)


def _replicated(c: Configuration) -> States:
    """Predict one process, or DDP, whose buckets hold a copy of all gradients.

    DDP rebuilds its buckets before the second forward, in the order in which gradients arrived
    (torch/csrc/distributed/c10d/reducer.cpp). The first ones stay allocated for a while. ProcessGroupNCCL.cpp stashes
    what a collective uses (``stashed_for_allocator_safety_``), and DDP waits for the collective's future, which does
    not clear the stash. NCCL's watchdog hands the stash over, every 100 ms; the next collective after that drops it.
    The time per step decides if that happens before the second step's logits, so this predicts the larger case. In full
    training an H100 held one more copy of the gradients (notebooks/results/prediction.json); over gloo it did not.
    That the stash is the reason is inferred.
    """
    trained = c.trainable_parameters * c.trainable_bytes
    buckets = trained if c.strategy.kind == "ddp" else 0
    resident = {
        "parameters": base_bytes(c) + trained,
        "optimizer states": ADAM * trained,
        "communication buffers": buckets,
    }
    return States(MappingProxyType(resident), gradients=trained, kept=trained, step=0, replaced=buckets)


def _zero_1_2(c: Configuration) -> States:
    """Predict ZeRO-1 and ZeRO-2 (deepspeed/runtime/zero/stage_1_and_2.py).

    Resident: the flat 16-bit parameters, this rank's fp32 partition and Adam's two states of it. Backward: stage 2
    keeps this rank's partition of the gradients, allocated at the first one (``grads_in_partition``). Stage 1 keeps
    all until backward ends; with overlap_comm the partition, and of others those too large for the bucket, which are
    reduced where they are. ``setup_buckets`` allocates the bucket, two with overlap_comm, at the first gradient.
    Step: norms, in fp64 (``get_grad_norm_direct``), then the partition once more, flat, and once in fp32. With the
    optimizer in host memory, gradients go there from the bucket; a buffer for the largest one exists nevertheless
    (``temp_grad_buffer_for_gpu_offload``).
    """
    trained, world_size, strategy = c.trainable_parameters, c.strategy.world_size, c.strategy
    size = c.trainable_bytes
    partition = -(-trained // world_size)
    on_gpu = not strategy.offload_optimizer
    resident = {
        "parameters": base_bytes(c) + trained * size,
        "optimizer states": (1 + ADAM) * FP32 * partition if on_gpu else 0,
        "communication buffers": 0 if on_gpu else largest_trained(c) * size,
    }
    during_backward = strategy.zero_stage == 2 or strategy.overlap_comm
    gradients = trained
    if during_backward:
        others = 0 if strategy.zero_stage == 2 else _beyond_bucket(c) * (world_size - 1) // world_size
        gradients = others + (partition if on_gpu else 0)
    kept = partition if on_gpu else 0
    buckets = reduce_buffer_bytes(strategy.reduce_bucket_size, strategy.overlap_comm, size)
    step = max((size + FP32) * partition, FP64 * min(largest_trained(c), partition)) if on_gpu else 0
    return States(
        MappingProxyType(resident), gradients * size, kept * size, step, buckets=buckets, at_once=during_backward
    )


def sub_groups(configuration: Configuration) -> list[int]:
    """Count this rank's elements of each of ZeRO-3's sub-groups, which take whole parameters until they are full."""
    c = configuration
    if c.lora:
        return [-(-c.trainable_parameters // c.strategy.world_size)]
    layer = [rows * columns for rows, columns in c.shape.linears.values()]
    ends = [c.shape.embedding] if c.shape.tied else [c.shape.embedding] * 2
    groups = [0]
    for size in (*ends[:1], *layer * c.shape.layers, *ends[1:]):
        if groups[-1] >= c.strategy.sub_group_size:
            groups.append(0)
        groups[-1] += -(-size // c.strategy.world_size)
    return groups


def largest_trained(configuration: Configuration) -> int:
    """Count the elements of the largest trained parameter."""
    return max(_trained_matrices(configuration))


def _trained_matrices(c: Configuration) -> list[int]:
    """List the elements of each kind of trained matrix once; biases and norms are too small to matter."""
    if c.lora:
        return [c.lora.r * max(c.shape.linears[target]) for target in c.lora.targets]
    return [c.shape.embedding, *(rows * columns for rows, columns in c.shape.linears.values())]


def _beyond_bucket(c: Configuration) -> int:
    """Count the elements of the trained matrices that do not fit into DeepSpeed's bucket."""
    bucket = c.strategy.reduce_bucket_size
    if c.lora:
        pairs = [(c.lora.r * size) for target in c.lora.targets for size in c.shape.linears[target]]
        return c.shape.layers * sum(size for size in pairs if size > bucket)
    layer = sum(rows * columns for rows, columns in c.shape.linears.values() if rows * columns > bucket)
    ends = (1 if c.shape.tied else 2) * c.shape.embedding if c.shape.embedding > bucket else 0
    return c.shape.layers * layer + ends


def _zero_3(c: Configuration) -> States:
    """Predict ZeRO-3 (deepspeed/runtime/zero/stage3.py).

    Every parameter is partitioned; gathered.py follows which are whole. Also resident: ``grad_partitions_flat_buffer``
    and one reduce bucket, both allocated at the start in the weights' type. The step flattens the gradients of one
    sub-group at a time and copies 16-bit ones to fp32 (``_prepare_fp32_grad_for_sub_group``).
    """
    world_size, strategy = c.strategy.world_size, c.strategy
    partition = -(-c.trainable_parameters // world_size)
    frozen = -(-base_bytes(c) // world_size)
    on_gpu = not strategy.offload_optimizer
    resident = {
        "parameters": 0 if strategy.offload_parameters else frozen + partition * c.trainable_bytes,
        "gradients": partition * c.residual_bytes if on_gpu else 0,
        "optimizer states": (1 + ADAM) * FP32 * partition if on_gpu else 0,
        "communication buffers": strategy.reduce_bucket_size * c.residual_bytes,
    }
    flat = c.residual_bytes if c.residual_bytes < FP32 else 0
    norm = FP64 * -(-largest_trained(c) // world_size)  # of a gradient's part (get_grad_norm_direct)
    step = max((flat + FP32) * min(max(sub_groups(c)), partition), norm) if on_gpu else 0
    return States(MappingProxyType(resident), gradients=0, kept=0, step=step)
