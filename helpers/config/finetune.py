"""Read ``lora.yaml``: check every key, give everything left open a stated default.

ChatGLM3's published files are accepted unchanged. Options they leave open (target modules, seed) get a default, and
options that transformers has renamed since are translated; ``FinetuneConfig.notes`` lists each such decision.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.config.blocks import CHECKPOINTING_KEYS, adapter_block, training_block, training_setting
from helpers.config.deepspeed import AUTO
from helpers.config.options import MOST
from helpers.config.other_tools import check_known_keys
from helpers.config.secrets import without_secrets
from helpers.config.values import Limits, annotations, check_keys, check_values
from helpers.config.yaml_file import read_yaml
from helpers.errors import UserError

GENERATION_KEYS = ("predict_with_generate", "generation_config", "generation_max_length", "generation_num_beams")
TOP_KEYS = (
    *("data_config", "max_input_length", "max_output_length", "max_eval_samples"),
    *("quantization_bit", "speed", "training_args", "peft_config"),
)
QUANTIZATION_BITS = (8, 4)
FP8 = "fp8"
ALL_PARAMETERS = "all parameters"  # the method of a file without peft_config


@dataclass(frozen=True)
class DataConfig:
    """File names inside the data folder, and how many processes tokenise them."""

    train_file: str = "train.json"
    val_file: str | None = None
    test_file: str | None = None
    num_proc: int = 1


@dataclass(frozen=True)
class SpeedOptions:
    """Options that make training faster or smaller. Only those that do not change the result default to on.

    Attributes:
        packing: Tokens per pack, a sequence of several examples (``helpers.finetune.packing``). None pads instead.
            With packing, ``per_device_train_batch_size`` counts packs.
        compile_layers: Compile each layer with ``torch.compile``.
        recompute_inputs: Let the backward of compiled layers recompute the adapters' inputs
            (``helpers.activations.compiled``): a fifth of the activations less, for a little time.
        shared_dropout: Let the adapters of q, k and v drop the same elements of the input that they share
            (``helpers.finetune.shared_dropout``), as the published recipe's one adapter for all three does: less
            memory and time, and other random numbers than PEFT's.
        loss_chunk: Tokens whose logits exist at the same time (``helpers.activations.chunked_loss``); None is all.
        padding_mask: Pass attention a padding mask even if FlashAttention could do without. It can: padding is on the
            right, and causal attention never looks there.
        offload_checkpoints: Keep the layer inputs that gradient checkpointing saves in host memory.
        expandable_segments: Let torch's allocator grow its segments: batches of different lengths then reuse the
            same memory instead of fragmenting it.
        gpu_memory_gib: Of a GPU, at most: the allocator gives its cache back before it takes more.
        small_nccl_buffers: Let NCCL use few channels with small buffers: less memory, and slower collectives.
        fp8: Round the frozen matrices to fp8 and multiply in it (``helpers.quantization.fp8``): faster, in half of
            their memory, and not quite the same training.
        fp8_transposed: With ``fp8``, keep the matrices transposed as well, in another byte per weight, instead of
            transposing them in each backward. The training is the same.
    """

    packing: int | None = None
    compile_layers: bool = False
    recompute_inputs: bool = False
    shared_dropout: bool = False
    loss_chunk: int | None = 1024
    padding_mask: bool = False
    offload_checkpoints: bool = False
    expandable_segments: bool = True
    gpu_memory_gib: int | None = None
    small_nccl_buffers: bool = False
    fp8: bool = False
    fp8_transposed: bool = False


@dataclass(frozen=True)
class FinetuneConfig:
    """The contents of one ``lora.yaml``.

    Attributes:
        data: Where the examples are.
        training: Keyword arguments of ``transformers.TrainingArguments``.
        lora: Keyword arguments of ``peft.LoraConfig``; empty if no LoRA adapter is trained.
        prefix: Keyword arguments of ``peft.PrefixTuningConfig``; empty if no prefix is trained.
        max_input_length: Tokens of the prompt.
        max_output_length: Tokens of the answer.
        max_eval_samples: Dev examples that are answered and scored at each evaluation.
        predict_with_generate: Answer and score them at all.
        max_new_tokens: Longest answer to generate.
        quantization_bit: 8 or 4 to quantise the frozen matrices, None to keep them in the training precision.
        speed: Options that make training faster or smaller.
        deepspeed_file: ``deepspeed`` under ``training_args``; :func:`helpers.config.deepspeed.choose_deepspeed_file`
            finds it.
        notes: One line for each decision that the file left open.
    """

    data: DataConfig
    training: dict[str, Any]
    lora: dict[str, Any]
    prefix: dict[str, Any]
    max_input_length: int = 256
    max_output_length: int = 512
    max_eval_samples: int = 50
    predict_with_generate: bool = False
    max_new_tokens: int = 512
    quantization_bit: int | None = None
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    deepspeed_file: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """What is trained: "LoRA", "prefix tuning" or "all parameters"."""
        return "LoRA" if self.lora else "prefix tuning" if self.prefix else ALL_PARAMETERS

    @property
    def trains_all(self) -> bool:
        """Whether all parameters are trained, and not an adapter."""
        return self.method == ALL_PARAMETERS

    @property
    def checkpointing(self) -> bool | str:
        """Whether backward recomputes the layers; "auto" if the job decides by the GPU's memory."""
        value = next((self.training[key] for key in CHECKPOINTING_KEYS if self.training.get(key)), False)
        return value if value == AUTO else bool(value)

    @property
    def base_format(self) -> int | str | None:
        """What the frozen matrices are rounded to: 8 or 4 (bits, by bitsandbytes), "fp8", or None."""
        return FP8 if self.speed.fp8 else self.quantization_bit


