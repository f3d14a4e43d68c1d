"""Say what is about to be trained."""

from transformers import TrainingArguments

from helpers.config.deepspeed import bucket_warning
from helpers.finetune.job import Job
from helpers.finetune.method import DTYPES, Model, describe_method
from helpers.memory.timeline import Timeline
from helpers.memory.units import GIB
from helpers.quantization.library import full_numel

# An idle GPU holds far less; a desktop session may hold this much.
BUSY_BYTES = GIB


def count_parameters(model: Model, trainable: bool) -> int:
    """Count the trainable parameters, or the frozen ones; sharded or quantised ones count whole."""
    return sum(full_numel(p) for p in model.parameters() if p.requires_grad == trainable)


def describe_plan(job: Job, arguments: TrainingArguments, world_size: int, trainable: int) -> list[str]:
    """Describe what is about to be trained on what.

    Args:
        job: The checked job.
        arguments: The Trainer's.
        world_size: Number of ranks.
        trainable: Number of trainable parameters.

    Returns:
        One line for each fact.
    """
    micro_batch_size, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    batch_size = micro_batch_size * accumulation * world_size
    count = len(job.data.train)
    if arguments.max_steps > 0:
        amount = f"{arguments.max_steps:,} steps"
        epochs = arguments.max_steps * batch_size / count
    else:
        amount, epochs = f"{arguments.num_train_epochs:g} epochs", arguments.num_train_epochs
    strategy = f"DeepSpeed ZeRO-{job.zero_stage}" if job.deepspeed else "DDP" if world_size > 1 else "one process"
    unit = "packs" if job.config.speed.packing else "rows"
    warning = bucket_warning(job.deepspeed, trainable, DTYPES[job.precision].itemsize) if job.deepspeed else None
    return [
        *(str(report) for report in job.data.reports),
        f"{amount} of {batch_size} {unit} ({micro_batch_size} {unit} x {accumulation} micro-batches x "
        f"{world_size} ranks): {epochs:,.2f} passes over {count:,} {unit}",
        f"{strategy} on {world_size} rank(s), {job.precision if job.precision != 'no' else 'fp32'}",
        describe_method(job, trainable),
        *([f"warning: {warning}"] if warning else []),
    ]


def warn_of_busy_gpus(timeline: Timeline) -> None:
    """Print a line for each GPU that another process uses before the job starts."""
    for gpu in timeline.gpus:
        if gpu.baseline > BUSY_BYTES:
            print(f"warning: {gpu.baseline / GIB:.1f} GiB of GPU {gpu.index} are in use before this job starts")
