"""Read ``lora.yaml`` and the DeepSpeed JSON: every key known, every default said, no contradiction between the two.

ChatGLM3's published files are accepted unchanged. What they leave open (target modules, precision, seed) gets a stated
default; what transformers has renamed since is understood. ``FinetuneConfig.notes`` says each such decision in a line.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from helpers.errors import UserError
from helpers.files import read_json_object

# What attention projections ChatGLM3's published adapters train, in the names of transformers' Glm.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj")
FUSED_TARGET = "query_key_value"
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "group_by_length": "train_sampling_strategy",
}
# Keys of older transformers without an effect here; accepted so that older files keep working.
DROPPED = ("overwrite_output_dir", "save_safetensors", "logging_dir", "sortish_sampler", "ddp_timeout_seconds")
GENERATION_KEYS = ("predict_with_generate", "generation_config", "generation_max_length", "generation_num_beams")
TOP_KEYS = (
    *("data_config", "max_input_length", "max_output_length", "max_eval_samples"),
    *("quantization_bit", "speed", "training_args", "peft_config"),
)
QUANTIZATION_BITS = (8, 4)
AUTO = "auto"
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # transformers' old name and its new one
DEFAULT_SEED = 42
WORTH_A_WARNING_MIB = 100


@dataclass(frozen=True)
class DataConfig:
    """File names inside the data folder, and how many processes tokenise them."""

    train_file: str = "train.json"
    val_file: str | None = None
    test_file: str | None = None
    num_proc: int = 1


@dataclass(frozen=True)
class Speed:
    """What makes the same training faster or smaller; only what computes the same is on where nothing is said.

    ``packing`` is the length in tokens of a pack, several rows in one sequence (``helpers.finetune.packing``), and
    ``per_device_train_batch_size`` then counts packs. ``compile_layers`` compiles each layer with ``torch.compile``.
    ``loss_chunk`` is the number of tokens whose logits exist at a time (``helpers.activations.chunked_loss``), None all
    of them.
    ``padding_mask`` gives attention a mask of the padding where FlashAttention would do without: no token that counts
    sees padding that comes after it.
    ``offload_checkpoints`` keeps the layers' inputs, which gradient checkpointing keeps, in host memory.
    ``expandable_segments`` lets torch's allocator grow its segments, so that no holes are left between them.
    """

    packing: int | None = None
    compile_layers: bool = False
    loss_chunk: int | None = 1024
    padding_mask: bool = False
    offload_checkpoints: bool = False
    expandable_segments: bool = False


@dataclass(frozen=True)
class FinetuneConfig:
    """What one ``lora.yaml`` asks for.

    ``training`` and ``lora`` are keyword arguments of ``TrainingArguments`` and ``LoraConfig``; lengths are in tokens.
    ``quantization_bit`` 8 or 4 is what the frozen matrices are held in while the adapter is trained, None all bits.
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
    speed: Speed = field(default_factory=Speed)
    notes: list[str] = field(default_factory=list)

    @property
    def checkpointing(self) -> bool | str:
        """Whether layers are computed again in backward; "auto" where the job looks whether the card needs it."""
        asked = next((self.training[key] for key in CHECKPOINTING if self.training.get(key)), False)
        return asked if asked == AUTO else bool(asked)


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))[:200]}"


def _check_keys(found: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_nearest(key, known)}")


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


def _speed(block: dict[str, Any], source: str) -> Speed:
    where = f"{source}, speed"
    types = {f.name: f.type for f in dataclasses.fields(Speed)}
    _check_keys(block, types, where)
    for key, value in block.items():
        if types[key] is bool:
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
        elif value:
            _positive_int(block, key, value, where)
        else:
            block[key] = None  # false and 0 turn off, like null
    return Speed(**block)


