"""Run by test_chatglm3_checkpoint.py on two ranks: read FOLDER under ZeRO-3, gather it, write it to OUT_DIR.

Each rank prints one JSON object on its own line: how many parameter elements the model has, and how many it holds.
"""

import json
import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import helpers.chatglm3  # noqa: F401
from helpers.libraries.deepspeed import skip_cpu_collectives


def main(folder: str, out_dir: str) -> None:
    skip_cpu_collectives()
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    # transformers looks for this object while it is alive.
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    held = {
        "rank": rank,
        "stage": config.config["zero_optimization"]["stage"],
        "elements": sum(p.ds_numel for p in parameters.values()),
        "held": sum(p.ds_tensor.numel() for p in parameters.values()),
        "whole": sum(p.numel() for p in parameters.values()),
    }
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        gathered = {name: p.detach().clone() for name, p in parameters.items()}
    if rank == 0:
        model.save_pretrained(out_dir, state_dict=gathered)
    sys.stdout.write(json.dumps(held) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
