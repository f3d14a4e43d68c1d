"""The ordinary LoRA fine-tune, with FSDP2 in place of ZeRO-3: how fast can sharded frozen weights be?

    torchrun --nproc_per_node=2 tests/benchmarks/fsdp2_train.py DATA_DIR MODEL_DIR CONFIG --output-dir DIR

The arguments are those of ``python -m helpers.finetune.train``, without a DeepSpeed file. Each layer's frozen weights
are sharded over the ranks, gathered before the layer computes, and freed after it. The adapters stay whole on every
rank, and transformers averages their gradients. So does the output layer, whose weight the chunked loss reads outside
of a module's forward, where FSDP2 gathers; it is 0.5 GiB.
"""

import sys
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.finetune import train
from helpers.finetune.method import Model, base_network

apply_speed_options = train.apply_speed_options


def apply_and_shard(model: Model, speed: Any, **options: Any) -> None:
    """Apply the speed options, compiled layers among them, then shard what is frozen."""
    apply_speed_options(model, speed, **options)
    base = base_network(model)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in (*base.model.layers, base.model):  # a module shards what those inside it have left
        fully_shard(module, mesh=mesh, ignored_params=trained)
    model.is_distributed_loading_by_transformers = True  # neither DDP nor FSDP around it


if __name__ == "__main__":
    train.apply_speed_options = apply_and_shard
    train.main(sys.argv[1:])
