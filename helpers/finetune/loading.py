"""Find the checkpoints of a run, and load models and adapters for inference."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GlmForCausalLM, PreTrainedModel

from helpers.chatglm3.checkpoint import read_config, resolve_folder
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.config.compatibility import check_quantization
from helpers.config.finetune import FP8, QUANTIZATION_BITS
from helpers.config.options import base_changing_option
from helpers.errors import UserError
from helpers.files import read_json_object
from helpers.finetune.checkpoints import MODEL_FILES, complete_checkpoints, newest_intact, numbered_checkpoints
from helpers.finetune.fp8 import obstacle_on
from helpers.quantization.library import keep_layout, quantization_config

ADAPTER_CONFIG = "adapter_config.json"
# An adapter is only right for the base that it was trained on, and PEFT's own file has no place for its bits.
QUANTIZATION_FILE = "quantization.json"

Model = PreTrainedModel | PeftModel


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the folder to load for ``path``: itself, or the newest checkpoint of a run's output folder.

    ``path`` may also be a name on the Hub. Otherwise raises UserError with the checkpoints that exist.
    """
    folder = Path(path)
    if not folder.exists():
        others = complete_checkpoints(folder.parent)
        if others and folder.name.startswith("checkpoint-"):
            names = ", ".join(other.name for other in others)
            raise UserError(f"there is no {folder.name} in {folder.parent}; there are {names}")
        return resolve_folder(path)
    if any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        return folder
    left_out: list[str] = []
    checkpoint = newest_intact(complete_checkpoints(folder), left_out, MODEL_FILES)
    if checkpoint is None:
        unfinished = numbered_checkpoints(folder)
        hint = f"; {unfinished[-1].name} was not finished, name it to use it as it is" if unfinished else ""
        hint = f"; {'; '.join(left_out)}" if left_out else hint
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG}, no config.json and no finished checkpoint-N{hint}")
    for line in left_out:
        print(line, file=sys.stderr)
    return checkpoint


def write_base_format(checkpoint: Path, base_format: int | str | None) -> None:
    """Record in ``checkpoint`` that its adapter was trained on a base in 8 or 4 bits or in fp8; None writes nothing."""
    if base_format is not None:
        content = json.dumps({"quantization_bit": base_format}) + "\n"
        (checkpoint / QUANTIZATION_FILE).write_text(content, encoding="utf-8")


def read_base_format(checkpoint: Path) -> int | str | None:
    """Return the format of the base that the adapter was trained on: 8, 4, "fp8", or None.

    Raises UserError for others.
    """
    path = checkpoint / QUANTIZATION_FILE
    if not path.is_file():
        return None
    base_format = read_json_object(path, f"no file {path}").get("quantization_bit")
    if base_format not in (*QUANTIZATION_BITS, FP8):
        raise UserError(
            f"{path}: quantization_bit is {base_format!r} and must be 8, 4 or {FP8!r}; without the file the base is "
            "16 bit"
        )
    return base_format


