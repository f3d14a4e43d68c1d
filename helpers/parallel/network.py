"""The network that every chapter parallelises: ChatGLM3, at a size that fits the machine.

Layers, attention with fewer key and value groups than heads, gated MLP and untied embedding are the 6B model's; only
the numbers are smaller. Weights and batches depend on a seed alone, so that all ranks, and the single process that they
are compared with, start from the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM

from helpers.hardware import Machine
from helpers.memory.predict import Configuration, ModelShape
from helpers.memory.predict.build import base_model
from helpers.memory.predict.planner import fits

# 8 layers, to be cut into 2, 4 or 8 stages; everything divides by 4, and 4 ranks are more than there are groups.
TINY = ModelShape(hidden=64, layers=8, heads=8, kv_groups=2, head_dim=16, intermediate=216, vocab=512)
# 1.5 billion parameters, for GPUs.
LARGE = ModelShape(hidden=2048, layers=24, heads=16, kv_groups=2, head_dim=128, intermediate=6848)
# Adam divides a gradient by its own size, so where one is almost zero, rounding alone decides about a whole step. A
# larger epsilon keeps such parameters still, and what is left between two runs is what their arithmetic does.
EQUALITY_EPSILON = 1e-3


def shape_for(machine: Machine, nprocs: int, rows: int, length: int) -> ModelShape:
    """``LARGE`` where each of ``nprocs`` ranks gets a GPU on which it can be trained whole, in fp32; else ``TINY``."""
    job = Configuration(LARGE, lora=None, precision="fp32", rows=rows, length=length)
    gpus = machine.gpus[:nprocs]
    if len(gpus) == nprocs and all(gpu.total_bytes and fits(job, gpu.total_bytes) for gpu in gpus):
        return LARGE
    return TINY


def build(
    shape: ModelShape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> GlmForCausalLM:
    """The network on ``device``, in training mode; on devices of one kind a seed gives the same weights everywhere."""
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        model = base_model(Configuration(shape, lora=None, precision="fp32"), device)
    return model.to(dtype)


def batch(
    shape: ModelShape, rows: int, length: int, step: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Random tokens [rows, length] as ``input_ids`` and ``labels``; the same for a step wherever it is asked."""
    generator = torch.Generator().manual_seed(1_000_003 + step)
    ids = torch.randint(1, shape.vocab, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters on the CPU, by name: what a rank returns to be compared."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of two sets of tensors with the same names and shapes; NaN where one has it.

    Raises ``ValueError`` naming the first that only one of them has, or whose shapes differ.
    """
    differences: list[float] = []
    for name in dict.fromkeys([*found, *expected]):
        if name not in found or name not in expected:
            raise ValueError(f"{name} is only {'expected' if name in expected else 'found'}")
        if found[name].shape != expected[name].shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
        if found[name].numel():
            differences.append((found[name] - expected[name]).abs().max().item())
    return max(differences, key=lambda value: (value != value, value), default=0.0)
