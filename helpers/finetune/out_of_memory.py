"""Say what would fit when a GPU's memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from helpers.errors import UserError
from helpers.finetune.dataset import Limits
from helpers.finetune.job import Job
from helpers.memory.predict import Configuration, read_shape
from helpers.memory.predict.jobs import configuration_of
from helpers.memory.predict.planner import fits, label, sort_strategies
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
    """Tell what would fit the smallest GPU, according to the prediction (:mod:`helpers.memory.predict`).

    Args:
        job: The checked job.
        world_size: Number of ranks.

    Returns:
        One line for people.
    """
    sizes = [gpu.total_bytes for gpu in job.machine.gpus if gpu.total_bytes is not None]
    limits = Limits(job.config.max_input_length, job.config.max_output_length)
    longest = min(job.data.reports[0].tokens.max, limits.max_length)
    try:
        asked = configuration_of(
            job.config,
            job.deepspeed,
            shape=read_shape(job.model_dir),
            world_size=world_size,
            sequence_length=longest,
        )
        fit = fits(asked, min(sizes, default=0))
        remedies = _remedies(asked, min(sizes))
    except UserError:  # no GPU of a known size, or a job that no prediction covers
        return _PLAIN_ADVICE
    predicted = f"{fit.needed / GIB:.1f} GiB are predicted for this job, {fit.usable / GIB:.1f} usable"
    if fit:
        return f"{predicted}: it should fit, so look with nvidia-smi for other processes; otherwise {_PLAIN_ADVICE}"
    return f"{predicted}; " + (f"what would fit: {', or '.join(remedies)}" if remedies else "nothing would fit here")


def _remedies(asked: Configuration, gpu_bytes: int) -> list[str]:
    """List changes that make a configuration fit, the cheapest first: checkpointing, fewer rows, another strategy."""
    remedies = []
    lean = replace(asked, checkpointing=True)
    if not asked.checkpointing and (fit := fits(lean, gpu_bytes)):
        remedies.append(f"gradient_checkpointing: true ({fit.needed / GIB:.1f} GiB)")
    rows = asked.micro_batch_size
    while rows > 1:
        rows //= 2
        if fit := fits(replace(asked, micro_batch_size=rows), gpu_bytes):
            steps = -(-asked.micro_batch_size * asked.gradient_accumulation_steps // rows)
            remedies.append(
                f"per_device_train_batch_size: {rows} with gradient_accumulation_steps: {steps} "
                f"({fit.needed / GIB:.1f} GiB)"
            )
            break
    best = sort_strategies(asked, asked.strategy.world_size, gpu_bytes)[0]
    if best.fit and not (remedies and best.configuration.strategy.kind == asked.strategy.kind):
        remedies.append(f"{label(best.configuration)} ({best.fit.needed / GIB:.1f} GiB)")
    return remedies