def read_adapter_config(checkpoint: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` in ``checkpoint``. Raises UserError that names the file if it is damaged."""
    path = checkpoint / ADAPTER_CONFIG
    return read_json_object(path, f"{checkpoint} holds no {ADAPTER_CONFIG}", remedy="copy it again from its run")


def find_base_model(checkpoint: Path, base: str | None = None) -> Path:
    """Return the folder of the model that the adapter in ``checkpoint`` was trained on.

    ``base`` is the path that the user gave. Raises UserError that names ``--model`` if the folder is not found.
    """
    name = base or read_adapter_config(checkpoint).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{checkpoint / ADAPTER_CONFIG} does not name its base model; name it with --model")
    try:
        return resolve_folder(name)
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"{checkpoint / ADAPTER_CONFIG} names {name} as its base model, which does not exist; "
            "name the folder where it is now with --model"
        ) from error


def check_comparable(path: str | os.PathLike[str]) -> Path:
    """Check that a checkpoint's base model can be compared with the tuned one, before either is loaded.

    Args:
        path: As for :func:`load_for_inference`.

    Returns:
        The checkpoint's folder: to find it in a run's folder, files are hashed, which is enough once.

    Raises:
        UserError: It holds no adapter, or one that changes the base, so that switching it off gives another model.
    """
    checkpoint = find_checkpoint(path)
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        raise UserError(f"{checkpoint} holds no adapter, so there is no base model to compare with")
    option = base_changing_option(read_adapter_config(checkpoint))
    if option is not None:
        raise UserError(
            f"the adapter in {checkpoint} changes its base model ({option}), so there is none to compare with; "
            "ask the base model's folder by itself"
        )
    return checkpoint


def find_scored(path: str | os.PathLike[str]) -> Path:
    """Find what is to be scored, and check it before it is loaded.

    Args:
        path: As for :func:`load_for_inference`.

    Returns:
        The folder of a whole model, which is scored by itself, or of an adapter (:func:`check_comparable`).

    Raises:
        UserError: There is neither, or the adapter's base cannot be compared with.
    """
    checkpoint = find_checkpoint(path)
    return check_comparable(checkpoint) if (checkpoint / ADAPTER_CONFIG).is_file() else checkpoint


def read_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """Load the tokenizer of a model folder; an exported ``GlmForCausalLM`` has it in the subfolder ``tokenizer``."""
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / "tokenizer.model").is_file():
            return ChatGLMTokenizer.from_pretrained(candidate)
    raise UserError(f"{folder} holds no tokenizer.model; copy the one that the model was published with into it")


def load_for_inference(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    base: str | None = None,
    dequantize: bool = False,
) -> tuple[Model, ChatGLMTokenizer]:
    """Load a model, or an adapter on its base, and the tokenizer.

    Args:
        path: A checkpoint, the output folder of a run (its newest checkpoint), a model folder, or a name on the Hub.
        dtype: Of the weights; "auto" is the checkpoint's own. Default: bfloat16 on a GPU that supports it, float16 on
            an older one, float32 on the CPU.
        device: Where to load. Default: the first GPU, or else the CPU.
        base: Where the base model is, if it is not where the adapter says.
        dequantize: An adapter that was trained on a base in 8 or 4 bits gets such a base again. With this option, it
            gets the matrices that those codes decode to, in ``dtype``: the same function, into which you can merge. An
            adapter that was trained on a base in fp8 then gets the original matrices: fp8 is a way to multiply faster,
            whose errors differ from row to row of the activations, so it was not trained for other matrices. It also
            gets them, with a printed line, on a GPU that cannot multiply in fp8.

    Returns:
        The model in evaluation mode (a ``PeftModel`` if ``path`` is an adapter), and its tokenizer.

    Raises:
        UserError: Something does not exist, is damaged, or does not fit together.
    """
    checkpoint = find_checkpoint(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    folder = find_base_model(checkpoint, base) if is_adapter else checkpoint
    model_type = read_config(folder).get("model_type")
    if model_type not in ("chatglm", "glm"):
        raise UserError(f"{folder / 'config.json'} has model_type {model_type!r}; this needs ChatGLM3 (chatglm or glm)")
    tokenizer = read_tokenizer(folder)
    settings: dict[str, Any] = {"dtype": dtype or _default_dtype(device)}
    if device.type != "cpu":
        settings["device_map"] = {"": device}
    base_format = read_base_format(checkpoint)
    if base_format == FP8:
        reason = obstacle_on(device)
        if reason and not dequantize:
            print(
                f"{checkpoint} was trained on a base in fp8, which does not work here: {reason}; answers use the "
                "original matrices",
                file=sys.stderr,
            )
        base_format = None if reason or dequantize else base_format
    if base_format:
        if isinstance(base_format, int):
            check_quantization(base_format, deepspeed=None)
        # bitsandbytes chooses a device by itself if it is not given one.
        settings["device_map"] = {"": str(device)}
        settings["quantization_config"] = quantization_config(base_format, settings["dtype"])
    load = AutoModelForCausalLM.from_pretrained if model_type == "chatglm" else _load_glm
    model: Model = load(folder, **settings)
    keep_layout(model)
    if base_format and dequantize:
        model = model.dequantize(settings["dtype"])
    if is_adapter:
        model = _with_adapter(model, checkpoint)
    return model.eval(), tokenizer


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _load_glm(folder: Path, **settings: Any) -> GlmForCausalLM:
    """Load as strictly as the published layout: transformers would fill what is missing with random numbers."""
    try:
        loaded: Any = GlmForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} cannot be read: {_one_line(error)}; copy them again") from error
    model, info = loaded
    faults = [f"missing {name}" for name in sorted(info["missing_keys"])]
    faults += [f"unknown {name}" for name in sorted(info["unexpected_keys"])]
    faults += [f"misshapen {name}" for name, *_ in sorted(info["mismatched_keys"])]
    if faults:
        raise UserError(f"the weights in {folder} do not fit its config.json: {', '.join(faults[:3])}; copy them again")
    return model


def _with_adapter(model: Any, checkpoint: Path) -> PeftModel:
    config = read_adapter_config(checkpoint)
    initial = str(config.get("init_lora_weights"))
    if initial.startswith("pissa_niter"):
        raise UserError(
            f"the adapter in {checkpoint} belongs to a base that {initial} changed with random numbers, which cannot "
            "be made again; convert it where it was trained: save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    targets = config.get("target_modules") or []
    if "query_key_value" in targets:
        raise UserError(
            f"the adapter in {checkpoint} trains query_key_value, which is split here; import it first: "
            "python -m helpers.chatglm3.adapter"
        )
    try:
        with warnings.catch_warnings():
            # PEFT would leave missing tensors as they were initialised: an adapter that does nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(checkpoint))
    except Exception as error:  # PEFT, safetensors and torch each raise their own
        raise UserError(f"the adapter in {checkpoint} does not fit {model.name_or_path}: {_one_line(error)}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in get_peft_model_state_dict(adapted).values()):
        raise UserError(f"the adapter in {checkpoint} holds nan or infinite numbers; use an earlier checkpoint")
    return adapted


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
