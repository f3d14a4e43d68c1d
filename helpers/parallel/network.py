"""Build the network that every chapter parallelises: ChatGLM3, at a size that fits the machine.

Layers, attention with fewer key and value groups than heads, gated MLP and untied embedding are the 6B model's; only
the numbers are smaller. Weights and batches depend on a seed alone, so all ranks start from the same values as the
single process that they are compared with.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM

from helpers.hardware import Machine
from helpers.launch import device
from helpers.memory.predict import Configuration, ModelShape
from helpers.memory.predict.build import build_base_model
from helpers.memory.predict.planner import fits

# 8 layers make 2, 4 or 8 pipeline stages. Everything divides by 4, and 4 tensor ranks are more than key groups.
TINY = ModelShape(hidden=64, layers=8, heads=8, kv_groups=2, head_dim=16, intermediate=216, vocab=512)
# 1.5 billion parameters, for GPUs.
GLM_1_5B = ModelShape(hidden=2048, layers=24, heads=16, kv_groups=2, head_dim=128, intermediate=6848)
# Adam divides a gradient by its own size. If that is almost zero, rounding alone decides about a full step. A larger
# epsilon holds such parameters still, so that two runs differ only by their arithmetic.
EQUALITY_EPSILON = 1e-3


def shape_for(machine: Machine, world_size: int, micro_batch_size: int, sequence_length: int) -> ModelShape:
    """Choose the largest network that this machine can train in fp32 with a full copy on every rank.

    Args:
        machine: Its GPUs, and their memory.
        world_size: Ranks, which need a GPU each.
        micro_batch_size: Rows that run at once on a rank.
        sequence_length: Tokens per row.

    Returns:
        ``GLM_1_5B`` if it fits, else ``TINY``.
    """
    job = Configuration(
        GLM_1_5B, lora=None, precision="fp32", micro_batch_size=micro_batch_size, sequence_length=sequence_length
    )
    gpus = machine.gpus[:world_size]
    if len(gpus) == world_size and all(gpu.total_bytes and fits(job, gpu.total_bytes) for gpu in gpus):
        return GLM_1_5B
    return TINY


def build(
    shape: ModelShape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> GlmForCausalLM:
    """Build the network in training mode.

    Args:
        shape: Its sizes.
        device: Where its parameters are made.
        dtype: Type of its parameters.
        seed: Decides its random weights, the same on all devices of one kind.

    Returns:
        A network that maps token ids [rows, tokens] to logits [rows, tokens, vocab].
    """
    # The caller's random state stays as it was: fork_rng restores it.
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        model = build_base_model(shape, torch.float32, device)
    return model.to(dtype)  # type: ignore[arg-type]  # transformers annotates its wrapper of to() as unbound


def batch(
    shape: ModelShape, batch_size: int, sequence_length: int, step: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Make the random batch of a step, the same on every rank.

    Args:
        shape: Of the network; tokens are below its vocabulary's size.
        batch_size: Rows.
        sequence_length: Tokens per row.
        step: Decides the tokens.
        device: Where the batch goes.

    Returns:
        ``input_ids`` and ``labels``, both the same tensor [batch_size, sequence_length].
    """
    generator = torch.Generator().manual_seed(1_000_003 + step)
    ids = torch.randint(1, shape.vocab, (batch_size, sequence_length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def train_alone(shape: ModelShape, batch_size: int, sequence_length: int, steps: int) -> dict[str, Tensor]:
    """Train on whole batches in one process, without any technique: what the others are compared with.

    Every rank that calls this trains all rows on its own device, with AdamW in fp32.

    Args:
        shape: Of the network.
        batch_size: Rows of the whole batch.
        sequence_length: Tokens per row.
        steps: Optimizer steps.

    Returns:
        The trained parameters by name, on the CPU.
    """
    model = build(shape, device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EQUALITY_EPSILON)
    for step in range(steps):
        model(**batch(shape, batch_size, sequence_length, step, device())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy all parameters to the CPU, as a rank returns them for a comparison.

    Args:
        model: Any module.

    Returns:
        Parameters by name.
    """
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Find the largest absolute difference between two sets of tensors.

    Args:
        found: Tensors by name.
        expected: Tensors of the same names and shapes.

    Returns:
        The difference; NaN if any element is NaN.

    Raises:
        ValueError: Names the first tensor that only one set has, or whose shapes differ.
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
