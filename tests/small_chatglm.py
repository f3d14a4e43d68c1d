"""Small random ChatGLM3 models and a tokenizer to go with them, for tests that need both but no sense."""

import io
from functools import cache
from pathlib import Path

import sentencepiece
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, ChatGLMTokenizer

CORPUS = (
    "类型#裙*版型#宽松 这款裙子采用柔软的面料，宽松的版型显瘦又舒适，简约百搭。 Hello, tools: [1, 2]",
    "类型#裤*版型#宽松*风格#性感*图案#线条",
    "宽松的阔腿裤这两年真的吸粉不少，明星时尚达人的心头爱。",
    "这件鱼尾裙采用了柔软的面料，穿着舒适，显瘦显高。",
    "A skirt with a fish tail, soft fabric and a slim cut.",
    "你好，请问今天北京的天气怎么样？",
)


@cache
def train_tokenizer(corpus: tuple[str, ...] = CORPUS) -> bytes:
    """A SentencePiece model with the published one's conventions: bytes for what is unknown, text unchanged."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the default starts 16, which ends the process where a container limits their number
        minloglevel=2,
    )
    return model.getvalue()


def small_tokenizer(folder: Path, corpus: tuple[str, ...] = CORPUS) -> ChatGLMTokenizer:
    """A tokenizer whose ``tokenizer.model`` is written to ``folder``."""
    file = folder / "tokenizer.model"
    file.write_bytes(train_tokenizer(corpus))
    return ChatGLMTokenizer(str(file))


def small_config(**changes) -> ChatGLM3Config:
    """A configuration of ChatGLM3's proportions, and about 90,000 parameters."""
    arguments = {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    }
    return ChatGLM3Config(**arguments | changes)


def random_model(
    config: ChatGLM3Config, seed: int = 0, network: type[ChatGLM3ForCausalLM] = ChatGLM3ForCausalLM
) -> ChatGLM3ForCausalLM:
    """A model whose every tensor is random, norms and biases included, so that a mixed-up tensor shows."""
    model = network(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


def small_model(tokenizer: ChatGLMTokenizer) -> ChatGLM3ForCausalLM:
    """A random model, the same each time, that answers to the tokenizer's stop tokens."""
    return random_model(small_config(vocab_size=len(tokenizer) + 7, eos_token_id=tokenizer.stop_token_ids))


def random_lora(base: Path, seed: int, scale: float = 0.1) -> PeftModel:
    """The model in ``base`` with an adapter that changes its answers: neither of its matrices is zero."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def chain_model(tokenizer: ChatGLMTokenizer, successors: dict[int, int]) -> ChatGLM3ForCausalLM:
    """A model that says, after each token, its successor (</s> after all others), whatever came before.

    Each token is its own hidden dimension, the layers add nothing, and the output layer is the table of successors.
    """
    rows = len(tokenizer)
    size = -(-rows // 8) * 8
    model = ChatGLM3ForCausalLM(
        small_config(
            vocab_size=rows,
            hidden_size=size,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            eos_token_id=tokenizer.stop_token_ids,
        )
    )
    table = torch.zeros(rows, size)
    for token in range(rows):
        table[successors.get(token, tokenizer.eos_token_id), token] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(rows, size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(table)
    return model
