"""Measure once what this machine's libraries take of a GPU, for predictions; about ten seconds.

python -m helpers.finetune.calibrate
"""

import argparse
import dataclasses
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from helpers.errors import UserError, exit_with_one_line
from helpers.memory.nvml import open_nvml
from helpers.memory.predict.machine import MachineConstants, machine_name, store
from helpers.memory.units import MIB


def _outside_torch(gpu: int, before: int) -> int:
    """Read what this process uses of a GPU beyond torch's allocator."""
    torch.cuda.synchronize(gpu)
    return (open_nvml().used_bytes(gpu) or 0) - before - torch.cuda.memory_reserved(gpu)


def _train_a_step(gpu: int) -> int:
    """Load the kernels of a training step; return the bytes of cuBLAS's workspace."""
    device = torch.device("cuda", gpu)
    matrix = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    allocated = torch.cuda.memory_allocated(gpu)
    result = matrix @ matrix
    workspace = torch.cuda.memory_allocated(gpu) - allocated - result.nbytes
    model = nn.Sequential(
        nn.Embedding(64, 256), nn.TransformerEncoderLayer(256, 2, batch_first=True), nn.Linear(256, 64)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.ones(2, 128, dtype=torch.long, device=device)
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(ids)
    nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    return workspace


def _measure(
    rank: int, world_size: int, port: int, found: "torch.multiprocessing.SimpleQueue[MachineConstants]"
) -> None:
    """Measure on one GPU, and with all others NCCL."""
    before = open_nvml().used_bytes(rank)
    if before is None:
        raise UserError(f"NVML has no number for GPU {rank}; the calibration needs one")
    torch.cuda.set_device(rank)
    workspace = _train_a_step(rank)
    context = _outside_torch(rank, before)
    store_ = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group(
        "nccl", store=store_, rank=rank, world_size=world_size, device_id=torch.device("cuda", rank)
    )
    dist.all_reduce(torch.ones(1, device="cuda"))
    nccl = _outside_torch(rank, before) - context
    dist.destroy_process_group()
    if rank == 0:
        changed = {"nccl_one_rank" if world_size == 1 else "nccl_several_ranks": nccl}
        found.put(MachineConstants(cuda_context=context, cublas_workspace=workspace, **changed))


def calibrate(world_size: int) -> MachineConstants:
    """Measure in fresh processes, one per GPU.

    Args:
        world_size: GPUs to use; NCCL is measured among them.

    Returns:
        The constants of the first GPU; with several GPUs, one rank's communicator keeps its default, and vice versa.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_measure, (world_size, port, found), nprocs=world_size)
    return found.get()


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argparse.ArgumentParser(prog="python -m helpers.finetune.calibrate", description=__doc__).parse_args(argv)
    name = machine_name()
    if name is None:
        print("no GPU here: nothing to calibrate")
        return
    os.environ.setdefault("NCCL_DEBUG", "ERROR")
    measured = calibrate(len(open_nvml().visible()))
    for constant, size in dataclasses.asdict(measured).items():
        print(f"{constant.replace('_', ' '):20} {size / MIB:8.0f} MiB")
    print(f"written to {store(name, measured)}")


if __name__ == "__main__":
    exit_with_one_line(main)
