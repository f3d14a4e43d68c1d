"""Chapter 01: how long training takes, the bytes of a step, peaks of phases, and what its exercises ask for."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from helpers.exercises.answers import NotYet, call, exercise
from helpers.memory.predict import Configuration
from helpers.memory.predict.planner import fits
from helpers.memory.saved_tensors import SavedTensors
from helpers.parallel.network import TINY, batch, build

GPU_BYTES = 24 * 2**30
MASTERS = 1000  # elements of a test of an optimizer


# --- the chapter's own functions ---


@exercise
def training_seconds(answer: Callable[..., Any]) -> None:
    """Judge the time that training takes, with activations recomputed.

    Args:
        answer: Takes tokens, parameters, GPUs, and operations per second of each GPU.
    """
    for tokens, parameters, gpus, rate in ((300e9, 175e9, 1024, 140e12), (1e6, 3e6, 1, 1e12), (5e9, 6.2e9, 8, 400e12)):
        ratio = call(answer, tokens, parameters, gpus, rate) / (8 * tokens * parameters / gpus / rate)
        if not abs(ratio - 1) < 1e-6:
            raise NotYet(f"for {parameters:g} parameters on {gpus} GPUs, it is {ratio:.3g} times what it should be")


@exercise
def mixed_precision_step(answer: Callable[..., Any]) -> None:
    """Judge a step with 16-bit weights and gradients, and 32-bit masters.

    Args:
        answer: Takes a function that makes an optimizer; returns the ledger's bytes and the number of masters.
    """
    made: list[list[torch.Tensor]] = []

    def momentum(masters: list[torch.Tensor]) -> torch.optim.Optimizer:
        made.append(list(masters))
        return torch.optim.SGD(masters, lr=1.0, momentum=0.9)

    for optimizer, each in ((momentum, 4 + 4), (torch.optim.AdamW, 4 + 8)):
        found = call(answer, optimizer)
        if not isinstance(found, tuple) or len(found) != 2:
            raise NotYet("it must return two things: the ledger's categories, and the number of tensors")
        sizes, tensors = found
        if not made:
            raise NotYet("it never calls make_optimizer, so there is no optimizer")
        parameters = sum(master.numel() for master in made[0])
        for name, expected in (("parameters", 2), ("gradients", 2), ("optimizer states", each)):
            if not abs(sizes[name] / parameters - expected) < 0.01:
                bytes_each = f"{sizes[name] / parameters:.2f} bytes per parameter"
                raise NotYet(f"with {optimizer.__name__}, the {name} take {bytes_each}, which is not right")
        if tensors != len(made[0]):
            raise NotYet(f"it made {len(made[0])} masters, but returns {tensors}")


@exercise
def budgets(answer: Callable[..., Any]) -> None:
    """Judge the sum of each item's maximum, and the largest phase.

    Args:
        answer: Takes the bytes of each item by phase.
    """
    for phases in (
        {"forward": {"parameters": 4, "activations": 9}, "backward": {"parameters": 4, "gradients": 5}},
        {"a": {"x": 1, "y": 8, "z": 2}, "b": {"x": 7, "y": 1}, "c": {"x": 3, "y": 3, "z": 6}},
        {"only": {"x": 3}},
    ):
        counters = {phase: Counter(parts) for phase, parts in phases.items()}
        added: Counter[str] = Counter()
        for parts in counters.values():
            added |= parts
        expected = added.total(), max(parts.total() for parts in counters.values())
        found = call(answer, counters)
        if not isinstance(found, tuple) or len(found) != 2:
            raise NotYet("it must return two numbers: the sum of maxima, and the largest phase")
        for name, size, right in zip(("the sum of maxima", "the largest phase"), found, expected, strict=True):
            if size != right:
                raise NotYet(f"of {phases}, {name} is not {size}")


# --- exercises ---


@exercise
def gpus_needed(number: int) -> None:
    """Judge how many GPUs of 80 GB hold the model states of 13 billion parameters.

    Args:
        number: Of GPUs.
    """
    if number != 3:
        fewer = "fewer are enough" if number > 3 else "the states do not fit"
        raise NotYet(f"with {number}, {fewer}: bytes per parameter, times parameters, by GPU")


@exercise
def with_momentum(bytes_per_parameter: float, make_optimizer: Callable[..., Any]) -> None:
    """Judge SGD with momentum in mixed precision: the bytes of a parameter, and the optimizer.

    Args:
        bytes_per_parameter: Weight, gradient, master and the optimizer's numbers.
        make_optimizer: Gets the masters.
    """
    master = nn.Parameter(torch.ones(MASTERS))
    master.grad = torch.ones(MASTERS)
    optimizer = call(make_optimizer, [master])
    if not isinstance(optimizer, torch.optim.SGD):
        raise NotYet(f"make_optimizer returns {type(optimizer).__name__}, but SGD was asked for")
    optimizer.step()
    kept: Mapping[str, Any] = optimizer.state[master]
    numbers = sum(value.numel() for value in kept.values() if isinstance(value, torch.Tensor)) / MASTERS
    if round(numbers) != 1:
        raise NotYet(f"this optimizer keeps {numbers:g} numbers per parameter: where is the momentum?")
    if not abs(bytes_per_parameter - 12) < 0.01:
        too = "many" if bytes_per_parameter > 12 else "few"
        raise NotYet(f"the optimizer is right, but {bytes_per_parameter:g} bytes are too {too}")


@exercise
def most_sequences(search: Callable[[], Any]) -> None:
    """Judge the largest batch of LoRA with checkpointing on a GPU of 24 GiB.

    Args:
        search: Returns the number of sequences.
    """
    found = call(search)
    if not isinstance(found, int) or found < 1:
        raise NotYet(f"{found} is not a number of sequences")
    few, many = (
        bool(fits(Configuration(micro_batch_size=n, checkpointing=True), GPU_BYTES)) for n in (found, found + 1)
    )
    if not few:
        raise NotYet(f"{found} sequences do not fit")
    if many:
        raise NotYet("that fits, but one more does as well")


@exercise
def evaluate(answer: Callable[..., Any]) -> None:
    """Judge an evaluation that keeps no activations.

    Args:
        answer: Takes a network and batches of token ids, and returns the loss of each batch.
    """
    network = build(TINY)
    for count in (3, 1):
        batches = [batch(TINY, 2, 8, step)["input_ids"] for step in range(count)]
        with torch.no_grad():
            expected = [float(network(input_ids=ids, labels=ids).loss) for ids in batches]
        with SavedTensors(network) as saved:
            found = call(answer, network, batches)
        losses = [torch.as_tensor(loss).detach().item() for loss in found]
        if len(losses) != count or any(abs(a - b) > 1e-5 for a, b in zip(losses, expected, strict=True)):
            raise NotYet(f"the losses of {count} batches are no longer the same")
        if saved.total:
            raise NotYet(f"{saved.total / 2**20:.1f} MiB are still kept after {count} batches")
        if saved.peak:
            raise NotYet(f"nothing is kept in the end, but up to {saved.peak / 2**20:.1f} MiB on the way")
