"""Merge an adapter into its base model and write the result as a checkpoint of its own.

    python -m helpers.finetune.export CHECKPOINT OUT_DIR [--layout published|glm] [--dtype float16] [--model BASE]

``published`` is ChatGLM3's own layout, which this package and other programs for ChatGLM3 read. ``glm`` is
``GlmForCausalLM``, which transformers loads without this package. Its tokenizer is in OUT_DIR/tokenizer: transformers
alone has none with these ids, and in OUT_DIR it would load the files as a wrong one.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GlmForCausalLM

from helpers.chatglm3.checkpoint import disk_bytes, read_config
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_folder, check_disk_space, check_new_folder
from helpers.finetune.loading import ADAPTER_CONFIG, find_base_model, find_checkpoint, load_for_inference
from helpers.libraries.quiet import quiet_libraries

LAYOUTS = ("published", "glm")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_SIZE = "2GB"


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
    """Merge an adapter into its base and write the result as a model of its own.

    An adapter of a base in 8 or 4 bits is merged into the matrices that those codes stand for, because it was trained
    on them; merged into the original weights it would be another model (chapter 12 measures it). Merged weights are
    rounded to ``dtype``: in 16 bit, an answer may differ from the adapter's if two tokens were almost equally likely.

    Args:
        checkpoint: The adapter's folder, or the output folder of a run (its newest checkpoint).
        out_dir: A new folder; it appears when it is complete, or not at all.
        layout: One of ``LAYOUTS``.
        dtype: Of the merged weights; by default the base model's own.
        base: Where the base model is, if it is not where the adapter says.

    Raises:
        UserError: There is no adapter, ``out_dir`` is not free, or its disk is too small.
    """
    out_dir = Path(out_dir)
    check_new_folder(out_dir)
    folder = find_checkpoint(checkpoint)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} holds no adapter; there is nothing to merge")
    base_folder = find_base_model(folder, base)
    published = read_config(base_folder)
    if published.get("model_type") != "chatglm":
        raise UserError(f"the base model {base_folder} is not in the published layout; name one that is with --model")
    config = ChatGLM3Config.from_dict(published)
    dtype = dtype or getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    check_disk_space(out_dir, disk_bytes(config, dtype))
    model, tokenizer = load_for_inference(folder, dtype=dtype, device="cpu", base=str(base_folder), dequantize=True)
    assert isinstance(model, PeftModel)  # the folder holds an adapter
    merged = _merge(model, folder)
    with atomic_folder(out_dir) as temporary:
        if layout == "glm":
            as_glm(merged).save_pretrained(temporary, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(temporary / "tokenizer")
        else:
            merged.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(temporary)


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
    parser.add_argument("--dtype", choices=DTYPES, help="default: the base model's")
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
        print("transformers loads the model without this package. Its tokenizer needs it:")
        print(f"helpers.chatglm3.ChatGLMTokenizer.from_pretrained({str(arguments.out_dir / 'tokenizer')!r})")


if __name__ == "__main__":
    exit_with_one_line(main)
