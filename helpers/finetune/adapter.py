"""Check ``peft_config`` against the network, before its weights are loaded: each name must be a module of it."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.chatglm3.checkpoint import read_config
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.config.adapter_names import SPLIT
from helpers.config.finetune import FinetuneConfig
from helpers.errors import UserError


def check_adapter(lora: Mapping[str, Any], model_dir: Path, source: str, rounded: bool = False) -> None:
    """Put the adapter on a network without weights, and look at every name.

    PEFT itself is content if one of several names matches; the others would be left out without a word.

    Args:
        lora: Keyword arguments of ``LoraConfig``.
        model_dir: The checkpoint's folder.
        source: The configuration's file, for messages.
        rounded: Whether the layers' matrices are kept in fewer bits, in which they can only be frozen.

    Raises:
        UserError: A name belongs to no module, or PEFT cannot put the adapter there.
    """
    where = f"{source}, peft_config"
    with torch.device("meta"):
        model = ChatGLM3ForCausalLM(ChatGLM3Config.from_dict(read_config(model_dir)))
    names = [name for name, _ in model.named_modules() if name]
    _check_targets(lora, model, f"{where}: target_modules")
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        _check_names(lora.get(key), names, f"{where}: {key}")
    parameters = [name for name, _ in model.named_parameters()]
    _check_names(lora.get("target_parameters"), parameters, f"{where}: target_parameters")
    if rounded:
        _check_frozen(lora, model, where)
    _check_layers(lora, len(model.model.layers), where)
    _check_ranks(lora, model, where)
    _check_tokens(lora.get("trainable_token_indices"), model.config.vocab_size, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the adapter that is trained repeats them
            # MiCA would compute with the weights, which are not there.
            initial = {"init_lora_weights": True} if _is_mica(lora) else {}
            adapted: Any = get_peft_model(model, LoraConfig(**{**lora, **initial}))
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
        if "No modules were targeted" in str(error):
            raise UserError(
                f"{where}: modules_to_save or exclude_modules leaves out every module of target_modules; remove it, or "
                "name other modules"
            ) from error
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    _check_effect(lora, adapted.base_model, where)
    layers = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            # As get_pattern_key in peft/utils/other.py reads it.
            if not any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name.removesuffix(".lora_A")) for name in layers):
                raise UserError(f"{where}: {key} {pattern!r} matches no module with an adapter; {_known(names)}")


def _check_frozen(lora: Mapping[str, Any], model: ChatGLM3ForCausalLM, where: str) -> None:
    """Check that no matrix inside the layers would itself be trained."""
    matrices = {name for name, module in model.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    names = [name for name, _ in model.named_modules()]
    modules = [name for name in names if any(f"{matrix}.".startswith(f"{name}.") for matrix in matrices)]
    weights = [f"{matrix}.weight" for matrix in matrices]
    for key, rounded in (("modules_to_save", modules), ("target_parameters", weights)):
        given = lora.get(key) or []
        for item in [given] if isinstance(given, str) else given:
            if any(re.fullmatch(_pattern(given, item), name) for name in rounded):
                raise UserError(
                    f"{where}: {key} {item!r} trains matrices that quantization_bit or fp8 rounds; name them in "
                    f"target_modules, or remove {key}"
                )


def _pattern(given: Any, item: str) -> str:
    """Return what a name matches, as PEFT reads it: a text is a pattern, an item of a list a whole name or its end."""
    return item if isinstance(given, str) else rf"(?:.*\.)?{re.escape(item)}"


def check_prefix(config: FinetuneConfig, model_dir: Path, source: str) -> None:
    """Check that a prefix leaves room for the rows.

    Args:
        config: Contents of ``lora.yaml``; only a prefix is checked.
        model_dir: The checkpoint's folder.
        source: The configuration's file, for messages.

    Raises:
        UserError: The prefix and the longest row are more than the model reads.
    """
    if not config.prefix:
        return
    tokens, longest = config.prefix["num_virtual_tokens"], config.max_input_length + config.max_output_length + 1
    most = ChatGLM3Config.from_dict(read_config(model_dir)).max_position_embeddings
    if tokens + longest > most:
        raise UserError(
            f"{source}, peft_config: num_virtual_tokens {tokens} and rows of up to {longest} tokens are more than the "
            f"{most} that the model reads; lower one of them"
        )


def _check_names(given: Any, names: Iterable[str], where: str) -> None:
    if given is None or given == "all-linear":
        return
    try:
        for item in [given] if isinstance(given, str) else given:
            if not any(re.fullmatch(_pattern(given, item), name) for name in names):
                raise UserError(f"{where} {item!r} matches no module; {_known(names)}")
    except re.error as error:
        raise UserError(f"{where} {given!r} is not a regular expression: {error}") from error


def _check_targets(lora: Mapping[str, Any], model: torch.nn.Module, where: str) -> None:
    """Check that what ``target_modules`` names are matrices, and of the kind that LoRA can adapt."""
    targets = lora.get("target_modules")
    if targets == [] and not lora.get("target_parameters"):
        raise UserError(
            f"{where} is empty, so nothing would be trained; name matrices, or leave it out for {', '.join(SPLIT)}"
        )
    for item in targets if isinstance(targets, list) else [targets or ""]:
        if item in ("all", "all-linear") and targets != "all-linear":
            raise UserError(f"{where} {targets!r}: for every matrix write target_modules: all-linear")
        pattern = _pattern(targets, item)
        for name, module in model.named_modules():
            if targets == "all-linear" or not name or isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                continue
            if _matches(pattern, name):
                raise UserError(f"{where} {item!r} names {name}, {_why_not(module)}")


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # reported with the names


def _why_not(module: torch.nn.Module) -> str:
    inside = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    if inside:
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in inside))
        return f"which is not a matrix; LoRA adapts matrices: name those inside it, {ends}"
    if any(True for _ in module.parameters()):
        return "which is a norm layer, not a matrix; LoRA cannot adapt it: train all of it, under modules_to_save"
    return "which has no weights to adapt; remove it"


def _check_ranks(lora: Mapping[str, Any], model: torch.nn.Module, where: str) -> None:
    """Check the values of the patterns, and that no rank is larger than the matrices: PEFT would allocate it."""
    largest = max(min(part.weight.shape) for part in model.modules() if isinstance(part, torch.nn.Linear))
    ranks = {"r": lora.get("r", LoraConfig.r)}
    for key, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        for name, value in (lora.get(key) or {}).items():
            if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
                wanted = "a whole number" if kind is int else "a number"
                raise UserError(f"{where}: {key} {name} must be {wanted} above 0, not {value!r}")
            if kind is int:
                ranks[f"{key} {name}"] = value
    for key, rank in ranks.items():
        if rank > largest:
            raise UserError(
                f"{where}: {key} {rank} is more than any matrix has, whose smaller side is {largest}; lower it"
            )


def _check_effect(lora: Mapping[str, Any], tuner: Any, where: str) -> None:
    """Check that each target has an adapter, which can be merged in the end."""
    adapted = tuner.targeted_module_names
    targets = lora.get("target_modules")
    for item in targets if isinstance(targets, list) else []:
        if not any(re.fullmatch(rf"(?:.*\.)?{re.escape(item)}", name) for name in adapted):
            raise UserError(
                f"{where}: target_modules {item!r} has no effect, because modules_to_save or another key leaves out "
                "all its modules; remove one of them"
            )
    if _is_mica(lora):
        smallest = min(min(tuner.model.get_submodule(name).weight.shape) for name in adapted)
        if max(tuner.model.get_submodule(name).r["default"] for name in adapted) > smallest:
            raise UserError(f"{where}: init_lora_weights mica takes an r up to {smallest}, the smallest matrix's size")
    if lora.get("lora_bias"):
        without = [name for name in adapted if getattr(tuner.model.get_submodule(name), "bias", None) is None]
        if without:
            raise UserError(
                f"{where}: lora_bias on {without[0].rpartition('.')[2]}, which has no bias to merge it into; remove "
                "lora_bias, or that name from target_modules"
            )


def _is_mica(lora: Mapping[str, Any]) -> bool:
    return str(lora.get("init_lora_weights")).lower() == "mica"


def _check_tokens(given: Any, vocabulary: int, where: str) -> None:
    ids = given.values() if isinstance(given, dict) else [given or []]
    for token in (token for group in ids for token in group):
        if not 0 <= token < vocabulary:
            raise UserError(f"{where}: trainable_token_indices {token} is not a token; there are 0 to {vocabulary - 1}")


def _known(names: Iterable[str]) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return f"there are {', '.join(end for end in ends if not end.isdecimal())}"


def _check_layers(lora: Mapping[str, Any], count: int, where: str) -> None:
    chosen = lora.get("layers_to_transform")
    for layer in [chosen] if isinstance(chosen, int) else chosen or []:
        if not 0 <= layer < count:
            raise UserError(f"{where}: layers_to_transform {layer} is not a layer; there are 0 to {count - 1}")
    pattern = lora.get("layers_pattern")
    for name in [pattern] if isinstance(pattern, str) else pattern or []:
        if name != "layers":
            raise UserError(f"{where}: layers_pattern {name!r} matches no list of layers; it is called layers here")