def _training(block: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    known = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    training: dict[str, Any] = {}
    for key, value in block.items():
        if key in DROPPED:
            notes.append(f"{key} has no effect any more and is ignored")
            continue
        name = RENAMED.get(key, key)
        if name not in known:
            raise UserError(f"{source}, training_args: unknown key {key!r}{_nearest(key, [*known, *RENAMED])}")
        if name in CHECKPOINTING and value not in (True, False, None, AUTO):
            raise UserError(f"{source}, training_args: {key} must be true, false or auto, not {value!r}")
        if name != key:
            notes.append(f"{key} is called {name} today")
        training[name] = "group_by_length" if key == "group_by_length" and value is True else value
        # YAML 1.1 takes 5e-5, which has no point, for a text.
        if isinstance(value, str) and known[name].type in (float, "float", float | None):
            training[name] = _number(value, f"{source}, training_args: {key}")
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
        raise UserError(f"{where}: peft_type {kind!r} is not supported here; use LORA")
    _check_keys(block, {f.name for f in dataclasses.fields(LoraConfig)}, where)
    targets = block.get("target_modules")
    targets = [targets] if isinstance(targets, str) and targets != "all-linear" else targets
    if targets is None:
        targets = list(DEFAULT_TARGETS)
        notes.append(f"no target_modules given: LoRA on {', '.join(targets)}")
    elif FUSED_TARGET in targets:
        targets = [t for target in targets for t in (DEFAULT_TARGETS if target == FUSED_TARGET else (target,))]
        notes.append(f"{FUSED_TARGET} is split here: LoRA on {', '.join(DEFAULT_TARGETS)}")
    return {"task_type": "CAUSAL_LM", **block, "target_modules": targets}


def parse(raw: dict[str, Any], source: str) -> FinetuneConfig:
    """Turn the contents of a ``lora.yaml`` into a :class:`FinetuneConfig`; ``source`` is its name in messages.

    Raises UserError for an unknown key, naming the nearest known one, or for a value of the wrong kind.
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
        raise UserError(f"{source}: no peft_config; this job trains a LoRA adapter, so give it r and lora_alpha")
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


def read(path: Path) -> FinetuneConfig:
    """Read a ``lora.yaml``. Raises UserError where it is missing, is not YAML, or says what is not known."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}; configs/lora.yaml is one") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values, not {raw!r}")
    return parse(raw, str(path))


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file. Raises UserError where it is missing or is not a JSON object."""
    return read_json_object(path, f"no DeepSpeed file {path}; configs/ds_zero_2.json is one")


def _enabled(deepspeed: dict[str, Any], key: str) -> bool | None:
    """True or False where the DeepSpeed file says so; None for "auto" or nothing."""
    value = deepspeed.get(key, {}).get("enabled", "auto")
    return None if value == "auto" else bool(value)


def contradictions(deepspeed: dict[str, Any], training: dict[str, Any], world_size: int) -> list[str]:
    """Where a DeepSpeed file and ``training_args`` ask for different things, one text each. "auto" never differs."""
    micro = training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    accumulation = training.get("gradient_accumulation_steps", TrainingArguments.gradient_accumulation_steps)
    clipping = training.get("max_grad_norm", TrainingArguments.max_grad_norm)
    optimizer = deepspeed.get("optimizer", {}).get("params", {})
    pairs = [
        ("train_micro_batch_size_per_gpu", deepspeed, "per_device_train_batch_size", micro),
        ("gradient_accumulation_steps", deepspeed, "gradient_accumulation_steps", accumulation),
        ("gradient_clipping", deepspeed, "max_grad_norm", clipping),
        ("train_batch_size", deepspeed, f"its product over {world_size} ranks", micro * accumulation * world_size),
        ("lr", optimizer, "learning_rate", training.get("learning_rate", TrainingArguments.learning_rate)),
        ("weight_decay", optimizer, "weight_decay", training.get("weight_decay", TrainingArguments.weight_decay)),
    ]
    found = [
        f"{key} is {block[key]} but {name} is {value}"
        for key, block, name, value in pairs
        if block.get(key, "auto") not in ("auto", value)
    ]
    for kind in ("fp16", "bf16"):
        asked = _enabled(deepspeed, kind)
        if asked is not None and kind in training and asked != bool(training[kind]):
            found.append(f"{kind}.enabled is {asked} but {kind} is {training[kind]}")
    return found


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """ZeRO stage of a DeepSpeed file; 0 without one."""
    return (deepspeed or {}).get("zero_optimization", {}).get("stage", 0)


def check_quantization(bits: int | None, deepspeed: dict[str, Any] | None) -> None:
    """Raise UserError where quantised weights meet ZeRO-3, or their library is missing."""
    if bits is None:
        return
    if zero_stage(deepspeed) == 3:
        raise UserError(
            f"quantization_bit {bits} does not go with ZeRO-3, which would cut codes from their scales: use "
            "configs/ds_zero_2.json, or no DeepSpeed file"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantization_bit {bits} needs the package bitsandbytes: pip install bitsandbytes==0.50.2")


def check_speed(config: FinetuneConfig, deepspeed: dict[str, Any] | None) -> None:
    """Raise UserError where a key of ``speed`` meets what it does not go with."""
    if config.speed.compile_layers and zero_stage(deepspeed) == 3:
        raise UserError(
            "speed: compile_layers does not go with ZeRO-3, which gathers a layer's weights when it is called; leave "
            "it out, or use configs/ds_zero_2.json or no DeepSpeed file"
        )
    if config.speed.offload_checkpoints and not config.checkpointing:
        raise UserError(
            "speed: offload_checkpoints is for the inputs that gradient checkpointing keeps, which is off: say "
            "gradient_checkpointing: true under training_args"
        )


def precision(training: dict[str, Any], deepspeed: dict[str, Any] | None, hardware: str) -> str:
    """Which of "bf16", "fp16", "no" (fp32) to train in.

    ``hardware`` is the best that this machine has. A precision that a file asks for is kept if the hardware has it.
    Raises UserError for one that it has not, for both at once, and for fp16 with a loss scale that never adapts:
    its gradients underflow and the loss reads 0 or nan.
    """
    asked = {kind for kind in ("bf16", "fp16") if training.get(kind) or (deepspeed and _enabled(deepspeed, kind))}
    if len(asked) == 2:
        raise UserError("both bf16 and fp16 are asked for; keep one")
    chosen = asked.pop() if asked else hardware
    if chosen == "bf16" and hardware != "bf16":
        raise UserError(f"bf16 is asked for, but this hardware has it not; drop the line to train in {hardware}")
    if chosen == "fp16" and hardware == "no":
        raise UserError("fp16 is asked for, but there is no GPU here; drop the line to train in fp32")
    scale = (deepspeed or {}).get("fp16", {}).get("loss_scale", 0)
    if chosen == "fp16" and scale != 0:
        raise UserError(f"fp16.loss_scale is fixed at {scale}: gradients underflow; set it to 0, which adapts it")
    return chosen


def bucket_bytes(deepspeed: dict[str, Any], element_bytes: int) -> int:
    """Bytes that DeepSpeed's ZeRO-1/2 allocates on every rank for gradients on their way, however small they are.

    ``reduce_bucket_size`` elements once, twice with ``overlap_comm`` (``setup_buckets`` of DeepSpeed's
    ``stage_1_and_2.py``). 0 for the other stages, which allocate what they need, and for "auto".
    """
    zero = deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", 5e8)
    if zero_stage(deepspeed) not in (1, 2) or bucket == "auto":
        return 0
    return (2 if zero.get("overlap_comm") else 1) * int(bucket) * element_bytes


def bucket_warning(deepspeed: dict[str, Any], trainable: int, element_bytes: int) -> str | None:
    """A line on what oversized communication buckets cost in memory, or None where they fit or cost little.

    ``trainable`` is a number of parameters.
    """
    taken = bucket_bytes(deepspeed, element_bytes)
    zero = deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", 5e8)
    if taken < WORTH_A_WARNING_MIB * 2**20 or bucket <= 2 * trainable:
        return None
    buffers = 2 if zero.get("overlap_comm") else 1
    mib = taken / 2**20
    return (
        f"reduce_bucket_size {bucket:.0e} takes {buffers} x {mib / buffers:,.0f} MiB on every rank for gradients of "
        f"{trainable * element_bytes / 2**20:,.1f} MiB; {trainable:.0e} would do and save "
        f"{mib * (1 - trainable / bucket):,.0f} MiB"
    )
