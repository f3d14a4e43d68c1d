"""What differs between the ways to fine-tune: a LoRA adapter, a prefix for each layer, or all parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.config.finetune import FP8, FinetuneConfig
from helpers.errors import UserError
from helpers.finetune.job import Job
from helpers.finetune.model import TrainedChatGLM3ForCausalLM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
Model = PreTrainedModel | PeftModel


def weights_dtype(job: Job) -> torch.dtype:
    """Return the type of the base's weights in a training.

    If all parameters are trained, Adam needs them in fp32: its steps are smaller than what 16 bits can add. DeepSpeed
    keeps such a copy itself. Without DeepSpeed the weights are the copy, and autocast computes in 16 bits.

    Args:
        job: The checked job.

    Returns:
        The type to load them in.
    """
    return torch.float32 if job.config.trains_all and not job.deepspeed else DTYPES[job.precision]


def weights_folder(job: Job) -> Path:
    """Return the folder of the weights to begin with: the base's, or those that a resumed training of all has."""
    return job.resume_from if job.config.trains_all and job.resume_from else job.model_dir


def add_adapter(model: ChatGLM3ForCausalLM, config: FinetuneConfig) -> Model:
    """Add what is trained to the base.

    Args:
        model: The base; PEFT freezes it.
        config: The configuration.

    Returns:
        The model with a fresh adapter; ``model`` itself if all parameters are trained.

    Raises:
        UserError: PEFT rejects a value.
    """
    if config.trains_all:
        return model
    try:
        return get_peft_model(model, LoraConfig(**config.lora) if config.lora else _prefix_config(model, config))
    except ValueError as error:
        raise UserError(f"peft_config: {' '.join(str(error).split())}") from error


def _prefix_config(model: ChatGLM3ForCausalLM, config: FinetuneConfig) -> PrefixTuningConfig:
    """Give PEFT the shape of a layer's keys: it looks for Glm's names, and the configuration has ChatGLM3's."""
    shape: Any = model.config
    return PrefixTuningConfig(
        **config.prefix,
        num_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_key_value_heads,
        token_dim=shape.num_key_value_heads * shape.head_dim,
    )


@contextmanager
def gathered_prefix(model: Model, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let PEFT save a prefix that was gathered already.

    It would call the prefix's module, on rank 0 alone. Under ZeRO-3, such a call waits for all ranks.

    Args:
        model: With or without a prefix.
        state: What is trained, whole; None if ``model`` has it.
    """
    if state is None or not has_prefix(model):
        yield
        return

    def gathered(adapter_name: str) -> Tensor:
        return state[f"prompt_encoder.{adapter_name}.embedding.weight"]

    setattr(model, "get_prompt_embedding_to_save", gathered)  # noqa: B010 (mypy: a method cannot be assigned to)
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save


def has_prefix(model: Model) -> bool:
    """Tell whether keys and values from outside of the network come before those of the first token."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def base_network(model: Model) -> TrainedChatGLM3ForCausalLM:
    """Return the network without its adapter.

    Args:
        model: As :func:`add_adapter` returns it.

    Returns:
        The network; its layers have the adapter's matrices all the same.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, TrainedChatGLM3ForCausalLM), f"{type(base).__name__} cannot compute its loss in chunks"
    return base


def describe_method(job: Job, trainable: int) -> str:
    """Describe what is trained, and in which types all parameters are.

    Args:
        job: The checked job.
        trainable: Number of trainable parameters.

    Returns:
        One line.
    """
    base = job.config.base_format
    held = base if base == FP8 else f"{base} bits"
    if not job.config.trains_all:
        name = "LoRA" if job.config.lora else f"a prefix of {job.config.prefix['num_virtual_tokens']} keys and values"
        return f"{name} trains {trainable:,} parameters" + (f" on a base held in {held}" if base else "")
    if job.precision == "no":
        types = "in fp32"
    elif job.deepspeed:
        types = f"in {job.precision}, with an fp32 copy and Adam's states in fp32 (DeepSpeed)"
    else:
        types = f"with weights and Adam's states in fp32, matrix multiplications in {job.precision} (autocast)"
    return f"all {trainable:,} parameters are trained, {types}"
