"""Check a published checkpoint before any weight is read: every tensor exists, is complete, and has the right shape.

Only headers are read, so this takes milliseconds, even for the 6B model. Otherwise a wrong tensor would show after
minutes, or never: transformers fills what is missing with random numbers and goes on.
"""

import os
import warnings
from math import prod
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError, safe_open

from helpers.chatglm3.config import PUBLISHED_VOCAB_SIZE, ChatGLM3Config
from helpers.chatglm3.tokenizer import is_published_tokenizer
from helpers.errors import UserError
from helpers.files import read_json_object

Shapes = dict[str, tuple[int, ...]]

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DOWNLOAD_AGAIN = "download it again"
# Tokenizer, configuration and file headers, at most.
OTHER_FILES_BYTES = 8 * 2**20
# Every published checkpoint has it, but it follows from the configuration, and today's code does not read it.
UNUSED_TENSOR = "transformer.rotary_pos_emb.inv_freq"


def expected_shapes(config: ChatGLM3Config) -> Shapes:
    """Return the published name and the shape of every tensor of this configuration."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    fused, attention = sum(config.qkv_rows), config.num_attention_heads * config.head_dim
    shapes: Shapes = {
        "transformer.embedding.word_embeddings.weight": (config.vocab_size, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (config.vocab_size, hidden),
    }
    for n in range(config.num_hidden_layers):
        layer = f"transformer.encoder.layers.{n}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attention.query_key_value.weight": (fused, hidden),
            f"{layer}self_attention.dense.weight": (hidden, attention),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            f"{layer}mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
        if config.attention_bias:
            shapes[f"{layer}self_attention.query_key_value.bias"] = (fused,)
    return shapes


def disk_bytes(config: ChatGLM3Config, dtype: torch.dtype) -> int:
    """Return the bytes that a checkpoint takes on disk in ``dtype``, rounded up by a few MiB."""
    elements = sum(prod(shape) for shape in expected_shapes(config).values())
    return elements * dtype.itemsize + OTHER_FILES_BYTES


def _weight_patterns(name: str, revision: str | None, token: str | bool | None) -> list[str]:
    try:
        files = list_repo_files(name, revision=revision, token=token)
    except (HTTPError, OSError):
        return ["*.safetensors", "*.bin"]  # no network: use what an earlier download left in the cache
    return ["*.safetensors"] if any(file.endswith(".safetensors") for file in files) else ["*.bin"]


def resolve_folder(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the local folder of a checkpoint, after downloading it if it is on the Hub.

    Args:
        name_or_path: A folder, or a repository on the Hub. If a repository holds the weights in two formats, only the
            safetensors are downloaded.
        revision: Branch, tag or commit of the repository.
        cache_dir: Where downloads are kept.
        token: Access token for the Hub.
        local_files_only: Whether to use earlier downloads only.

    Returns:
        The folder.

    Raises:
        UserError: It is not a local folder, and downloading it failed.
    """
    remedy = "give the folder that holds config.json, the weights and tokenizer.model"
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        return folder
    # Clearly meant as a path and not as owner/name: fail at once, without the network.
    in_a_folder = folder.parent != Path() and folder.parent.is_dir()
    if in_a_folder or folder.is_absolute() or len(folder.parts) > 2 or name.startswith((".", "~")):
        raise UserError(f"there is no folder {folder}; {remedy}")
    try:
        weights = ["*.safetensors", "*.bin"] if local_files_only else _weight_patterns(name, revision, token)
        snapshot = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "tokenizer.model", *weights],
        )
    except (HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is not a local folder, and downloading it from the Hub failed ({reason}); {remedy}"
        ) from error
    return Path(snapshot)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a checkpoint. Raises UserError if it is missing, or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{folder} holds no config.json (it holds {names}); give the folder of a ChatGLM3 checkpoint")
    return read_json_object(path, f"no file {path}", remedy=DOWNLOAD_AGAIN)


def _weight_files(folder: Path) -> list[Path]:
    # In the order in which transformers looks for them.
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            path = folder / index
            weight_map = read_json_object(path, f"no file {path}", remedy=DOWNLOAD_AGAIN).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / index} has no weight_map; download it again")
            for name in weight_map.values():
                # A path would lead to any file of this machine. The Hub's cache has links, under plain names.
                if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                    raise UserError(
                        f"{path}: weight_map names {name!r}, which is not a file of this folder; download it again"
                    )
            files = [folder / name for name in sorted(set(weight_map.values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise UserError(f"{folder} lacks {_some(absent)}, which {index} names; download it again")
            return files
    raise UserError(f"{folder} holds no weights (looked for {SAFETENSORS}, {BIN} and their .index.json)")


def _safetensors_shapes(path: Path) -> Shapes:
    # Opening reads the header only, and compares what it describes with the size of the file.
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file, or is cut off ({error}); download it again") from error


def _bin_shapes(path: Path) -> Shapes:
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # torch raises half a dozen kinds here, pickle's among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a file of tensors, or is cut off ({reason}); download it again") from error


def tensor_shapes(folder: Path) -> Shapes:
    """Return the name and shape of every tensor in a checkpoint's files, without reading the weights.

    Raises UserError if a file is missing, cut off or of another format.
    """
    shapes: Shapes = {}
    for path in _weight_files(folder):
        shapes |= _safetensors_shapes(path) if path.suffix == ".safetensors" else _bin_shapes(path)
    return shapes


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def compare_shapes(found: Shapes, expected: Shapes, where: str) -> None:
    """Raise one UserError that names all that is missing, extra or misshapen in ``found``; ``where`` is the folder."""
    found = {name: shape for name, shape in found.items() if name != UNUSED_TENSOR}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name])} but must be {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    faults = [f"missing {_some(missing)}"] if missing else []
    faults += [f"unknown {_some(extra)}"] if extra else []
    faults += [_some(misshapen)] if misshapen else []
    if faults:
        raise UserError(f"the weights in {where} do not fit its config.json: {'; '.join(faults)}")


def check_checkpoint(folder: Path) -> None:
    """Check a folder in the published layout; warn if the 6B model comes with a tokenizer that is not its own.

    Raises UserError with one line that names every kind of fault.
    """
    config = ChatGLM3Config.from_dict(read_config(folder))
    compare_shapes(tensor_shapes(folder), expected_shapes(config), str(folder))
    tokenizer = folder / "tokenizer.model"
    if config.vocab_size == PUBLISHED_VOCAB_SIZE and tokenizer.is_file() and not is_published_tokenizer(tokenizer):
        warnings.warn(
            f"{tokenizer} is not the tokenizer published with ChatGLM3-6B (its sha256 differs): "
            "ids may stand for other tokens than those that the weights were trained on",
            stacklevel=3,
        )
