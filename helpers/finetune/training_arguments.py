"""Build the Trainer's arguments: the configuration's own, completed for this machine, this data and LoRA."""

from typing import Any

from transformers import TrainingArguments

from helpers.errors import UserError
from helpers.finetune.job import Job
from helpers.finetune.ranks import Ranks
from helpers.finetune.speed import set_nccl_buffers
from helpers.libraries.deepspeed import (
    compute_norms_in_parts,
    forget_inputs_of_frozen_layers,
    share_world_group,
    skip_cpu_collectives,
    skip_nvtx_ranges,
)
from helpers.libraries.deepspeed_checkpoints import correct_checkpoint_loading

# The watchdog names the rank that is missing. The libraries' own limits, which abort the process, come after it.
WATCHDOG_SECONDS = 10


def training_arguments(job: Job, ranks: Ranks, notes: list[str]) -> TrainingArguments:
    """Create the ``TrainingArguments`` of a job.

    Args:
        job: The checked job.
        ranks: This process's place.
        notes: Gets a line for each value of the configuration that had to change.

    Returns:
        The arguments. Creating them starts the process group, as transformers does it.

    Raises:
        UserError: transformers rejects a value.
    """
    given = dict(job.config.training)
    _fit_data_loader(given, max(1, job.machine.cpu_cores // ranks.local_world_size), notes)
    if job.data.dev is None:
        given["eval_strategy"] = "no"
    if job.config.checkpointing:
        # The reentrant variant needs an input that requires gradients. Frozen embeddings have none, so it would
        # silently train nothing.
        given["activation_checkpointing"] = True
        given.pop("gradient_checkpointing", None)
        given.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    on_cpu = job.precision == "no"
    accelerator = given.get("accelerator_config") or {}
    if isinstance(accelerator, dict):  # otherwise it names a file
        # If the host waits for copies to the GPU, the GPU's queue runs empty in every step.
        accelerator = {"non_blocking": not on_cpu} | accelerator
    set_nccl_buffers(job.config.speed)
    if job.deepspeed:
        share_world_group()
        skip_nvtx_ranges()
        compute_norms_in_parts()
        forget_inputs_of_frozen_layers()
        correct_checkpoint_loading()
        if on_cpu:
            skip_cpu_collectives()
    try:
        arguments = TrainingArguments(
            **{
                **given,
                "output_dir": str(job.output_dir),
                "bf16": job.precision == "bf16",
                "fp16": job.precision == "fp16",
                "use_cpu": on_cpu,
                "ddp_timeout": given.get("ddp_timeout", TrainingArguments.ddp_timeout) + WATCHDOG_SECONDS,
                "ddp_backend": given.get("ddp_backend", "gloo" if on_cpu and ranks.store else None),
                "ddp_find_unused_parameters": False,
                # The only buffers are tables of rotary frequencies, the same on all ranks.
                "ddp_broadcast_buffers": given.get("ddp_broadcast_buffers", False),
                "accelerator_config": accelerator,
                "deepspeed": job.deepspeed,
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "disable_tqdm": True,
                # The filter reads the loss after every step, so the host would wait for the GPU.
                "logging_nan_inf_filter": given.get("logging_nan_inf_filter", False),
                "report_to": given.get("report_to", "none"),
            }
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"training_args: {' '.join(str(error).split())}") from error
    if ranks.store is None and arguments.n_gpu > 1:
        # A single process trains on one GPU. The Trainer would split its batches over all it sees (nn.DataParallel).
        arguments._n_gpu = 1
    return arguments


def _fit_data_loader(given: dict[str, Any], cores: int, notes: list[str]) -> None:
    """Limit the data loader's workers to this rank's ``cores``, and let them work one optimizer step ahead."""
    workers = given.get("dataloader_num_workers", 0)
    if workers > cores:
        notes.append(f"dataloader_num_workers {workers} -> {cores}, the CPU cores per rank")
        given["dataloader_num_workers"] = workers = cores
    if workers:
        # Otherwise the workers start again with every epoch, and its first step waits for them.
        given.setdefault("dataloader_persistent_workers", True)
        batches_per_step = -(-given.get("gradient_accumulation_steps", 1) // workers)
        given.setdefault("dataloader_prefetch_factor", 2 * batches_per_step)
