"""Write a whole model as a checkpoint of its own, and what it needs to be used without the run that made it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GlmForCausalLM

from helpers.chatglm3.checkpoint import read_config
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.finetune.generation_files import read_generation_config

SHARD_SIZE = "2GB"


def write_weights(
    model: ChatGLM3ForCausalLM | GlmForCausalLM, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write the configuration and the weights in shards.

    Args:
        model: Decides the layout.
        folder: Where to.
        state: The weights by the model's own names; None takes the model's.
    """
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)


def write_trained(folder: Path, state: dict[str, Tensor], tokenizer: ChatGLMTokenizer, like: Path) -> None:
    """Write a model whose parameters were all trained, in the published layout.

    Args:
        folder: Where to; it is made if it does not exist.
        state: All weights, by their names in ``GlmForCausalLM``.
        tokenizer: The model's.
        like: Folder of the model that the training began with: it has the same configuration.
    """
    config = ChatGLM3Config.from_dict(read_config(like))
    with torch.device("meta"):  # not through _from_config, which would partition it among all ranks under ZeRO-3
        model: Any = ChatGLM3ForCausalLM(config)
        model.to(next(iter(state.values())).dtype)
    generation_config, _ = read_generation_config(like)
    if generation_config:
        generation_config.eos_token_id = config.eos_token_id  # the file may name </s> only
        model.generation_config = generation_config
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder, state)
    tokenizer.save_pretrained(folder)
