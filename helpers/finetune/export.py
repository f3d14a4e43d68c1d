"""Merge an adapter into its base model, or take a whole model, and write it as a checkpoint of its own.

    python -m helpers.finetune.export CHECKPOINT OUT_DIR [--layout published|glm] [--dtype float16] [--model BASE]

``published`` is ChatGLM3's own layout, which this package, the original code and other programs for ChatGLM3 read.
``glm`` is ``GlmForCausalLM``, which transformers, vLLM and SGLang load without this package. Both have the tokenizer
twice: as published, and as the ``tokenizer.json`` of transformers, with a chat template.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GlmForCausalLM

from helpers.chatglm3.checkpoint import disk_bytes, read_config
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.chatglm3.tokenizer_json import write_tokenizer_json
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_folder, check_disk_space, check_new_folder, read_json_object
from helpers.finetune.generation_files import GENERATION_CONFIG, read_generation_config
from helpers.finetune.loading import (
    ADAPTER_CONFIG,
    find_base_model,
    find_checkpoint,
    load_for_inference,
    read_adapter_config,
)
from helpers.finetune.whole_model import write_weights
from helpers.libraries.quiet import quiet_libraries

LAYOUTS = ("published", "glm")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def as_glm(model: ChatGLM3ForCausalLM) -> GlmForCausalLM:
    """Return the same network, sharing its tensors, as the class that transformers has without this package."""
    with torch.device("meta"):
        glm = GlmForCausalLM(model.config.to_glm())
    glm.load_state_dict(model.state_dict(), assign=True)
    glm.generation_config = model.generation_config
    return glm


def export(
    checkpoint: str | Path,
    out_dir: str | Path,
    layout: str = "published",
    dtype: torch.dtype | None = None,
    base: str | None = None,
) -> None:
    """Merge an adapter into its base and write the result as a model of its own; a whole model needs no merging.

    An adapter of a base in 8 or 4 bits is merged into the matrices that those codes decode to, because it was trained
    on them. Merged into the original weights it would be another model (chapter 12 measures it). An adapter of a base
    in fp8 is merged into the original weights. Merged weights are rounded to ``dtype``: in 16 bit, an answer may differ
    from the adapter's if two tokens were almost equally likely.

    Args:
        checkpoint: The folder of an adapter or of a whole model, or the output folder of a run (its newest checkpoint).
        out_dir: A new folder; it appears when it is complete, or not at all.
        layout: One of ``LAYOUTS``.
        dtype: Of the merged weights; by default the base model's own, or the whole model's.
        base: Where the base model is, if it is not where the adapter says.

    Raises:
        UserError: There is nothing that can be merged, ``out_dir`` is not free, its disk is too small, or a file is
            damaged.
    """
    out_dir = Path(out_dir)
    check_new_folder(out_dir)
    folder = find_checkpoint(checkpoint)
    base_folder = _base_folder(folder, base)
    published = read_config(base_folder)
    if published.get("model_type") != "chatglm":
        raise UserError(f"the base model {base_folder} is not in the published layout; name one that is with --model")
    config = ChatGLM3Config.from_dict(published)
    dtype = dtype or getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    generation_config, dropped = read_generation_config(base_folder)
    check_disk_space(out_dir, disk_bytes(config, dtype))
    if base_folder == folder:
        model, tokenizer = load_for_inference(folder, dtype=dtype, device="cpu")
    else:
        model, tokenizer = load_for_inference(folder, dtype=dtype, device="cpu", base=str(base_folder), dequantize=True)
    merged = _merge(model, folder) if isinstance(model, PeftModel) else model
    assert isinstance(merged, ChatGLM3ForCausalLM)  # the published layout has this class
    if generation_config:
        generation_config.eos_token_id = merged.config.eos_token_id  # the file may name </s> only
        merged.generation_config = generation_config
    with atomic_folder(out_dir) as temporary:
        written = as_glm(merged) if layout == "glm" else merged
        write_weights(written, temporary)
        if layout == "glm":
            _name_for_version_4(temporary / "config.json")
        tokenizer.save_vocabulary(str(temporary))
        # transformers has no class of the published name: version 5 takes tokenizer.json then, earlier ones stop.
        tokenizer_class = "PreTrainedTokenizerFast" if layout == "glm" else type(tokenizer).__name__
        write_tokenizer_json(tokenizer, temporary, tokenizer_class)
    if dropped:
        print(f"{GENERATION_CONFIG} of the base does not sample (do_sample), so these are left out: {dropped}")


def _name_for_version_4(config_file: Path) -> None:
    """Add to a Glm ``config.json`` the names of transformers 4, which servers still use: it ignores the new ones."""
    config = read_json_object(config_file, f"no file {config_file}")
    rope = config["rope_parameters"]
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")} | {"torch_dtype": config["dtype"]}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _base_folder(checkpoint: Path, base: str | None) -> Path:
    """Return the folder of the weights that are written: an adapter's base, or the whole model itself."""
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        if base:
            raise UserError(f"{checkpoint} is a whole model and not an adapter of {base}; remove --model")
        return checkpoint
    if read_adapter_config(checkpoint).get("peft_type") == "PREFIX_TUNING":
        raise UserError(
            f"{checkpoint} holds a prefix, which belongs to no weight and cannot be merged; use it as it is, with "
            "helpers.finetune.generate"
        )
    return find_base_model(checkpoint, base)


def _merge(model: PeftModel, checkpoint: Path) -> ChatGLM3ForCausalLM:
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # what safe_merge raises for nan and inf
        raise UserError(f"the adapter in {checkpoint} cannot be merged: {error}") from error


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.finetune.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="OUTPUT/checkpoint-N, or OUTPUT (its newest checkpoint)")
    parser.add_argument("out_dir", type=Path, help="new folder")
    parser.add_argument("--layout", choices=LAYOUTS, default="published")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the base's, or the whole model's")
    parser.add_argument("--model", metavar="BASE", help="the base model, if it is not where the adapter says")
    arguments = parser.parse_args()
    quiet_libraries()
    export(
        arguments.checkpoint,
        arguments.out_dir,
        arguments.layout,
        DTYPES.get(arguments.dtype),
        arguments.model,
    )
    print(f"written to {arguments.out_dir}; ask it: python -m helpers.finetune.generate {arguments.out_dir}")
    if arguments.layout == "glm":
        print(f"serve it without this package: vllm serve {arguments.out_dir}")


if __name__ == "__main__":
    exit_with_one_line(main)
