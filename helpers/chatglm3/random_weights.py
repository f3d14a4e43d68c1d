"""Write a checkpoint of ChatGLM3-6B's shape with random weights, to measure memory and speed without a download.

    python -m helpers.chatglm3.random_weights FOLDER

It has every byte and runs every operation of the real model; only its answers are noise. The tokenizer is that of the
embedded model, whose vocabulary is small.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from helpers.assets import TINY_MODEL
from helpers.chatglm3.checkpoint import disk_bytes
from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.errors import exit_with_one_line
from helpers.files import atomic_folder, check_disk_space, check_new_folder

PARAMETERS = 6_243_584_000
# ChatGLM3-6B, as far as it differs from ChatGLM3Config's defaults.
SHAPE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32, "head_dim": 128}


def write_random_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint (float16, sharded, 11.6 GiB) in the published layout.

    The weights are drawn on the GPU if there is one, otherwise in 12 GiB of host memory.

    Args:
        folder: A new folder; it appears when it is complete, or not at all.
        seed: Seed of the random weights.

    Raises:
        UserError: ``folder`` is not empty, or its disk is too small.
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
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.chatglm3.random_weights", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_random_checkpoint(folder)
    print(f"{PARAMETERS:,} random parameters in {folder}")


if __name__ == "__main__":
    exit_with_one_line(main)
