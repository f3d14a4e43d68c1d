"""Fine-tune ChatGLM3 on one process or many: LoRA, prefixes or all parameters.

    torchrun --standalone --nproc_per_node=2 -m helpers.finetune.train DATA_DIR MODEL_DIR configs/lora.yaml \\
        [configs/ds_zero_2.json] [--resume]

The output folder gets checkpoints, metrics.jsonl, loss_and_memory.png, memory_timeline.json and .png, the phases
of each rank, run.json, and predictions.jsonl with the scores of the base model and the tuned one.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from helpers.config.finetune import read_finetune_config, settings_for_the_start
from helpers.errors import CLOSED_PIPE, UserError, allow_any_text, discard_output
from helpers.finetune.collators import TrainingCollator
from helpers.finetune.evaluate import evaluate
from helpers.finetune.extensions import check_extensions
from helpers.finetune.forecast import Forecast, forecast_or_reason
from helpers.finetune.host_cores import use_own_cores
from helpers.finetune.job import Job, prepare
from helpers.finetune.launchers import add_local_rank
from helpers.finetune.lost_rank import explained_lost_rank
from helpers.finetune.method import DTYPES, Model, add_adapter, weights_dtype, weights_folder
from helpers.finetune.metrics import Evaluation
from helpers.finetune.model import TrainedChatGLM3ForCausalLM
from helpers.finetune.out_of_memory import explained_out_of_memory
from helpers.finetune.output_disk import LOCK, explained_disk_errors, explained_read_errors, only_job, unwritten
from helpers.finetune.packing import PackCollator
from helpers.finetune.plan import count_parameters, describe_plan, warn_of_busy_gpus
from helpers.finetune.ranks import Ranks
from helpers.finetune.recorder import FirstStepMarker, Recorder, WorkCounter
from helpers.finetune.run_folder import TIME, RunFile, draw_figures, peaks_and_phase, start_run_file
from helpers.finetune.speed import apply_speed_options, evaluation_mode, set_allocator
from helpers.finetune.steps import check_completed, check_scored, finished_line
from helpers.finetune.stop import StopOnSignal, StoppedBySignal, end_at_signals, ignore_signals, restored_signals
from helpers.finetune.trainer import LoraTrainer
from helpers.finetune.training_arguments import training_arguments
from helpers.finetune.watchdog import Watchdog
from helpers.hardware import apply_nccl_environment
from helpers.libraries.quiet import quiet_libraries
from helpers.memory.phases import PhaseLog, mark_in, phase
from helpers.memory.sampler import Sampler
from helpers.memory.timeline import Timeline
from helpers.memory.units import GIB
from helpers.quantization.library import exclude_frozen_from_ddp, keep_layout, quantization_config

INTERRUPTED = 130  # what shells report for a job ended by Ctrl-C


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helpers.finetune.train", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, help="folder with the files named in the configuration")
    parser.add_argument("model_dir", help="ChatGLM3 checkpoint in its published layout, or its name on the Hub")
    parser.add_argument("config", type=Path, help="configs/lora.yaml or one like it")
    parser.add_argument("deepspeed", type=Path, nargs="?", help="DeepSpeed JSON; without it, DistributedDataParallel")
    parser.add_argument("--output-dir", type=Path, help="instead of the configuration's output_dir")
    parser.add_argument("--resume", action="store_true", help="continue from the output folder's newest checkpoint")
    parser.add_argument("--force", action="store_true", help="train although the predicted memory cannot fit the GPU")
    add_local_rank(parser)
    return parser.parse_args(argv)


def _load_model(job: Job, arguments: TrainingArguments) -> Model:
    """Load the base model and add what is trained. Under ZeRO-3 the weights are partitioned while they are read."""
    zero_3 = job.zero_stage == 3
    if zero_3:
        import deepspeed  # here, because its import already looks for a GPU

        # Partitioning needs DeepSpeed's process group now; the Trainer would set it up too late.
        deepspeed.init_distributed(dist_backend="gloo" if arguments.device.type == "cpu" else "nccl", verbose=False)
    placement: dict[str, Any] = {}
    if arguments.device.type == "cuda" and not zero_3:
        # Straight to this rank's GPU; otherwise every rank would first hold the whole model in host memory.
        placement = {"device_map": {"": arguments.device}}
    base_format = job.config.base_format
    if base_format:  # bitsandbytes picks a device of its own unless it gets one
        quantization = quantization_config(base_format, DTYPES[job.precision])
        placement = {"device_map": {"": str(arguments.device)}, "quantization_config": quantization}
    # `prepare` has resolved and checked the folder.
    folder = weights_folder(job)
    with explained_read_errors(folder):
        model = TrainedChatGLM3ForCausalLM.from_checked_folder(folder, dtype=weights_dtype(job), **placement)
    keep_layout(model)
    set_seed(arguments.seed)
    adapted = add_adapter(model, job.config)
    if base_format:
        exclude_frozen_from_ddp(adapted)
    apply_speed_options(adapted, job.config.speed, zero_3=zero_3)
    return adapted


def _build_trainer(
    job: Job, ranks: Ranks, model: Model, arguments: TrainingArguments, guards: list[TrainerCallback]
) -> LoraTrainer:
    counter = WorkCounter()
    packing = job.config.speed.packing
    return LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=job.data.train,
        eval_dataset=job.data.dev,
        data_collator=TrainingCollator(job.tokenizer.pad_token_id),
        processing_class=job.tokenizer,
        counter=counter,
        # If "auto" turned recomputing off, checkpoints do not exist, and not all activations may go to the host.
        offload_checkpoints=job.config.speed.offload_checkpoints and bool(job.config.checkpointing),
        pack_collator=PackCollator.of(job.data.train, packing, job.tokenizer.pad_token_id) if packing else None,
        answer_features=job.data.answers if job.config.predict_with_generate else None,
        max_new_tokens=job.config.max_new_tokens,
        base_format=job.config.base_format,
        facts=job.facts,
        base_folder=job.model_dir,
        callbacks=[FirstStepMarker(), Recorder(job.output_dir / "metrics.jsonl", ranks, counter), *guards],
    )


def _train(job: Job, ranks: Ranks, run_file: RunFile, watchdog: Watchdog) -> Evaluation | None:
    """Load, train and evaluate; None without a dev file, on ranks other than 0, and after a signal."""
    notes = [*job.notes, *check_extensions(job.deepspeed)]
    arguments = training_arguments(job, ranks, notes)
    set_allocator(job.config.speed, arguments.device)
    notes += use_own_cores(job.deepspeed, ranks)
    with phase("load model"):
        model = _load_model(job, arguments)
    # What the weights take: ZeRO-3 has sharded them by now, and 4 bits are not a quarter of 16.
    loaded = torch.cuda.memory_allocated(arguments.device) / GIB if arguments.device.type == "cuda" else None
    trainable = count_parameters(model, trainable=True)
    plan = [*notes, *describe_plan(job, arguments, ranks.world_size, trainable)]
    for line in plan:
        ranks.print_once(line)
    counts = {"trainable_parameters": trainable, "frozen_parameters": count_parameters(model, trainable=False)}
    run_file.update(plan=plan, **counts, loaded_gib=loaded, training_arguments=arguments.to_dict())

    stop = StopOnSignal(ranks)
    stop.install()
    trainer = _build_trainer(job, ranks, model, arguments, [stop, watchdog])
    with phase("train"):
        trainer.train(resume_from_checkpoint=str(job.resume_from) if job.resume_from else None)
    end_at_signals(ranks)
    step = trainer.state.global_step
    if stop.stopped:
        run_file.update(status="interrupted", step=step)
        ranks.print_once(f"stopped after step {step}; add --resume to the same command to continue")
        return None
    check_completed(step, trainer.state.max_steps)
    run_file.update(status="trained", step=step)
    if job.data.answers is None:
        return None
    with phase("evaluate"), evaluation_mode(model):
        return evaluate(
            model,
            job.tokenizer,
            job.data.answers,
            max_new_tokens=job.config.max_new_tokens,
            batch_size=arguments.per_device_eval_batch_size,
            output_file=job.output_dir / "predictions.jsonl",
        )


def _finish(
    job: Job, run_file: RunFile, timeline: Timeline, evaluation: Evaluation | None, predicted: Forecast | None
) -> None:
    """Draw the figures, complete ``run.json`` and print where everything is; on rank 0."""
    draw_figures(job.output_dir, timeline)
    if run_file.content["status"] != "interrupted":
        run_file.update(status="finished", scores=evaluation and dataclasses.asdict(evaluation))
    run_file.update(
        nvml_before_gib=[gpu.baseline / GIB for gpu in timeline.gpus],
        nvml_peak_gib=[gpu.peak / GIB for gpu in timeline.gpus],
        nvml_note=timeline.note,
        ended=time.strftime(TIME),
    )
    if evaluation:
        print(evaluation)
    # A job on the CPU leaves the GPUs alone, and what others free may hide what this one took.
    if predicted and predicted.gpu_bytes is not None and any(gpu.delta for gpu in timeline.gpus):
        print(predicted.compared_with(*peaks_and_phase(job.output_dir, timeline)))
    files = ", ".join(sorted(p.name for p in job.output_dir.iterdir() if p.name != LOCK))
    print(f"written to {job.output_dir}: {files}", flush=True)


def _run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Check the job, train, write the results; return the exit status."""
    config = read_finetune_config(arguments.config)
    output_dir = Path(arguments.output_dir or config.training["output_dir"])
    with Watchdog(ranks, config.training, output_dir) as watchdog, only_job(output_dir, ranks):
        job = prepare(
            arguments.data_dir,
            arguments.model_dir,
            arguments.config,
            arguments.deepspeed,
            output_dir=output_dir,
            resume=arguments.resume,
            ranks=ranks,
        )
        return _run_prepared(job, ranks, watchdog, arguments.force)


