"""A checkpoint of ChatGLM3-6B's exact shape with random weights, for measuring memory and speed without a download.

    python -m helpers.chatglm3.random_weights FOLDER

Every byte and every operation is that of the real model; its answers are noise. The tokenizer is the embedded model's,
so the ids are those of a small vocabulary.
"""

import argparse
import shutil
from pathlib import Path

import torch

from helpers.assets import TINY_MODEL
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.errors import UserError, exit_with_one_line

PARAMETERS = 6_243_584_000
BYTES = 2 * PARAMETERS
# ChatGLM3-6B: what ChatGLM3Config does not already default to.
SHAPE = {"hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32, "head_dim": 128}


def write_random_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint (float16, sharded, 11.6 GiB) to ``folder``, in the published layout.

    Made on the GPU where there is one, else in 12 GiB of host memory. Raises UserError for a folder that is not empty
    or a disk that is too small.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < BYTES * 1.02:
        raise UserError(f"{folder}: {free / 2**30:.1f} GiB free, {BYTES / 2**30:.1f} GiB needed; choose another disk")
    torch.manual_seed(seed)
    config = ChatGLM3Config(**SHAPE, dtype="float16")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = ChatGLM3ForCausalLM._from_config(config, dtype=torch.float16)
    assert model.num_parameters() == PARAMETERS
    model.save_pretrained(folder, max_shard_size="1850MB")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TINY_MODEL / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.chatglm3.random_weights", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_random_checkpoint(folder)
    print(f"{PARAMETERS:,} random parameters in {folder}")


if __name__ == "__main__":
    exit_with_one_line(main)
