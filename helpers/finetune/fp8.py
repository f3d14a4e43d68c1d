"""Decide whether a job can train on a base in fp8, and a device answer with one, before anything is loaded."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from helpers.config.deepspeed import zero_stage
from helpers.config.finetune import FinetuneConfig
from helpers.errors import UserError
from helpers.hardware import Machine
from helpers.memory.predict import ModelShape

# Ada has 8.9 and Hopper 9.0; all later ones multiply in fp8 as well.
CAPABILITY = (8, 9)
TORCH = (2, 8)  # the first whose row-wise scales work on Ada, Hopper and Blackwell
MULTIPLE = 16  # of both sides of a matrix, in the GPUs' kernels


def obstacle(capability: tuple[int, int], torch_version: str, cuda: str | None) -> str | None:
    """Say why a GPU cannot multiply in fp8; None if it can.

    Args:
        capability: The GPU's compute capability.
        torch_version: Of the installed torch.
        cuda: That torch was built for; None for AMD's GPUs.
    """
    if cuda is None:
        return "this torch is not built for NVIDIA's GPUs"
    if capability < CAPABILITY:
        return f"it needs compute capability 8.9, 9.0 or later, and this GPU has {capability[0]}.{capability[1]}"
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found and (int(found[1]), int(found[2])) < TORCH:
        return f"it needs torch {TORCH[0]}.{TORCH[1]} or later, and this is {torch_version}"
    return None


def obstacle_on(device: torch.device) -> str | None:
    """Say why a model cannot be loaded in fp8 on ``device``; None if it can. A CPU emulates it."""
    if device.type != "cuda":
        return None
    return obstacle(torch.cuda.get_device_capability(device), torch.__version__, torch.version.cuda)


def check_fp8(
    config: FinetuneConfig,
    deepspeed: Mapping[str, Any] | None,
    machine: Machine,
    shape: ModelShape,
    *,
    torch_cuda: str | None = torch.version.cuda,
) -> list[str]:
    """Check that the job can train on a base in fp8; without ``speed: fp8`` there is nothing to check.

    Args:
        config: Contents of ``lora.yaml``.
        deepspeed: Contents of the DeepSpeed file; None without one.
        machine: This machine.
        shape: The base model's sizes.
        torch_cuda: The CUDA version that torch was built for.

    Returns:
        Lines to print.

    Raises:
        UserError: The job contradicts itself, or its GPUs cannot multiply in fp8.
    """
    if not config.speed.fp8:
        return []
    _check_contradictions(config, deepspeed, shape)
    if config.training.get("use_cpu") or not machine.gpus:
        return ["fp8 is emulated on the CPU: the same rounding, to try things out, and slower than without it"]
    for gpu in machine.gpus:
        reason = obstacle(gpu.capability, machine.versions["torch"], torch_cuda)
        if reason:
            raise UserError(
                f"speed: fp8 does not work on {gpu.name}: {reason}; remove fp8, or train with quantization_bit: 8"
            )
    if config.speed.compile_layers:
        return []
    return ["fp8 without compile_layers rounds in passes of its own, which takes longer than fp8 saves: set it to true"]


def _check_contradictions(config: FinetuneConfig, deepspeed: Mapping[str, Any] | None, shape: ModelShape) -> None:
    if config.trains_all:
        raise UserError(
            "speed: fp8 rounds weights that stay frozen, but without peft_config all are trained; remove it"
        )
    if config.quantization_bit:
        raise UserError(
            f"speed: fp8 and quantization_bit {config.quantization_bit} both say how the frozen matrices are kept; "
            "remove one of them"
        )
    if zero_stage(deepspeed) == 3:
        raise UserError(
            "speed: fp8 does not go with ZeRO-3, which would cut codes from their scales: use configs/ds_zero_2.json, "
            "or no DeepSpeed file"
        )
    for name, (rows, columns) in shape.linears.items():
        if rows % MULTIPLE or columns % MULTIPLE:
            raise UserError(
                f"speed: fp8 needs matrices whose sides are multiples of {MULTIPLE}, and {name} is {rows} x {columns}; "
                "remove fp8"
            )
