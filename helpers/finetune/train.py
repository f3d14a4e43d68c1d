"""Fine-tune ChatGLM3 with LoRA, on one process or many.

    torchrun --standalone --nproc_per_node=2 -m helpers.finetune.train DATA_DIR MODEL_DIR configs/lora.yaml \\
        [configs/ds_zero_2.json] [--resume]

The output folder gets PEFT checkpoints, metrics.jsonl, loss_and_memory.png, memory_timeline.json and .png, phases of
each rank, run.json, and predictions.jsonl with the scores of the base model and the tuned one.
"""

import argparse
import dataclasses
import errno
import shlex
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

from helpers.config.deepspeed import bucket_warning
from helpers.errors import UserError
from helpers.finetune.collators import TrainingCollator
from helpers.finetune.evaluate import Evaluation, evaluate
from helpers.finetune.job import Job, prepare
from helpers.finetune.model import TrainedChatGLM3ForCausalLM
from helpers.finetune.packing import PackCollator
from helpers.finetune.ranks import Ranks, StopOnSignal
from helpers.finetune.recorder import Recorder, WorkCounter
from helpers.finetune.run_folder import RunFile, draw_figures
from helpers.finetune.speed import apply_speed_options, evaluation_mode, set_allocator
from helpers.finetune.trainer import LoraTrainer
from helpers.hardware import apply_nccl_environment
from helpers.libraries.deepspeed import share_world_group, skip_cpu_collectives
from helpers.libraries.quiet import quiet_libraries
from helpers.memory.nvml import Sampler
from helpers.memory.phases import PhaseLog
from helpers.memory.units import GIB
from helpers.quantization.library import exclude_frozen_from_ddp, full_numel, keep_layout, quantization_config

# An idle GPU uses far less; a desktop may use this much.
BUSY_BYTES = GIB
INTERRUPTED = 130  # what shells report for a job ended by Ctrl-C
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helpers.finetune.train", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, help="folder with the files that the configuration names")
    parser.add_argument("model_dir", help="ChatGLM3 checkpoint in its published layout, or its name on the hub")
    parser.add_argument("config", type=Path, help="configs/lora.yaml or one like it")
    parser.add_argument("deepspeed", type=Path, nargs="?", help="DeepSpeed JSON; without one, DistributedDataParallel")
    parser.add_argument("--output-dir", type=Path, help="instead of the configuration's output_dir")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    return parser.parse_args(argv)


def _training_arguments(job: Job, ranks: Ranks, notes: list[str]) -> TrainingArguments:
    """What the Trainer is started with: the configuration's, and what this machine and these data need."""
    given = dict(job.config.training)
    cores = max(1, job.machine.cpu_cores // ranks.local_world_size)
    if given.get("dataloader_num_workers", 0) > cores:
        notes.append(f"dataloader_num_workers {given['dataloader_num_workers']} -> {cores}: cores of a rank here")
        given["dataloader_num_workers"] = cores
    if given.get("dataloader_num_workers"):
        # The rows of a step are there when it begins, those of an epoch's first one, too.
        given.setdefault("dataloader_persistent_workers", True)
        a_step = -(-given.get("gradient_accumulation_steps", 1) // given["dataloader_num_workers"])
        given.setdefault("dataloader_prefetch_factor", 2 * a_step)
    if job.data.dev is None:
        given["eval_strategy"] = "no"
    if job.config.checkpointing:
        # The reentrant kind needs an input that requires gradients, which frozen embeddings do not give: it would
        # silently train nothing.
        given["activation_checkpointing"] = True
        given.pop("gradient_checkpointing", None)
        given.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    on_cpu = job.precision == "no"
    accelerator = given.get("accelerator_config") or {}
    if isinstance(accelerator, dict):  # or the name of a file
        # A copy to the GPU that is waited for empties the GPU's queue in every step.
        accelerator = {"non_blocking": not on_cpu} | accelerator
    if job.deepspeed:
        share_world_group()
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
                "ddp_backend": given.get("ddp_backend", "gloo" if on_cpu and ranks.store else None),
                "ddp_find_unused_parameters": False,
                "ddp_broadcast_buffers": given.get("ddp_broadcast_buffers", False),  # rotary tables, alike on all
                "accelerator_config": accelerator,
                "deepspeed": job.deepspeed,
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "disable_tqdm": True,
                # It looks at the loss after every step, for which the host would wait for the GPU.
                "logging_nan_inf_filter": given.get("logging_nan_inf_filter", False),
                "report_to": given.get("report_to", "none"),
            }
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"training_args: {' '.join(str(error).split())}") from error
    if ranks.store is None and arguments.n_gpu > 1:
        # A process alone trains on one GPU. The Trainer would split its batches over all it sees (nn.DataParallel).
        arguments._n_gpu = 1
    return arguments


