"""Judge the functions that chapter 09 writes: copies, Adam on the host, a whole step, and one of N ranks.

A trial also uses other functions of the notebook, which were judged before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, Function, agree, alone, exercise, without_fault
from helpers.exercises.inputs import random
from helpers.parallel.traffic import count_traffic

SHAPES = ((3, 4), (5,), (2, 2, 3))  # of a host's parameters
DTYPES = (torch.float32, torch.bfloat16)
STEPS = 3


def host_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Make parameters of several shapes with hidden values."""
    return [torch.nn.Parameter((random(i, *shape) / 50).to(dtype)) for i, shape in enumerate(SHAPES)]


def host_gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Make their gradients in a step."""
    return [(random(100 * step + i + 7, *shape) / 50).to(dtype) for i, shape in enumerate(SHAPES)]


class Reference:
    """What each parameter should become: AdamW in fp32, with the settings of the host's own."""

    def __init__(self, host: Any, values: Sequence[torch.Tensor]) -> None:
        self.masters = [value.detach().float().clone().requires_grad_() for value in values]
        settings = {name: host.adams[0].defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        self.adams = [torch.optim.AdamW([master], **settings) for master in self.masters]

    def update(self, i: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return parameter i's new value, in fp32."""
        self.masters[i].grad = gradient.float()
        self.adams[i].step()
        return self.masters[i].detach()


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, in fp32."""
    return float((found.detach().float() - expected.float()).abs().max())


@contextmanager
def _early_copies() -> Iterator[set[int]]:
    """Collect the addresses of tensors that are filled by copies that need not be waited for."""
    early, copy = set[int](), torch.Tensor.copy_

    def noted(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            early.add(self.data_ptr())
        return copy(self, source, non_blocking)

    torch.Tensor.copy_ = noted  # type: ignore[method-assign,assignment]  # in a rank of its own
    try:
        yield early
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]


# --- one tensor: down, Adam, up ---


def _down(answer: Function, make: Function) -> str | None:
    for dtype in DTYPES:
        parameters, gradients, sent = host_parameters(dtype), host_gradients(0, dtype), 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        host = make(parameters)
        staging = list(host.staging)
        for turn, i in enumerate((1, 2, 0)):
            with _early_copies() as early:
                answer(host, i)
            sent += gradients[i].nbytes
            if host.staging[i] is not staging[i]:
                return "the gradient should be copied into host.staging[i], not replace it: only that is pinned"
            if not torch.equal(staging[i], gradients[i]):
                return f"after copy_to_host(host, {i}), host.staging[{i}] does not have that parameter's gradient"
            left = [number for number, parameter in enumerate(parameters) if parameter.grad is not None]
            if left != sorted((2, 0)[turn:]):
                return f"after copy_to_host(host, {i}), the device has the gradients of the parameters {left}"
            if host.moved != {"down": sent, "up": 0}:
                return f"{sent} bytes have gone down, but host.moved is {host.moved}"
            if staging[i].data_ptr() not in early:
                return "the right bytes arrive, but the call waits for them: copies to pinned memory can return at once"
    return None


@exercise
def copy_to_host(answer: Function, make: Function) -> None:
    """Judge the way of a gradient to the host.

    Args:
        answer: Takes a host and the number of a parameter.
        make: The class of hosts.
    """
    alone(_down, answer=answer, make=make)


def _update(update: Function, up: Function, make: Function) -> str | None:
    for dtype in DTYPES:
        parameters = host_parameters(dtype)
        host, sent = make(parameters), 0
        reference = Reference(host, parameters)
        for step in range(STEPS):
            for i, gradient in reversed(list(enumerate(host_gradients(step, dtype)))):
                host.staging[i].copy_(gradient)
                update(host, i)
                value = reference.update(i, gradient)
                when = f"of parameter {i} is off by {{:.2g}} after step {step + 1}, in {str(dtype)[6:]}"
                if not (off := off_by(host.masters[i], value)) < 1e-6:
                    return f"the master {when.format(off)}: Adam's, in fp32"
                if host.staging[i].requires_grad:
                    return f"after update(host, {i}), host.staging[{i}] belongs to the master's graph: detach it first"
                if not torch.equal(host.staging[i], host.masters[i].detach().to(dtype)):
                    return f"after update(host, {i}), host.staging[{i}] should hold the new value, in the device's type"
                with _early_copies() as early:
                    up(host, i)
                sent += host.staging[i].nbytes
                if not torch.equal(parameters[i], host.staging[i]):
                    return "after copy_to_device, the parameter does not have the value that was in its staging tensor"
                if host.moved != {"down": 0, "up": sent}:
                    return f"{sent} bytes have gone up, but host.moved is {host.moved}"
                if parameters[i].data_ptr() not in early:
                    return "the right bytes go up, but the call waits for them: copies from pinned memory need not"
    return None


@exercise
def update_and_return(update: Function, up: Function, make: Function) -> None:
    """Judge Adam on one parameter, and the way of its new value to the device.

    Args:
        update: Gets a host and the number of a parameter whose gradient is in the staging tensor.
        up: Gets the same, and copies the new value.
        make: The class of hosts.
    """
    alone(_update, update=update, up=up, make=make)


def _step(answer: Function, make: Function, **used: Function) -> str | None:
    calls: list[tuple[str, int | None]] = []

    def noting(name: str) -> Function:
        def note(*arguments: Any) -> None:
            calls.append((name, arguments[1] if arguments else None))
            if arguments:
                used[name](*arguments)

        return note

    answer.__globals__.update({name: noting(name) for name in used})
    parameters = host_parameters(torch.float32)
    host = make(parameters)
    reference = Reference(host, parameters)
    for step in range(STEPS):
        gradients = host_gradients(step, torch.float32)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        calls.clear()
        answer(host)
        for i, gradient in enumerate(gradients):
            value = reference.update(i, gradient)
            if fault := _fault_of_order(calls, i):
                return fault
            if not (off := off_by(parameters[i], value)) < 1e-6:
                return f"after step {step + 1}, parameter {i} is off by {off:.2g} from AdamW on the device"
    return None


def _fault_of_order(calls: Sequence[tuple[str, int | None]], i: int) -> str | None:
    names = ("copy_to_host", "update", "copy_to_device")
    for name in names:
        if (times := calls.count((name, i))) != 1:
            return f"{name}(host, {i}) should be called once in a step, not {times} times"
    down, update, up = (calls.index((name, i)) for name in names)
    if not down < update < up:
        return f"for parameter {i} the order should be down, update, up"
    if ("wait", None) not in calls[down:update]:
        return f"update(host, {i}) may read the gradient before its copy is complete: it does not wait"
    return None


@exercise
def step_on_host(
    answer: Function, copy_to_host: Function, update: Function, copy_to_device: Function, wait: Function, make: Function
) -> None:
    """Judge a whole optimizer step on the host.

    Args:
        answer: Takes a host whose parameters have gradients, and calls the next four.
        copy_to_host: Brings a gradient down.
        update: Updates a master.
        copy_to_device: Brings its value up.
        wait: Waits for the copies so far.
        make: The class of hosts.
    """
    used = {"copy_to_host": copy_to_host, "update": update, "copy_to_device": copy_to_device, "wait": wait}
    alone(_step, answer=answer, make=make, **used)


# --- N ranks ---


def _divided(answer: Function, divide: Function, shapes: Sequence[tuple[int, ...]]) -> str | None:
    rank, n = dist.get_rank(), dist.get_world_size()
    model = torch.nn.ParameterList([random(i, *shape) / 50 for i, shape in enumerate(shapes)])
    parameters, flat, host = divide(model)
    reference = Reference(host, [p.clone() for p in model])
    part = 4 * len(flat) // n
    for step in range(STEPS):
        every = [[random(50 * step + 9 * r + i, *shape) / 50 for i, shape in enumerate(shapes)] for r in range(n)]
        for i, parameter in enumerate(model):
            parameter.grad = every[rank][i].clone()
        with count_traffic() as traffic:
            answer(parameters, flat, host)
        fault, moved = None, part * (step + 1)
        for i, parameter in enumerate(model):
            value = reference.update(i, torch.stack([of_rank[i] for of_rank in every]).mean(0))
            if not fault and not (off := off_by(parameter, value)) < 1e-5:
                fault = f"parameter {i} is off by {off:.2g} from AdamW on one process"
        if not fault and any(parameter.grad is not None for parameter in model):
            fault = "a parameter still has its gradient"
        if not fault and host.moved != {"down": moved, "up": moved}:
            fault = f"so far its part of {moved} bytes should have crossed each way, but host.moved is {host.moved}"
        if not fault and traffic.sent > 2 * (n - 1) * part:
            fault = f"a step sent {traffic.sent:.0f} bytes, where {2 * (n - 1) * part} are enough"
        if found := agree(fault):
            return f"{found}, after step {step + 1}"
    return None


@exercise
def step_on_hosts(answer: Function, divide: Function) -> None:
    """Judge the step of ranks that keep 1/N of masters and moments each, on their host.

    Args:
        answer: Takes parameters with gradients, the flat tensor that they are views of, and the host of a rank's part.
        divide: Makes these three of a model.
    """
    for n, shapes in zip(WORLDS, (SHAPES, ((3, 4), (4,)), ((1,), (6, 3))), strict=True):
        without_fault(_divided, n, answer=answer, divide=divide, shapes=shapes)
