"""Read ``lora.yaml``: check every key, give everything left open a stated default.

ChatGLM3's published files are accepted unchanged. Options they leave open (target modules, seed) get a default, and
options that transformers has renamed since are translated; ``FinetuneConfig.notes`` lists each such decision.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from helpers.config.deepspeed import AUTO
from helpers.errors import UserError

# The attention projections that ChatGLM3's published adapters train, under their names in transformers' Glm.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj")
FUSED_TARGET = "query_key_value"
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "group_by_length": "train_sampling_strategy",
}
# Options of older transformers that have no effect here; accepted so that older files keep working.
DROPPED = ("overwrite_output_dir", "save_safetensors", "logging_dir", "sortish_sampler", "ddp_timeout_seconds")
GENERATION_KEYS = ("predict_with_generate", "generation_config", "generation_max_length", "generation_num_beams")
TOP_KEYS = (
    *("data_config", "max_input_length", "max_output_length", "max_eval_samples"),
    *("quantization_bit", "speed", "training_args", "peft_config"),
)
QUANTIZATION_BITS = (8, 4)
CHECKPOINTING_KEYS = ("gradient_checkpointing", "activation_checkpointing")  # transformers' old name and its new one
DEFAULT_SEED = 42


@dataclass(frozen=True)
class DataConfig:
    """File names inside the data folder, and how many processes tokenise them."""

    train_file: str = "train.json"
    val_file: str | None = None
    test_file: str | None = None
    num_proc: int = 1


@dataclass(frozen=True)
class SpeedOptions:
    """Options that make the same training faster or smaller. Only those that do not change the result default to on.

    Attributes:
        packing: Tokens per pack, a sequence of several examples (``helpers.finetune.packing``). None pads instead.
            With packing, ``per_device_train_batch_size`` counts packs.
        compile_layers: Compile each layer with ``torch.compile``.
        loss_chunk: Tokens whose logits exist at the same time (``helpers.activations.chunked_loss``); None is all.
        padding_mask: Pass attention a padding mask even if FlashAttention could do without. It can: padding is on the
            right, and causal attention never looks there.
        offload_checkpoints: Keep the layer inputs that gradient checkpointing saves in host memory.
        expandable_segments: Let torch's allocator grow its segments: batches of different lengths then reuse the
            same memory instead of fragmenting it.
    """

    packing: int | None = None
    compile_layers: bool = False
    loss_chunk: int | None = 1024
    padding_mask: bool = False
    offload_checkpoints: bool = False
    expandable_segments: bool = True


@dataclass(frozen=True)
class FinetuneConfig:
    """The contents of one ``lora.yaml``.

    Attributes:
        data: Where the examples are.
        training: Keyword arguments of ``transformers.TrainingArguments``.
        lora: Keyword arguments of ``peft.LoraConfig``.
        max_input_length: Tokens of the prompt.
        max_output_length: Tokens of the answer.
        max_eval_samples: Dev examples that are answered and scored at each evaluation.
        predict_with_generate: Answer and score them at all.
        max_new_tokens: Longest answer to generate.
        quantization_bit: 8 or 4 to quantise the frozen matrices, None to keep them in the training precision.
        speed: Options that make the same training faster or smaller.
        notes: One line for each decision that the file left open.
    """

    data: DataConfig
    training: dict[str, Any]
    lora: dict[str, Any]
    max_input_length: int = 256
    max_output_length: int = 512
    max_eval_samples: int = 50
    predict_with_generate: bool = False
    max_new_tokens: int = 512
    quantization_bit: int | None = None
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    notes: list[str] = field(default_factory=list)

    @property
    def checkpointing(self) -> bool | str:
        """Whether backward recomputes the layers; "auto" if the job decides by the GPU's memory."""
        value = next((self.training[key] for key in CHECKPOINTING_KEYS if self.training.get(key)), False)
        return value if value == AUTO else bool(value)