def _load(job: Job, arguments: TrainingArguments, ranks: Ranks) -> PeftModel:
    """The base model with a fresh adapter. Under ZeRO-3 its weights are partitioned while they are read."""
    zero_3 = job.zero_stage == 3
    if zero_3:
        import deepspeed  # looks for its accelerator when it is imported

        # The partitioning while reading needs DeepSpeed's view of the world, which the Trainer would set up too late.
        deepspeed.init_distributed(dist_backend="gloo" if arguments.device.type == "cpu" else "nccl", verbose=False)
    # Straight to this rank's GPU; through the host, every rank would hold the whole model there first.
    placement = {"device_map": {"": arguments.device}} if arguments.device.type == "cuda" and not zero_3 else {}
    bits = job.config.quantization_bit
    if bits:  # bitsandbytes chooses a device by itself where it is given none
        quantization = quantization_config(bits, DTYPES[job.precision])
        placement = {"device_map": {"": str(arguments.device)}, "quantization_config": quantization}
    # `prepare` has resolved and checked the folder.
    model = TrainedChatGLM3ForCausalLM.from_checked_folder(job.model_dir, dtype=DTYPES[job.precision], **placement)
    keep_layout(model)
    set_seed(arguments.seed)
    try:
        adapted = get_peft_model(model, LoraConfig(**job.config.lora))
    except ValueError as error:
        raise UserError(f"peft_config: {' '.join(str(error).split())}") from error
    if bits:
        exclude_frozen_from_ddp(adapted)
    apply_speed_options(adapted, job.config.speed)
    return adapted


def _count(model: PeftModel, trainable: bool) -> int:
    """Parameters that are trained, or frozen."""
    return sum(full_numel(p) for p in model.parameters() if p.requires_grad == trainable)


def _plan(job: Job, arguments: TrainingArguments, ranks: Ranks, trainable: int) -> list[str]:
    """What is about to happen, a line each."""
    accumulation = arguments.gradient_accumulation_steps
    rows = arguments.per_device_train_batch_size * accumulation * ranks.world_size
    count = len(job.data.train)
    if arguments.max_steps > 0:
        amount = f"{arguments.max_steps:,} steps"
        epochs = arguments.max_steps * rows / count
    else:
        amount, epochs = f"{arguments.num_train_epochs:g} epochs", arguments.num_train_epochs
    how = f"DeepSpeed ZeRO-{job.zero_stage}" if job.deepspeed else "DDP" if ranks.world_size > 1 else "one process"
    unit = "packs" if job.config.speed.packing else "rows"
    lines = [str(report) for report in job.data.reports]
    lines.append(
        f"{amount} of {rows} {unit} ({arguments.per_device_train_batch_size} {unit} x {accumulation} micro-batches x "
        f"{ranks.world_size} ranks): {epochs:,.2f} passes over {count:,} {unit}"
    )
    lines.append(f"{how} on {ranks.world_size} rank(s), {job.precision if job.precision != 'no' else 'fp32'}")
    base = job.config.quantization_bit
    lines.append(f"LoRA trains {trainable:,} parameters" + (f" on a base held in {base} bits" if base else ""))
    element_bytes = DTYPES[job.precision].itemsize
    warning = bucket_warning(job.deepspeed, trainable, element_bytes) if job.deepspeed else None
    return lines + ([f"warning: {warning}"] if warning else [])


