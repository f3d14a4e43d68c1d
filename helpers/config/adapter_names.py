"""Translate module names of ChatGLM3's published network, which published files use, to those of transformers."""

import re
from typing import Any

# The published network has query, key and value in one matrix, ours in three.
FUSED = "query_key_value"
SPLIT = ("q_proj", "k_proj", "v_proj")
# In this order; a backslash may stand before a dot, because names may be patterns.
_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\b(?:transformer\\?\.)?embedding(?:\\?\.word_embeddings)?\b", "embed_tokens"),
        (r"\bword_embeddings\b", "embed_tokens"),
        (r"\b(?:transformer\\?\.)?output_layer\b", "lm_head"),
        (r"\b(?:transformer\\?\.)?(?:encoder\\?\.)?final_layernorm\b", "model.norm"),
        (r"\btransformer\\?\.encoder\\?\.layers\b", "model.layers"),
        (r"\bself_attention\b", "self_attn"),
        (r"\bdense\b", "o_proj"),
        (r"\bdense_h_to_4h\b", "gate_up_proj"),
        (r"\bdense_4h_to_h\b", "down_proj"),
    )
]
_LISTS = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def translate_name(name: str) -> tuple[str, ...]:
    """Translate one name, or a pattern made of names.

    Args:
        name: Of a module, whole or its last parts: ``dense``, ``transformer.encoder.layers.0.self_attention.dense``.

    Returns:
        The name here; three for the fused matrix. Names that the published network does not have stay as they are.
    """
    for pattern, ours in _RENAMED:
        name = pattern.sub(ours, name)
    return tuple(re.sub(rf"\b{FUSED}\b", part, name) for part in SPLIT) if re.search(rf"\b{FUSED}\b", name) else (name,)


def translate_adapter(lora: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Translate every option of ``peft_config`` that names modules.

    Args:
        lora: Keyword arguments of ``LoraConfig``. A text instead of a list is a pattern for whole names, as in PEFT.
        notes: Gets a line for each name that has changed.

    Returns:
        The options with the names of this network.
    """
    changed: dict[str, tuple[str, ...]] = {}

    def ours(name: str) -> tuple[str, ...]:
        translated = translate_name(name)
        if translated != (name,):
            changed[name] = translated
        return translated

    translated = dict(lora)
    for key in _LISTS:
        value = lora.get(key)
        if isinstance(value, str) and value != "all-linear":
            names = ours(value)
            translated[key] = names[0] if len(names) == 1 else "|".join(f"(?:{name})" for name in names)
        elif isinstance(value, list):
            translated[key] = list(dict.fromkeys(name for item in value for name in ours(item)))
    for key in _PATTERNS:
        if lora.get(key):
            translated[key] = {name: number for pattern, number in lora[key].items() for name in ours(pattern)}
    tokens = lora.get("trainable_token_indices")
    if isinstance(tokens, dict):
        translated["trainable_token_indices"] = {name: ids for given, ids in tokens.items() for name in ours(given)}
    for name, names in changed.items():
        if name == FUSED:
            notes.append(f"{FUSED} is split into three matrices: LoRA on {', '.join(names)}")
        else:
            notes.append(f"{name} is called {' and '.join(names)} here")
    return translated
