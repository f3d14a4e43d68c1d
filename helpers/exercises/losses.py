"""Judge a loss over a vocabulary that never holds the logits of all tokens."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from helpers.activations.flops import count_flops
from helpers.exercises.answers import NotYet, attempt
from helpers.exercises.inputs import random
from helpers.memory.peak_bytes import PeakBytes

WIDTH = 4  # of the hidden states: far below the vocabulary, so that logits decide about the peak
UPSTREAM = 2.5  # gradient of the loss
GRADIENT_COPIES = 5  # tensors as large as a chunk's logits: far fewer than the chunks of the largest trial


@dataclass(frozen=True)
class _Found:
    """The loss, its gradients, and per direction the operations and the most bytes; bytes kept after forward."""

    loss: torch.Tensor
    gradients: list[torch.Tensor | None]
    flops: tuple[int, ...]
    peaks: tuple[int, ...]
    kept: int


def _forward(
    answer: type[torch.autograd.Function], hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int
) -> _Found:
    with PeakBytes("cpu") as memory, count_flops() as counter:
        loss = answer.apply(hidden, head, targets, chunk)
        kept = memory.now
    return _Found(loss, [], (counter.get_total_flops(),), (memory.peak,), kept)


def _both_passes(
    answer: type[torch.autograd.Function], hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int
) -> _Found:
    there = _forward(answer, hidden, head, targets, chunk)
    with PeakBytes("cpu") as memory, count_flops() as counter:
        there.loss.backward(torch.tensor(UPSTREAM))
    flops, peaks = (*there.flops, counter.get_total_flops()), (*there.peaks, memory.peak)
    return replace(there, gradients=[hidden.grad, head.grad], flops=flops, peaks=peaks)


def compare_losses(
    answer: type[torch.autograd.Function],
    tokens: int,
    ignored: int,
    chunk: int,
    vocabulary: int,
    trained_head: bool,
    backward: bool = True,
) -> None:
    """Compare the loss and its gradients with the exact ones, operations and bytes with the least possible.

    Args:
        answer: Applied to hidden states, the head's weight, targets and the number of tokens in a chunk.
        tokens: Number of tokens.
        ignored: How many of them have the target -100.
        chunk: Tokens whose logits may exist at a time.
        vocabulary: Number of logits per token.
        trained_head: Whether the head gets a gradient; if not, backward may multiply nothing.
        backward: Whether the answer has a backward; if not, only forward is compared.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: Something differs.
    """
    hidden = (random(1, tokens, WIDTH) / 50).requires_grad_()
    head = (random(2, vocabulary, WIDTH) / 50).requires_grad_(trained_head)
    targets = random(3, tokens).long() % vocabulary
    targets[torch.randperm(tokens, generator=torch.Generator().manual_seed(4))[:ignored]] = -100
    plain = functional.cross_entropy(hidden @ head.T, targets)
    leaves = [hidden, head] if trained_head else [hidden]
    expected = torch.autograd.grad(plain, leaves, torch.tensor(UPSTREAM))
    found = attempt(answer, _both_passes if backward else _forward, answer, hidden, head, targets, chunk)
    where = f"for {tokens} tokens, {ignored} of them ignored, in chunks of {chunk}"
    loss = found.loss.detach()
    if not torch.allclose(loss, plain.detach(), atol=1e-5):
        ratio = float(loss / plain.detach())
        raise NotYet(f"{where}, the loss is {ratio:.3g} times the mean cross-entropy")
    for name, mine, right in zip(("hidden", "the head"), found.gradients, expected, strict=False):
        if mine is None or not torch.allclose(mine, right, atol=1e-5):
            raise NotYet(f"{where}, the gradient of {name} is not the one of the plain loss")
    _check_work(found, where, tokens, tokens - ignored, min(chunk, tokens - ignored), vocabulary, trained_head)


def expect_fp32(answer: type[torch.autograd.Function]) -> None:
    """Look at the loss of hidden states and a head in bf16.

    Args:
        answer: Applied to hidden states, the head's weight, targets and the number of tokens in a chunk.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: The loss is in another type, or the answer raised something.
    """
    hidden, head = ((random(seed, 5, WIDTH) / 50).bfloat16() for seed in (1, 2))
    loss = attempt(answer, answer.apply, hidden, head, torch.arange(5), 2)
    if loss.dtype != torch.float32:
        raise NotYet(f"for hidden states in bf16, the loss is in {str(loss.dtype)[6:]}, not in fp32")


def _check_work(
    found: _Found, where: str, tokens: int, counted: int, chunk: int, vocabulary: int, trained_head: bool
) -> None:
    multiplied = 2 * counted * WIDTH * vocabulary  # operations of one matmul with the head
    allowed = (1, 3) if trained_head else (2, 0)
    for direction, flops, times in zip(("forward", "backward"), found.flops, allowed, strict=False):
        if flops > times * multiplied:
            matmuls = f"{flops / multiplied:.3g} matmuls' operations"
            raise NotYet(f"{where}, {direction} has {matmuls} of all counted tokens; {times} are enough")
    logits = 4 * chunk * vocabulary
    if found.kept > 4 * tokens * (WIDTH + 6) + 256:
        raise NotYet(f"{where}, {found.kept:,} bytes are kept after forward; a few numbers per token are enough")
    small = 4 * tokens * (2 * WIDTH + 20) + 512
    head = 2 * 4 * vocabulary * WIDTH if trained_head else 0  # its gradient, and what a chunk adds to it
    # The pass that computes gradients of the logits may also hold probabilities and a copy or two.
    limits: tuple[int, ...] = (1, GRADIENT_COPIES) if trained_head else (GRADIENT_COPIES,)
    for direction, peak, most in zip(("forward", "backward"), found.peaks, limits, strict=False):
        if peak > most * logits + small + head * (direction == "backward"):
            enough = f"{most} {'is' if most == 1 else 'are'} enough"
            raise NotYet(f"{where}, {direction} holds {peak / logits:.3g} times one chunk's logits, and {enough}")