def _train(job: Job, ranks: Ranks, run_file: RunFile, phases: PhaseLog) -> Evaluation | None:
    """Load, train, evaluate. None where there is nothing to evaluate, on ranks other than 0, or after a signal."""
    notes: list[str] = list(job.notes)
    arguments = _training_arguments(job, ranks, notes)
    set_allocator(job.config.speed, arguments.device)
    with phases.phase("load model"):
        model = _load(job, arguments, ranks)
    trainable = _count(model, trainable=True)
    plan = [*notes, *_plan(job, arguments, ranks, trainable)]
    for line in plan:
        ranks.print_once(line)
    counts = {"trainable_parameters": trainable, "frozen_parameters": _count(model, trainable=False)}
    run_file.update(plan=plan, **counts, training_arguments=arguments.to_dict())

    counter = WorkCounter()
    packing = job.config.speed.packing
    stop = StopOnSignal(ranks)
    stop.install()
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=job.data.train,
        eval_dataset=job.data.dev,
        data_collator=TrainingCollator(job.tokenizer.pad_token_id),
        processing_class=job.tokenizer,
        counter=counter,
        # "auto" may have found that nothing has to be computed again; all activations are not to go to the host.
        offload_checkpoints=job.config.speed.offload_checkpoints and job.config.checkpointing,
        pack_collator=PackCollator.of(job.data.train, packing, job.tokenizer.pad_token_id) if packing else None,
        answer_features=job.data.answers if job.config.predict_with_generate else None,
        max_new_tokens=job.config.max_new_tokens,
        quantization_bit=job.config.quantization_bit,
        callbacks=[Recorder(job.output_dir / "metrics.jsonl", ranks, counter), stop],
    )
    if job.resume_from is not None:
        ranks.print_once(f"going on from {job.resume_from}")
    with phases.phase("train"):
        trainer.train(resume_from_checkpoint=str(job.resume_from) if job.resume_from else None)
    if stop.stopped:
        run_file.update(status="interrupted", step=trainer.state.global_step)
        ranks.print_once(
            f"stopped after step {trainer.state.global_step}; add --resume to the same command to continue"
        )
        return None
    run_file.update(status="trained", step=trainer.state.global_step)
    if job.data.answers is None:
        return None
    with phases.phase("evaluate"), evaluation_mode(model):
        return evaluate(
            model,
            job.tokenizer,
            job.data.answers,
            max_new_tokens=job.config.max_new_tokens,
            batch_size=arguments.per_device_eval_batch_size,
            output_file=job.output_dir / "predictions.jsonl",
        )


def _run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Check, train, write; the exit status."""
    job = prepare(
        arguments.data_dir,
        arguments.model_dir,
        arguments.config,
        arguments.deepspeed,
        output_dir=arguments.output_dir,
        resume=arguments.resume,
        ranks=ranks,
    )
    line = apply_nccl_environment()
    if line:
        ranks.print_once(line)
    # Nobody writes into the output folder while another rank still checks that it is empty.
    ranks.barrier()
    job.output_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "helpers.finetune.train", *sys.argv[1:]])
    run_file = RunFile(
        job.output_dir / "run.json",
        ranks,
        {
            "status": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command,
            "world_size": ranks.world_size,
            "precision": job.precision,
            "machine": dataclasses.asdict(job.machine),
            "config": dataclasses.asdict(job.config),
            "deepspeed": job.deepspeed,
        },
    )
    run_file.update()
    phases = PhaseLog(job.output_dir / f"phases-{ranks.rank:03}.jsonl", ranks.rank)
    # One rank of each node watches all of the node's GPUs.
    sampler = Sampler() if ranks.local_rank == 0 else None
    with sampler or nullcontext():
        if sampler:
            for gpu in sampler.timeline().gpus:
                if gpu.baseline > BUSY_BYTES:
                    print(f"warning: {gpu.baseline / GIB:.1f} GiB of GPU {gpu.index} are in use before this job starts")
        try:
            evaluation = _train(job, ranks, run_file, phases)
        except BaseException as error:
            with suppress(OSError):  # the disk may be what failed
                run_file.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
    interrupted = run_file.content["status"] == "interrupted"
    if not ranks.is_first:
        return INTERRUPTED if interrupted else 0
    timeline = sampler.timeline()
    draw_figures(job.output_dir, timeline)
    outcome = {} if interrupted else {"status": "finished", "scores": evaluation and dataclasses.asdict(evaluation)}
    run_file.update(
        **outcome,
        nvml_before_gib=[gpu.baseline / GIB for gpu in timeline.gpus],
        nvml_peak_gib=[gpu.peak / GIB for gpu in timeline.gpus],
        nvml_note=timeline.note,
        ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    if evaluation:
        print(evaluation)
    print(f"written to {job.output_dir}: {', '.join(sorted(p.name for p in job.output_dir.iterdir()))}", flush=True)
    return INTERRUPTED if interrupted else 0


def main(argv: list[str] | None = None) -> None:
    """The command line; under torchrun, one rank of it."""
    arguments = _arguments(argv)
    quiet_libraries()
    ranks = Ranks.from_environment(init_single_rank_group=arguments.deepspeed is not None)
    try:
        status = _run(arguments, ranks)
    except UserError as error:
        ranks.exit_with_error(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"{error.filename or 'a file'} could not be written ({error.strerror}); free disk space"
        ranks.exit_with_error(UserError(message))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