def _section(raw: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {key} must be a block of keys, not {without_secrets(value, key)!r}")
    return dict(value)


def _data(block: dict[str, Any], source: str, notes: list[str]) -> DataConfig:
    where = f"{source}, data_config"
    check_keys(block, annotations(DataConfig), where)
    check_values(block, DataConfig, {"num_proc": Limits(at_least=1)}, where)
    if block.get("test_file"):
        notes.append(f"test_file is ignored: score it with helpers.finetune.evaluate CHECKPOINT {block['test_file']}")
    return DataConfig(**block)


def _positive_int(raw: dict[str, Any], key: str, default: int, source: str) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: {key} must be a whole number above 0, not {value!r}")
    if value >= MOST:
        raise UserError(f"{source}: {key} must be below {MOST:,}, not {value}")
    return value


def _quantization_bit(raw: dict[str, Any], source: str) -> int | None:
    value = raw.get("quantization_bit")
    if value is not None and (isinstance(value, bool) or value not in QUANTIZATION_BITS):
        raise UserError(f"{source}: quantization_bit must be 8 or 4, not {value!r}; leave it out to train in 16 bit")
    return value


def _speed(block: dict[str, Any], source: str) -> SpeedOptions:
    where = f"{source}, speed"
    types = {f.name: f.type for f in dataclasses.fields(SpeedOptions)}
    check_keys(block, types, where)
    for key, value in block.items():
        if types[key] is bool:
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
        elif value:
            _positive_int(block, key, value, where)
        else:
            block[key] = None  # false and 0 turn off, like null
    return SpeedOptions(**block)


def _smoothed(
    speed: SpeedOptions, given: dict[str, Any], training: dict[str, Any], source: str, notes: list[str]
) -> SpeedOptions:
    """Turn the chunked loss off for label smoothing, which needs the logits of all tokens."""
    if not training.get("label_smoothing_factor") or speed.loss_chunk is None:
        return speed
    if "loss_chunk" in given:
        raise UserError(
            f"{source}: label_smoothing_factor needs all logits, which loss_chunk {speed.loss_chunk} never holds; "
            "remove one of them"
        )
    notes.append("label_smoothing_factor needs all logits at once: loss_chunk is off")
    return dataclasses.replace(speed, loss_chunk=None)


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
    check_known_keys(raw, TOP_KEYS, source)
    notes: list[str] = []
    data = _section(raw, "data_config", source)
    training = _section(raw, "training_args", source)
    generation = {key: training.pop(key) for key in GENERATION_KEYS if key in training}
    generation_config = generation.get("generation_config") or {}
    if not isinstance(generation_config, dict):
        raise UserError(f"{source}: generation_config must be a block of keys, not {generation_config!r}")
    check_keys(generation_config, ["max_new_tokens"], f"{source}, generation_config")
    scored = generation.get("predict_with_generate", False)
    if not isinstance(scored, bool):
        raise UserError(f"{source}: predict_with_generate must be true or false, not {scored!r}")
    if generation.get("generation_max_length") is not None:
        notes.append("generation_max_length is ignored: give max_new_tokens under generation_config")
    if generation.get("generation_num_beams") not in (None, 1):
        notes.append("generation_num_beams is ignored: answers are generated greedily")
    adapter = _section(raw, "peft_config", source)
    if "peft_config" in raw and not adapter:
        raise UserError(
            f"{source}: peft_config is empty; add r and lora_alpha for a LoRA adapter, or remove the key to train all "
            "parameters"
        )
    max_output_length = _positive_int(raw, "max_output_length", 512, source)
    deepspeed_file = training.pop("deepspeed", None)
    if not isinstance(deepspeed_file, str | None):
        raise UserError(f"{source}, training_args: deepspeed must name a file, not {without_secrets(deepspeed_file)!r}")
    settled = training_block(training, source, notes, scored=scored)
    speed_block = _section(raw, "speed", source)
    speed = _smoothed(_speed(dict(speed_block), source), speed_block, settled, source, notes)
    lora, prefix = adapter_block(adapter, source, notes)
    return FinetuneConfig(
        data=_data(data, source, notes),
        training=settled,
        lora=lora,
        prefix=prefix,
        max_input_length=_positive_int(raw, "max_input_length", 256, source),
        max_output_length=max_output_length,
        max_eval_samples=_positive_int(raw, "max_eval_samples", 50, source),
        predict_with_generate=scored,
        max_new_tokens=_positive_int(generation_config, "max_new_tokens", max_output_length, source),
        quantization_bit=_quantization_bit(raw, source),
        speed=speed,
        deepspeed_file=deepspeed_file,
        notes=notes,
    )


def read_finetune_config(path: Path) -> FinetuneConfig:
    """Read a ``lora.yaml``.

    Args:
        path: The file.

    Returns:
        The configuration, every default filled in.

    Raises:
        UserError: The file is missing, is not YAML, or has a key twice, an unknown one, or a value of the wrong type.
    """
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}; configs/lora.yaml is one") from None
    return parse_finetune_config(raw, str(path))


def settings_for_the_start(path: Path) -> tuple[bool, float]:
    """Read what a rank needs before it meets the others.

    Args:
        path: ``lora.yaml``.

    Returns:
        Whether it names a DeepSpeed file, and for how many seconds ranks wait for each other. False and the Trainer's
        default for a file that cannot be read: the ranks say so together.
    """
    try:
        config = read_finetune_config(path)
    except UserError:
        return False, training_setting({}, "ddp_timeout")
    return config.deepspeed_file is not None, training_setting(config.training, "ddp_timeout")
