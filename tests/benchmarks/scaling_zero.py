"""ZeRO and FSDP2 on N ranks, against their formulas and one process: a part of ``scaling.py --part course``.

On GPUs with the 1.5 billion parameters of the chapters, on the CPU with the tiny network, which only shows that
everything is correct: N ranks that share two cores say nothing about speed.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from helpers.errors import UserError
from helpers.hardware import describe_machine
from helpers.launch import RunResult, device, run
from helpers.memory.ledger import count_bytes
from helpers.memory.predict import ModelShape
from helpers.memory.predict.states import published_states
from helpers.parallel.clock import Event
from helpers.parallel.network import (
    EQUALITY_EPSILON,
    TINY,
    batch,
    build,
    largest_difference,
    shape_for,
    train_alone,
    weights,
)
from helpers.parallel.zero import Zero1, Zero2, Zero3

LIMIT = 200.0  # seconds per launch
ROWS, SHORT, STEPS = 8, 16, 3  # of the comparison with one process
LAPS, WARM_UP = 7, 2
STATES = ("parameters", "gradients", "optimizer states")
ZERO = {"data parallel": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "FSDP2": 3}  # and the stage of the formula
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Technique:
    """A model under ZeRO or FSDP2.

    Attributes:
        model: Computes the loss.
        optimizer: Has ``step`` and ``zero_grad``, and the ledger counts it.
        gathered: Returns the complete weights; all ranks call it.
    """

    model: nn.Module
    optimizer: Any
    gathered: Callable[[], dict[str, torch.Tensor]]


def technique(name: str, model: nn.Module, adamw: Callable[..., torch.optim.Optimizer], low: bool) -> Technique:
    """Apply the technique to a model on this rank; ``low``: FSDP2 computes in bf16, from weights in fp32."""
    plain = partial(weights, model)
    if name == "FSDP2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None)
        mesh = init_device_mesh(device().type, (dist.get_world_size(),))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        return Technique(
            model, adamw(model.parameters()), lambda: {n: p.full_tensor().cpu() for n, p in model.named_parameters()}
        )
    if name == "ZeRO-3":
        zero = Zero3(model, adamw, model.model.layers)

        def gathered() -> dict[str, torch.Tensor]:
            with zero.full_parameters():
                return plain()

        return Technique(model, zero, gathered)
    if name != "data parallel":
        return Technique(model, (Zero2 if name == "ZeRO-2" else Zero1)(model, adamw), plain)
    # Without sharding a master of each weight is on every rank: ZeRO-1 among one rank only.
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    optimizer = Zero1(model, adamw, group=alone)
    return Technique(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer, plain)


def difference_to_one_process(name: str) -> float:
    """Train the tiny network in fp32; return the largest difference of a weight to one process's, on rank 0."""
    rank, n = dist.get_rank(), dist.get_world_size()
    made = technique(name, build(TINY, device()), partial(torch.optim.AdamW, lr=1e-3, eps=EQUALITY_EPSILON), low=False)
    for step in range(STEPS):
        inputs = {key: rows.chunk(n)[rank] for key, rows in batch(TINY, ROWS, SHORT, step, device()).items()}
        made.model(**inputs).loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    found = made.gathered()
    return largest_difference(found, train_alone(TINY, ROWS, SHORT, STEPS)) if rank == 0 else 0.0


def zero_on_rank(name: str, shape: ModelShape, length: int) -> dict[str, Any]:
    """Compare with one process, time steps of one row per rank in bf16, and count model states before the update."""
    difference = difference_to_one_process(name)
    dtype = torch.float32 if name == "FSDP2" else torch.bfloat16  # FSDP2's weights in fp32 are its master weights
    made = technique(name, build(shape, device(), dtype), partial(torch.optim.AdamW, lr=1e-5, fused=True), low=True)
    gc.collect()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of building the complete model
    seconds = []
    for lap in range(LAPS):
        number = lap * dist.get_world_size() + dist.get_rank()
        inputs = batch(shape, 1, length, number, device())
        dist.barrier()
        begin = Event(device())
        made.model(**inputs).loss.backward()
        held = count_bytes(made.model, made.optimizer).categories if lap == LAPS - 1 else {}
        made.optimizer.step()
        made.optimizer.zero_grad()
        seconds.append(Event(device()).since(begin))
    # The last lap has counted bytes.
    steady = seconds[WARM_UP:-1]
    peak = torch.cuda.max_memory_allocated() if device().type == "cuda" else None
    states = sum(held[category] for category in STATES)
    return {"difference": difference, "seconds": steady, "states": states, "peak_allocated": peak}


def measure_zero(name: str, ranks: int) -> dict[str, Any]:
    """Measure a technique on ``ranks`` ranks; return its entry in the results file."""
    shape, length = sizes(ranks)
    found = launch(zero_on_rank, ranks, name=name, shape=shape, length=length)
    slowest = [max(laps) for laps in zip(*(rank["seconds"] for rank in found.results), strict=True)]
    entry = {
        "ranks": ranks,
        "parameters": shape.parameters,
        "states_formula": published_states(shape.parameters, ZERO[name], ranks),
        "states_counted": [rank["states"] for rank in found.results],
        "peak_allocated": [rank["peak_allocated"] for rank in found.results],
        # Of the whole run: building the model, of which each rank has a complete one at first, included.
        "nvml": [rank.nvml for rank in found.memory.ranks],
        "step_seconds": statistics.median(slowest),
        "tokens_per_second_per_gpu": length / statistics.median(slowest),
        "tokens_per_second_per_gpu_range": [length / max(slowest), length / min(slowest)],
        "largest_difference": max(rank["difference"] for rank in found.results),
    }
    return checked(f"{name} on {ranks} ranks", entry)


def sizes(ranks: int) -> tuple[ModelShape, int]:
    """Choose the network for this machine, and the tokens per row."""
    shape = shape_for(describe_machine(), ranks, micro_batch_size=1, sequence_length=1024)
    return shape, SHORT if shape is TINY else 1024


def launch(function: Callable[..., Any], ranks: int, **arguments: Any) -> RunResult:
    """Run a function on all ranks, within the time limit of a launch."""
    return run(function, ranks, timeout=LIMIT, **arguments)


def checked(what: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return ``entry`` if its weights are those of one process.

    Raises:
        UserError: They are not.
    """
    if not entry["largest_difference"] <= TOLERANCE:  # NaN as well
        raise UserError(f"{what}: weights differ from one process by {entry['largest_difference']:.1e}; a bug")
    return entry