def _run_prepared(job: Job, ranks: Ranks, watchdog: Watchdog, force: bool) -> int:
    """Train unless there is nothing left to do; return the exit status."""
    finished = finished_line(job.resume_from, job.config.training, job.planned_steps)
    if finished and job.resume_from:
        check_scored(job.resume_from)
        ranks.print_once(finished)
        return 0
    predicted, lines = forecast_or_reason(job, ranks.world_size, force=force)
    for line in [*filter(None, [apply_nccl_environment()]), *lines]:
        ranks.print_once(line)
    ranks.barrier()  # no rank writes into the output folder while another still checks that it is empty
    job.output_dir.mkdir(parents=True, exist_ok=True)  # on a host of its own
    with explained_disk_errors(job.output_dir):
        return _train_and_write(job, ranks, watchdog, predicted)


def _train_and_write(job: Job, ranks: Ranks, watchdog: Watchdog, predicted: Forecast | None) -> int:
    """Train and write the results; return the exit status."""
    watchdog.run_file = run_file = start_run_file(job, ranks)
    run_file.update(predicted=predicted and predicted.content())
    mark_in(PhaseLog(job.output_dir / f"phases-{ranks.rank:03}.jsonl", ranks.rank))
    # One rank per node samples the memory of all its GPUs.
    sampler = Sampler() if ranks.local_rank == 0 else None
    with sampler or nullcontext():
        if sampler is not None:
            warn_of_busy_gpus(sampler.timeline())
        try:
            with (
                explained_out_of_memory(job, ranks.rank, ranks.world_size),
                explained_lost_rank(ranks, job.output_dir),
            ):
                evaluation = _train(job, ranks, run_file, watchdog)
        except BaseException as error:
            watchdog.wait_for_verdict()
            # A data loader's worker that dies raises in its rank, at any moment; its siblings may not disturb this.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with suppress(OSError):  # a full disk may be the error
                run_file.fail(error)
            raise
    if ranks.is_first and sampler is not None:
        _finish(job, run_file, sampler.timeline(), evaluation, predicted)
    return INTERRUPTED if run_file.content["status"] == "interrupted" else 0


