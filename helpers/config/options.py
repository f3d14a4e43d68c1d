"""List the options of the Trainer and of PEFT that this job does not simply pass on.

Every option is used, refused or reported as ignored. This module lists those that are not used, the limits of numbers,
and what only the library would notice, at the first evaluation or the first save.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from helpers.config.optimizer import check_optimizer
from helpers.config.values import Limits
from helpers.errors import UserError

MOST = 2**31  # of anything that is counted: what is larger overflows in one library or another
_COUNT, _AMOUNT, _SHARE = Limits(at_least=1, below=MOST), Limits(at_least=0), Limits(at_least=0, below=1)
TRAINING_LIMITS = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _COUNT
    ),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), _COUNT),
    **dict.fromkeys(("torch_empty_cache_steps", "eval_accumulation_steps"), _COUNT),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), _AMOUNT),
    "neftune_noise_alpha": _AMOUNT,
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"), _SHARE),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "num_train_epochs"), Limits(above=0, below=MOST)),
    **dict.fromkeys(("seed", "data_seed"), Limits(at_least=0, below=2**32)),
    "max_steps": Limits(at_least=-1, below=MOST),
    "dataloader_num_workers": Limits(at_least=0, below=MOST),
}
LORA_LIMITS = {"r": _COUNT, "lora_alpha": Limits(above=0), "lora_dropout": _SHARE}


class Ignored(NamedTuple):
    """An option that has no effect.

    Attributes:
        effective: The value that the job uses instead. If a file has this value, nothing is reported.
        reason: Why, or what to use.
    """

    effective: Any
    reason: str


_NO_LOGITS = "evaluation computes the loss and scores generated answers, and keeps no logits"
_NO_HUB = "the job does not upload"
_SET = "the job sets it itself"
IGNORED_TRAINING = {
    "resume_from_checkpoint": Ignored(None, "--resume continues from the newest checkpoint"),
    "do_train": Ignored(True, "this command trains"),
    "do_eval": Ignored(True, "a dev file is evaluated by eval_strategy"),
    "do_predict": Ignored(False, "helpers.finetune.evaluate answers a file"),
    "disable_tqdm": Ignored(True, "progress is a line at each logging step"),
    "remove_unused_columns": Ignored(False, _SET),
    "label_names": Ignored(["labels"], _SET),
    "local_rank": Ignored(-1, "torchrun gives each rank its own"),
    "ddp_find_unused_parameters": Ignored(False, "every trainable parameter is used in every step"),
    "use_cache": Ignored(False, "training needs no cache, and generation always uses one"),
    "length_column_name": Ignored("length", "lengths are those of the tokenised rows"),
    "prediction_loss_only": Ignored(True, _NO_LOGITS),
    "eval_accumulation_steps": Ignored(None, _NO_LOGITS),
    "eval_do_concat_batches": Ignored(True, _NO_LOGITS),
    "eval_use_gather_object": Ignored(False, _NO_LOGITS),
    "include_for_metrics": Ignored([], _NO_LOGITS),
    "batch_eval_metrics": Ignored(False, _NO_LOGITS),
    "bf16_full_eval": Ignored(False, "evaluation uses the precision of training"),
    "fp16_full_eval": Ignored(False, "evaluation uses the precision of training"),
    "liger_kernel_config": Ignored(None, "Liger's kernels are not used"),
    "hub_token": Ignored(None, _NO_HUB),
    "hub_private_repo": Ignored(None, _NO_HUB),
    "hub_model_id": Ignored(None, _NO_HUB),
    "hub_strategy": Ignored("every_save", _NO_HUB),
    "hub_always_push": Ignored(False, _NO_HUB),
    "hub_revision": Ignored(None, _NO_HUB),
}
IGNORED_LORA = {
    "base_model_name_or_path": Ignored(None, "MODEL_DIR names the base"),
    "revision": Ignored(None, "MODEL_DIR names the base"),
    "auto_mapping": Ignored(None, _SET),
    "peft_version": Ignored(None, _SET),
    "fan_in_fan_out": Ignored(False, "no layer of ChatGLM3 stores its weight transposed"),
    "megatron_core": Ignored("megatron.core", "layers are not Megatron's"),
    "qalora_group_size": Ignored(16, "QA-LoRA is not supported"),
}
# Options that are refused unless they are off, with what to do instead.
REFUSED_TRAINING = {
    "fsdp": "use a DeepSpeed file: configs/ds_zero_3.json shards as FSDP does",
    "fsdp_config": "use a DeepSpeed file: configs/ds_zero_3.json shards as FSDP does",
    "parallelism_config": "the job is data parallel; configs/ds_zero_3.json shards the weights",
    "push_to_hub": "remove it, and upload what helpers.finetune.export writes",
    "use_liger_kernel": "remove it; speed: loss_chunk saves the memory of the logits",
    "torch_compile": "use compile_layers: true under speed",
    "torch_compile_backend": "use compile_layers: true under speed",
    "torch_compile_mode": "use compile_layers: true under speed",
    "auto_find_batch_size": "give per_device_train_batch_size; helpers.memory.predict tells what fits",
    "enable_jit_checkpoint": "remove it; the job saves a checkpoint on Ctrl-C and SIGTERM",
}
_PLAIN = "remove it; plain LoRA, use_rslora and use_dora are supported"
REFUSED_LORA = {
    "inference_mode": "remove it, or nothing would be trained",
    **dict.fromkeys(("megatron_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config"), _PLAIN),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "velora_config", "runtime_config"), _PLAIN),
    **dict.fromkeys(("use_bdlora", "use_qalora", "alora_invocation_tokens"), _PLAIN),
}
# These need data or another form of the base before training, which only a program of its own could give them.
_NEEDS_STEPS = ("eva", "corda", "loftq", "lora_ga")
# These change the frozen matrices: switching the adapter off no longer gives the base model, so its scores, --compare
# and export would be of something else. Biases are trained in place as well, and layer_replication repeats layers.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The packages of transformers' loggers, under the names they are imported by.
_LOGGERS = {
    **{name: (name,) for name in ("wandb", "mlflow", "comet_ml", "clearml", "codecarbon", "dagshub", "dvclive")},
    **{name: (name,) for name in ("neptune", "swanlab", "trackio")},
    "flyte": ("flytekit",),
    "azure_ml": ("azureml",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
_SCORES = ("rouge_1", "rouge_2", "rouge_l", "bleu_4")


def settle(
    block: dict[str, Any],
    ignored: Mapping[str, Ignored],
    refused: Mapping[str, str],
    where: str,
    notes: list[str],
) -> dict[str, Any]:
    """Take out of ``block`` what has no effect, with a note, and refuse what the job cannot do.

    Args:
        block: Options and their values.
        ignored: Options without an effect.
        refused: Options that must be off.
        where: The block's place, for messages.
        notes: Gets a line for each option whose value would ask for something else than the job does.

    Returns:
        The options to pass on.

    Raises:
        UserError: An option that must be off is on.
    """
    for key, value in block.items():
        if key in refused and value:
            raise UserError(f"{where}: {key} is not supported; {refused[key]}")
        if key in ignored and value != ignored[key].effective:
            notes.append(f"{key} is ignored: {ignored[key].reason}")
    return {key: value for key, value in block.items() if key not in ignored and key not in refused}


def check_training(training: dict[str, Any], *, scored: bool, where: str) -> None:
    """Detect what the Trainer would notice only after the model is loaded, at an evaluation or at a save.

    Args:
        training: Keyword arguments of ``TrainingArguments``. A metric gets the name that the Trainer knows.
        scored: Whether answers are generated and scored.
        where: The block's place, for messages.

    Raises:
        UserError: A package is missing, a metric does not exist, or options do not go together.
    """
    if training.get("max_steps") == 0:
        raise UserError(f"{where}: max_steps is 0, so nothing would be trained; give a number of steps")
    _check_loggers(training, where)
    check_optimizer(training, where)
    _check_schedule(training, where)
    _check_metric(training, scored, where)
    strategy = training.get("train_sampling_strategy", "random")
    if strategy not in ("random", "sequential", "group_by_length"):
        raise UserError(
            f"{where}: train_sampling_strategy must be random, sequential or group_by_length, not {strategy!r}"
        )
    for key in ("logging_steps", "save_steps", "eval_steps"):
        value = training.get(key)
        if value is not None and value > 1 and value != int(value):
            raise UserError(f"{where}: {key} must be a whole number of steps, or a share below 1, not {value!r}")
    if not training.get("dataloader_num_workers"):
        for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
            if training.get(key):
                raise UserError(f"{where}: {key} needs workers; set dataloader_num_workers above 0, or remove it")
    context = training.get("dataloader_multiprocessing_context")
    if context not in (None, "fork", "spawn", "forkserver"):
        raise UserError(
            f"{where}: dataloader_multiprocessing_context must be fork, spawn or forkserver, not {context!r}"
        )
    _check_texts(training, where)


def _check_texts(training: Mapping[str, Any], where: str) -> None:
    """Check texts that are taken apart only when the model is loaded."""
    for key in ("log_level", "log_level_replica"):
        if training.get(key, "passive") not in trainer_log_levels:
            known = ", ".join(trainer_log_levels)
            raise UserError(f"{where}: {key} {training[key]!r} is unknown; known are {known}")
    accelerator = training.get("accelerator_config")
    if isinstance(accelerator, dict) and accelerator.get("split_batches"):
        raise UserError(f"{where}: accelerator_config: split_batches would divide the batch of a rank; remove it")
    if isinstance(accelerator, str):
        raise UserError(f"{where}: accelerator_config must be a block of keys, not {accelerator!r}")


def check_lora(lora: Mapping[str, Any], where: str) -> None:
    """Raise UserError for an initialisation that this job cannot train."""
    initial = str(lora.get("init_lora_weights"))
    if initial in _NEEDS_STEPS:
        raise UserError(f"{where}: init_lora_weights {initial!r} needs steps before training; remove it")
    option = base_changing_option(lora)
    if option is not None:
        raise UserError(f"{where}: {option} changes the base model, with which the tuned one is compared; remove it")


def base_changing_option(lora: Mapping[str, Any]) -> str | None:
    """Name the option with which an adapter that is switched off does not give its base model; None without one.

    Args:
        lora: Keyword arguments of ``LoraConfig``, or the contents of an ``adapter_config.json``.

    Returns:
        The option and its value.
    """
    initial = str(lora.get("init_lora_weights")).lower()
    if any(initial == name or initial.startswith(f"{name}_") for name in _CHANGES_BASE):
        return f"init_lora_weights {initial}"
    if lora.get("bias") in ("all", "lora_only"):
        return f"bias {lora['bias']}"
    return "layer_replication" if lora.get("layer_replication") else None


def _check_loggers(training: Mapping[str, Any], where: str) -> None:
    loggers = training.get("report_to") or []
    for name in [loggers] if isinstance(loggers, str) else loggers:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UserError(f"{where}: report_to {name!r} is unknown; known are none, all, {known}")
        if name in _LOGGERS and not any(map(find_spec, _LOGGERS[name])):
            raise UserError(
                f"{where}: report_to {name} needs the package {_LOGGERS[name][0]}; install it, or write none"
            )


def _check_schedule(training: Mapping[str, Any], where: str) -> None:
    """Build the learning rate's schedule as the Trainer will."""
    name, kwargs = training.get("lr_scheduler_type", "linear"), training.get("lr_scheduler_kwargs") or {}
    try:
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=dict(kwargs))
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: lr_scheduler_type {name} with lr_scheduler_kwargs {kwargs}: {reason}") from error


def _check_metric(training: dict[str, Any], scored: bool, where: str) -> None:
    """Give the metric the name that an evaluation reports it by."""
    given = training.get("metric_for_best_model")
    if given is None:
        if training.get("save_strategy") == "best":
            raise UserError(f"{where}: save_strategy best needs metric_for_best_model; loss and rouge-l are two")
        return
    name = given.lower().replace("-", "_").removeprefix("eval_")
    if name not in ("loss", *_SCORES):
        raise UserError(
            f"{where}: metric_for_best_model {given!r} is unknown; known are loss, rouge-1, rouge-2, rouge-l and bleu-4"
        )
    if name in _SCORES and not scored:
        raise UserError(f"{where}: metric_for_best_model {given!r} is scored only with predict_with_generate: true")
    training["metric_for_best_model"] = name
