"""The real model that a configuration describes, with random weights: what a prediction is held against."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from helpers.memory.predict.configuration import Configuration


def base_model(configuration: Configuration, device: torch.device | str) -> GlmForCausalLM:
    """The network without an adapter, made on ``device``, in training mode and with checkpointing where it is asked."""
    c, shape = configuration, configuration.shape
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
        model = GlmForCausalLM._from_config(config, dtype=torch.float32 if c.residual_bytes == 4 else torch.bfloat16)
    if c.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def with_adapter(configuration: Configuration, model: nn.Module) -> nn.Module:
    """``model`` with the configuration's LoRA adapter, on the model's device; the same model where there is none."""
    lora = configuration.lora
    if lora is None:
        return model
    adapter = LoraConfig(r=lora.r, lora_dropout=lora.dropout, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    return get_peft_model(model, adapter).train()