def _run_or_explain(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Run the job; end this rank with one line if it fails for a reason that has one. A signal may come meanwhile."""
    try:
        end_at_signals(ranks)
        return _run(arguments, ranks)
    except UserError as error:
        ranks.exit_with_error(error)
    except BrokenPipeError:  # `| head`, which ends all ranks: torchrun stops the others
        discard_output()
        os._exit(CLOSED_PIPE)  # not sys.exit: other ranks may be in a collective
    except OSError as error:
        line = unwritten(error)
        if line is None:
            raise
        ranks.exit_with_error(line)


@restored_signals()
def main(argv: list[str] | None = None) -> None:
    """Run the command line; torchrun calls it once per rank."""
    allow_any_text()
    arguments = _arguments(argv)
    quiet_libraries()
    try:
        with_deepspeed, timeout = settings_for_the_start(arguments.config)
        ranks = Ranks.from_environment(
            init_single_rank_group=arguments.deepspeed is not None or with_deepspeed,
            local_rank=arguments.local_rank,
            timeout=timeout,
        )
    except UserError as error:  # every rank finds its own variables
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        status = _run_or_explain(arguments, ranks)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        ignore_signals()  # of a rank that has ended earlier, and of torchrun, while Python ends
    except StoppedBySignal as stopped:
        ranks.print_once(f"\n{stopped}")
        sys.stdout.flush()
        os._exit(stopped.status)  # not sys.exit: other ranks may be in a collective
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
