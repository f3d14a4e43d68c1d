"""Build the real model that a configuration describes, with random weights, to hold a prediction against."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.model_shape import ModelShape


def build_base_model(shape: ModelShape, dtype: torch.dtype, device: torch.device | str) -> GlmForCausalLM:
    """Build the network without an adapter, in training mode.

    Args:
        shape: Its sizes.
        dtype: Type of its parameters.
        device: Where it is built; "meta" allocates nothing.

    Returns:
        The network, with transformers' random weights.
    """
    config = GlmConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_groups,
        head_dim=shape.head_dim,
        attention_bias=shape.qkv_bias,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        use_cache=False,
    )
    with torch.device(device):
        model = GlmForCausalLM._from_config(config, dtype=dtype)
    model.train()
    return model


def build_without_adapter(configuration: Configuration, device: torch.device | str) -> GlmForCausalLM:
    """Build a configuration's network without its adapter; its layers checkpoint as configured."""
    dtype = torch.float32 if configuration.residual_bytes == 4 else torch.bfloat16
    model = build_base_model(configuration.shape, dtype, device)
    if configuration.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def add_adapter(configuration: Configuration, model: nn.Module) -> nn.Module:
    """Add the configuration's LoRA adapter on the model's device; without one, return ``model`` as it is."""
    lora = configuration.lora
    if lora is None:
        return model
    adapter = LoraConfig(r=lora.r, lora_dropout=lora.dropout, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    return get_peft_model(model, adapter).train()
