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
from helpers.chatglm3.checkpoint import disk_bytes
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.errors import exit_with_one_line
from helpers.files import atomic_folder, check_disk_space, check_new_folder

PARAMETERS = 6_243_584_000
# ChatGLM3-6B: what ChatGLM3Config does not already default to.
SHAPE = {"hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32, "head_dim": 128}


def write_random_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint (float16, sharded, 11.6 GiB) to ``folder``, in the published layout.

    Made on the GPU where there is one, else in 12 GiB of host memory. ``folder`` appears whole or not at all. Raises
    UserError for a folder that is not empty or a disk that is too small.
    """
    check_new_folder(folder)
    config = ChatGLM3Config(**SHAPE, dtype="float16")
    check_disk_space(folder, disk_bytes(config, torch.float16))
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = ChatGLM3ForCausalLM._from_config(config, dtype=torch.float16)
    assert model.num_parameters() == PARAMETERS
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size="1850MB")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(TINY_MODEL / name, temporary / name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.chatglm3.random_weights", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_random_checkpoint(folder)
    print(f"{PARAMETERS:,} random parameters in {folder}")


if __name__ == "__main__":
    exit_with_one_line(main)
