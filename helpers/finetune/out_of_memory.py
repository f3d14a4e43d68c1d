"""Say what would fit when a GPU's memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from helpers.errors import UserError
from helpers.finetune.forecast import forecast, what_would_fit
from helpers.finetune.job import Job
from helpers.memory.predict.planner import fits
from helpers.memory.units import GIB

_PLAIN_ADVICE = "lower per_device_train_batch_size, or set gradient_checkpointing: true"


@contextmanager
def explained_out_of_memory(job: Job, rank: int, world_size: int) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one line with what would fit.

    Args:
        job: The checked job.
        rank: This process's rank.
        world_size: Number of ranks.

    Raises:
        UserError: GPU memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        # Drivers and libraries raise errors of their own kinds, with this text.
        if not isinstance(error, torch.OutOfMemoryError) and "CUDA out of memory" not in str(error):
            raise
        raise UserError(f"rank {rank} ran out of GPU memory; {advice(job, world_size)}") from error


def advice(job: Job, world_size: int) -> str:
    """Tell what the job needs its memory for and what would fit the smallest GPU, according to the prediction.

    Args:
        job: The checked job.
        world_size: Number of ranks.

    Returns:
        One line for people.
    """
    try:
        found = forecast(job, world_size)
    except UserError:  # a job that no prediction covers
        return _PLAIN_ADVICE
    if found.gpu_bytes is None:
        return _PLAIN_ADVICE
    fit = fits(found.worst, found.gpu_bytes)
    predicted = f"{fit.needed / GIB:.1f} GiB are predicted for this job ({found.items}), {fit.usable / GIB:.1f} usable"
    if fit:
        return f"{predicted}: it should fit, so look with nvidia-smi for other processes; otherwise {_PLAIN_ADVICE}"
    return f"{predicted}; {what_would_fit(found.worst, found.gpu_bytes)}"
