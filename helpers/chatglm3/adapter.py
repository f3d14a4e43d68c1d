"""Import a published LoRA adapter, which trains the fused ``query_key_value``, into the split layout.

    python -m helpers.chatglm3.adapter FUSED_DIR MODEL_DIR OUT_DIR

The update of the fused matrix is B·A, and its rows belong to q, k and v. A row of B·A needs the same row of B and all
of A. So q, k and v each get all of A and their own rows of B, and the update is exactly the same.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from helpers.chatglm3.checkpoint import read_config, resolve_folder
from helpers.chatglm3.config import ChatGLM3Config
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_folder, read_json_object

ADAPTER_CONFIG, ADAPTER_SAFETENSORS, ADAPTER_BIN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
FUSED_MODULE = "query_key_value"
SPLIT_MODULES = ("q_proj", "k_proj", "v_proj")
FUSED_KEY = re.compile(
    r"base_model\.model\.transformer\.encoder\.layers\.(\d+)\.self_attention\.query_key_value\.lora_([AB])\.weight"
)
# With other settings, an adapter is more than B·A on query_key_value.
PLAIN = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none"}


def split_fused(tensors: dict[str, torch.Tensor], config: ChatGLM3Config, rank: int) -> dict[str, torch.Tensor]:
    """Split the tensors of a fused adapter into those of q, k and v.

    Args:
        tensors: Per layer lora_A [rank, hidden] and lora_B [rows of q, k and v, rank], by published name.
        config: The model's.
        rank: The adapter's rank.

    Returns:
        Per layer and module lora_A [rank, hidden] and lora_B [rows of the module, rank], by PEFT's name.

    Raises:
        UserError: The adapter trains something else, or belongs to another model.
    """
    layers: dict[tuple[int, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = FUSED_KEY.fullmatch(name)
        if match is None:
            raise UserError(f"the adapter trains {name}; only those of {FUSED_MODULE} alone can be imported")
        layers[int(match[1]), match[2]] = tensor
    shapes = {"A": (rank, config.hidden_size), "B": (sum(config.qkv_rows), rank)}
    expected = {(n, part) for n in range(config.num_hidden_layers) for part in shapes}
    if layers.keys() != expected:
        n, part = min(layers.keys() ^ expected)
        problem = "lacks" if (n, part) in expected else "has"
        raise UserError(f"the adapter {problem} lora_{part} of layer {n}; the model has layers 0 to {max(expected)[0]}")
    split: dict[str, torch.Tensor] = {}
    for n in range(config.num_hidden_layers):
        for part, shape in shapes.items():
            if layers[n, part].shape != shape:
                found = list(layers[n, part].shape)
                raise UserError(
                    f"lora_{part} of layer {n} is {found} but must be {list(shape)}: another model's adapter"
                )
        rows = layers[n, "B"].split(config.qkv_rows)
        for module, own_rows in zip(SPLIT_MODULES, rows, strict=True):
            name = f"base_model.model.model.layers.{n}.self_attn.{module}"
            split[f"{name}.lora_A.weight"] = layers[n, "A"].clone()  # in a safetensors file, tensors share no memory
            split[f"{name}.lora_B.weight"] = own_rows.clone()
    return split


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    for name in (ADAPTER_SAFETENSORS, ADAPTER_BIN):
        path = folder / name
        if path.is_file():
            try:
                return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            except Exception as error:  # safetensors, pickle and torch each have their own
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"{path} cannot be read ({reason}); copy it again") from error
    raise UserError(f"{folder} holds neither {ADAPTER_SAFETENSORS} nor {ADAPTER_BIN}")


def _plain_lora(fused: dict[str, Any], where: Path) -> None:
    if fused.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {fused.get('peft_type')!r}; only LORA adapters can be imported")
    for key in ("r", "lora_alpha"):
        if not isinstance(fused.get(key), int):
            raise UserError(f"{where}: {key} is {fused.get(key)!r} and must be a whole number")
    targets = fused.get("target_modules")
    if targets not in (FUSED_MODULE, [FUSED_MODULE]):
        raise UserError(f"{where}: target_modules is {targets}; only adapters of {FUSED_MODULE} alone can be imported")
    for key, plain in PLAIN.items():
        if fused.get(key, plain) not in (plain, None):
            raise UserError(f"{where}: {key} is {fused[key]!r}; only plain LORA adapters can be imported")


def import_fused_adapter(fused_dir: Path, model_dir: str, out_dir: Path) -> None:
    """Rewrite a published adapter for the split layout.

    Args:
        fused_dir: Folder of the published adapter.
        model_dir: Folder or Hub name of the model that it was trained on.
        out_dir: New folder for the result.

    Raises:
        UserError: The adapter trains something else, or belongs to another model.
    """
    path = fused_dir / ADAPTER_CONFIG
    fused = read_json_object(path, f"{fused_dir} holds no {ADAPTER_CONFIG}; give the folder of a PEFT adapter")
    _plain_lora(fused, path)
    config = ChatGLM3Config.from_dict(read_config(resolve_folder(model_dir)))
    tensors = split_fused(_read_tensors(fused_dir), config, fused["r"])
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=fused["r"],
        lora_alpha=fused["lora_alpha"],
        lora_dropout=fused.get("lora_dropout", 0.0),
        use_rslora=fused.get("use_rslora", False),
        target_modules=list(SPLIT_MODULES),
        inference_mode=True,
        base_model_name_or_path=str(model_dir),
    )
    with atomic_folder(out_dir) as folder:
        lora.save_pretrained(str(folder))
        save_file(tensors, folder / ADAPTER_SAFETENSORS, metadata={"format": "pt"})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.chatglm3.adapter", description=__doc__.splitlines()[0])
    parser.add_argument("fused_dir", type=Path, help="folder of the published adapter")
    parser.add_argument("model_dir", help="the ChatGLM3 checkpoint that it was trained on")
    parser.add_argument("out_dir", type=Path, help="new folder for the imported adapter")
    arguments = parser.parse_args()
    import_fused_adapter(arguments.fused_dir, arguments.model_dir, arguments.out_dir)
    print(f"imported into {arguments.out_dir}; ask it: python -m helpers.finetune.generate {arguments.out_dir}")


if __name__ == "__main__":
    exit_with_one_line(main)