def _suggest(key: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown key: the most similar known one, or all known ones."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))[:200]}"


def _check_keys(found: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_suggest(key, known)}")


def _section(raw: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {key} must be a block of keys, not {value!r}")
    return dict(value)


def _positive_int(raw: dict[str, Any], key: str, default: int, source: str) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: {key} must be a whole number above 0, not {value!r}")
    return value


def _quantization_bit(raw: dict[str, Any], source: str) -> int | None:
    value = raw.get("quantization_bit")
    if value is not None and (isinstance(value, bool) or value not in QUANTIZATION_BITS):
        raise UserError(f"{source}: quantization_bit must be 8 or 4, not {value!r}; leave it out to train in 16 bit")
    return value


def _speed(block: dict[str, Any], source: str) -> SpeedOptions:
    where = f"{source}, speed"
    types = {f.name: f.type for f in dataclasses.fields(SpeedOptions)}
    _check_keys(block, types, where)
    for key, value in block.items():
        if types[key] is bool:
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
        elif value:
            _positive_int(block, key, value, where)
        else:
            block[key] = None  # false and 0 turn off, like null
    return SpeedOptions(**block)


def _training(block: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    known = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    training: dict[str, Any] = {}
    for key, value in block.items():
        if key in DROPPED:
            notes.append(f"{key} no longer has an effect and is ignored")
            continue
        name = RENAMED.get(key, key)
        if name not in known:
            raise UserError(f"{source}, training_args: unknown key {key!r}{_suggest(key, [*known, *RENAMED])}")
        if name in CHECKPOINTING_KEYS and value not in (True, False, None, AUTO):
            raise UserError(f"{source}, training_args: {key} must be true, false or auto, not {value!r}")
        if name != key:
            notes.append(f"{key} is called {name} today")
        training[name] = "group_by_length" if key == "group_by_length" and value is True else value
        # YAML 1.1 reads 5e-5, which has no decimal point, as text.
        if isinstance(value, str) and known[name].type in (float, "float", float | None):
            training[name] = _number(value, f"{source}, training_args: {key}")
    if training.get("label_smoothing_factor"):
        # The Trainer would take it from all logits, which the chunked loss never has, and without shifting the labels.
        raise UserError(f"{source}, training_args: label_smoothing_factor is not supported; remove it")
    training.setdefault("output_dir", "./output")
    if "seed" not in training:
        training["seed"] = DEFAULT_SEED
        notes.append(f"no seed given: seed {DEFAULT_SEED}")
    return training


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where} must be a number, not {text!r}") from None


def _lora(block: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    where = f"{source}, peft_config"
    kind = block.pop("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind!r} is not supported; use LORA")
    _check_keys(block, {f.name for f in dataclasses.fields(LoraConfig)}, where)
    targets = block.get("target_modules")
    targets = [targets] if isinstance(targets, str) and targets != "all-linear" else targets
    if targets is None:
        targets = list(DEFAULT_TARGETS)
        notes.append(f"no target_modules given: LoRA on {', '.join(targets)}")
    elif FUSED_TARGET in targets:
        targets = [t for target in targets for t in (DEFAULT_TARGETS if target == FUSED_TARGET else (target,))]
        notes.append(f"{FUSED_TARGET} is split into three matrices: LoRA on {', '.join(DEFAULT_TARGETS)}")
    return {"task_type": "CAUSAL_LM", **block, "target_modules": targets}


def parse_finetune_config(raw: dict[str, Any], source: str) -> FinetuneConfig:
    """Check the contents of a ``lora.yaml`` and fill in its defaults.

    Args:
        raw: The file's keys and values.
        source: The file's name, for messages.

    Returns:
        The configuration.

    Raises:
        UserError: A key is unknown (the message suggests the most similar known one), or a value has the wrong type.
    """
    _check_keys(raw, TOP_KEYS, source)
    notes: list[str] = []
    data = _section(raw, "data_config", source)
    _check_keys(data, [f.name for f in dataclasses.fields(DataConfig)], f"{source}, data_config")
    training = _section(raw, "training_args", source)
    generation = {key: training.pop(key) for key in GENERATION_KEYS if key in training}
    generation_config = generation.get("generation_config") or {}
    _check_keys(generation_config, ["max_new_tokens"], f"{source}, generation_config")
    lora = _section(raw, "peft_config", source)
    if not lora:
        raise UserError(f"{source}: no peft_config; add one with r and lora_alpha, this job trains a LoRA adapter")
    max_output_length = _positive_int(raw, "max_output_length", 512, source)
    return FinetuneConfig(
        data=DataConfig(**data),
        training=_training(training, source, notes),
        lora=_lora(lora, source, notes),
        max_input_length=_positive_int(raw, "max_input_length", 256, source),
        max_output_length=max_output_length,
        max_eval_samples=_positive_int(raw, "max_eval_samples", 50, source),
        predict_with_generate=bool(generation.get("predict_with_generate", False)),
        max_new_tokens=_positive_int(generation_config, "max_new_tokens", max_output_length, source),
        quantization_bit=_quantization_bit(raw, source),
        speed=_speed(_section(raw, "speed", source), source),
        notes=notes,
    )


def read_finetune_config(path: Path) -> FinetuneConfig:
    """Read a ``lora.yaml``.

    Args:
        path: The file.

    Returns:
        The configuration, every default filled in.

    Raises:
        UserError: The file is missing, is not YAML, or has an unknown key or a value of the wrong type.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}; configs/lora.yaml is one") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values, not {raw!r}")
    return parse_finetune_config(raw, str(path))
