"""Predict what ZeRO-1 and ZeRO-2 hold of gradients when they reduce them: full gradients, copies, and a norm in fp64.

Read off DeepSpeed 0.19's runtime/zero/stage_1_and_2.py; tests/test_reduced.py watches DeepSpeed do it.
"""

from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.states import FP64, States, largest_trained


def beside_bucket(configuration: Configuration, elements: int) -> int:
    """Count the bytes of a gradient that is reduced in place, or moves from the bucket to host memory.

    A gradient larger than the bucket is not copied. If the optimizer is in host memory, the norm of this rank's part is
    computed first, from a copy in fp64 (``set_norm_for_param_grad_in_gpu``).

    Args:
        configuration: The job.
        elements: Number of elements of the gradient.

    Returns:
        Bytes.
    """
    c = configuration
    whole = elements * c.trainable_bytes if elements > c.strategy.reduce_bucket_size else 0
    part = min(elements, -(-c.trainable_parameters // c.strategy.world_size))
    return whole + (FP64 * part if c.strategy.offload_optimizer else 0)


def at_output(configuration: Configuration, states: States) -> int:
    """Count the gradients when that of the output layer is reduced.

    It stays until the last norm's gradient arrives, or, if it fits the bucket, until it has been copied there. In the
    first case this rank's partition exists already.
    """
    c, elements = configuration, configuration.shape.embedding
    if fits_bucket(c):
        return max(elements * c.trainable_bytes, beside_bucket(c, elements))
    return states.kept + beside_bucket(c, elements)


def fits_bucket(configuration: Configuration) -> bool:
    """Return whether DeepSpeed's bucket takes in the gradient of the output layer.

    It is then reduced when the bucket is full, while backward is within a layer.
    """
    return configuration.shape.embedding <= configuration.strategy.reduce_bucket_size


def at_embedding(configuration: Configuration) -> int:
    """Count the embedding's gradient, the last one, before it is copied to the bucket or this rank's partition."""
    c, elements = configuration, configuration.shape.embedding
    return max(elements * c.trainable_bytes, beside_bucket(c, elements))


def after_backward(configuration: Configuration, states: States) -> int:
    """Count the gradients when ZeRO-1 without overlap_comm reduces them: its own partition exists next to all of them.

    Those copied to the bucket have been freed by then.
    """
    c = configuration
    bucketed = min(states.buckets, c.trainable_parameters * c.trainable_bytes)
    copied = beside_bucket(c, largest_trained(c)) if c.strategy.offload_optimizer else states.kept
    return states.gradients + copied - bucketed


def of_two_ranks(configuration: Configuration, states: States) -> int:
    """Count the gradients when the bucket holds those of two ranks: it is flattened into a copy (``allreduce_bucket``).

    A bucket of one rank's is reduced in place.
    """
    c = configuration
    bucket = min(c.strategy.reduce_bucket_size, c.trainable_parameters) * c.trainable_bytes
    return states.kept + bucket
