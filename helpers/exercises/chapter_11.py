"""Chapter 11: what a layer keeps, recomputation, a loss in chunks, a constant buffer, and the exercises."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from helpers.activations.checkpointing import MATMULS
from helpers.exercises.answers import WORLDS, NotYet, agree, attempt, call, exercise, on_ranks, without_fault
from helpers.exercises.inputs import random
from helpers.exercises.losses import compare_losses, expect_fp32
from helpers.exercises.recomputed import check_recomputed
from helpers.memory.peak_bytes import PeakBytes
from helpers.memory.predict import ModelShape
from helpers.parallel.network import TINY, batch, build
from helpers.parallel.traffic import count_traffic

# --- the chapter's own functions ---


def _kept(shape: ModelShape, e: int) -> int:
    h, q, k, i = shape.hidden, shape.query, shape.key_value, shape.intermediate
    return 2 * (4 * h + 4 + e * h) + 2 * e * h + 3 * e * q + 2 * e * k + 4 * shape.heads + 4 * e * i


@exercise
def layer_parts(answer: Callable[..., Any]) -> None:
    """Judge the bytes per token that a layer keeps, by what they grow with.

    Args:
        answer: Takes the shape and the bytes per element.
    """
    base = ModelShape(hidden=24, layers=3, heads=6, kv_groups=2, head_dim=4, intermediate=20, vocab=7)
    grown = {
        "the hidden size": replace(base, hidden=25),
        "the MLP's inner width": replace(base, intermediate=21),
        "the width of the keys": replace(base, kv_groups=3),
        "the width of a head": replace(base, head_dim=5),
        "the number of heads": replace(base, heads=8),
    }
    for b in (4, 2):
        sums = {}
        for name, shape in {"nothing": base, **grown}.items():
            found = call(answer, shape, b)
            if not isinstance(found, dict):
                raise NotYet("it must return a dictionary: bytes per token, by part")
            sums[name] = sum(found.values()) - _kept(shape, b)
        wrong = next((name for name in grown if sums[name] != sums["nothing"]), "nothing" if sums["nothing"] else None)
        if wrong:
            off = sums[wrong] - sums["nothing"] if wrong in grown else sums["nothing"]
            much = "much" if off > 0 else "little"
            raise NotYet(f"with {b} bytes per element, what grows with {wrong} is too {much}")


class _Stop(Exception):
    """Raised inside the learner's context."""


def _randomness(answer: Callable[..., AbstractContextManager[None]], size: int, stop: bool) -> str | None:
    noted = torch.get_rng_state(), None  # as random_state() has it without a GPU
    first, _ = torch.rand(size), torch.rand(3)
    before = torch.get_rng_state()
    try:
        with answer(noted):
            again = torch.rand(size)
            if stop:
                raise _Stop
    except _Stop:
        pass
    if not torch.equal(first, again):
        return "the block does not get the numbers that the noted state gives"
    if not torch.equal(torch.get_rng_state(), before):
        ended = "that raised" if stop else "that ended"
        return f"after a block {ended}, the generator does not go on where it was before the block"
    return None


@exercise
def same_randomness(answer: Callable[..., AbstractContextManager[None]]) -> None:
    """Judge the context in which random numbers come again.

    Args:
        answer: Takes a state of the generators.
    """
    for size, stop in ((1, False), (7, False), (4, True)):
        with torch.random.fork_rng(devices=[]):
            if fault := attempt(answer, _randomness, answer, size, stop):
                raise NotYet(fault)


@exercise
def recomputed(answer: type[torch.autograd.Function]) -> None:
    """Judge the function that keeps its input only, and runs again in backward.

    Args:
        answer: Applied to a function, x, and the function's parameters.
    """
    for shape, inner, dropout in (((3, 5), 7, 0.0), ((1, 4), 900, 0.0), ((2, 6, 8), 700, 0.5)):
        check_recomputed(answer, shape, inner, dropout)


CHUNKED = ((7, 0, 3, 40), (5, 2, 8, 33), (30, 6, 2, 600), (41, 40, 5, 50))  # tokens, ignored, of a chunk; vocabulary


@exercise
def loss_in_chunks(answer: type[torch.autograd.Function]) -> None:
    """Judge the forward of a loss that has the logits of one chunk at a time.

    Args:
        answer: Applied to hidden states, the head's weight, targets and the number of tokens in a chunk.
    """
    for tokens, ignored, chunk, vocabulary in CHUNKED:
        compare_losses(answer, tokens, ignored, chunk, vocabulary, trained_head=True, backward=False)
    expect_fp32(answer)


@exercise
def in_chunks(answer: type[torch.autograd.Function]) -> None:
    """Judge the same loss with its backward.

    Args:
        answer: As for :func:`loss_in_chunks`.
    """
    for tokens, ignored, chunk, vocabulary in CHUNKED:
        compare_losses(answer, tokens, ignored, chunk, vocabulary, trained_head=True)


def _fillings(answer: Callable[..., Any], cases: Sequence[tuple[Sequence[tuple[int, ...]], int]]) -> str | None:
    """In a rank, which can be ended: what is wrong with the pieces of gradients."""
    for shapes, size in cases:
        gradients = [random(number, *shape) for number, shape in enumerate(shapes)]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        where = f"for gradients of {[gradient.numel() for gradient in gradients]} elements and a buffer of {size}"
        full = -(-len(flat) // size)
        found = [list(pieces) for pieces in islice(answer(gradients, size), full + 1)]
        lengths = [sum(piece.numel() for piece in pieces) for pieces in found]
        if lengths != [size] * (full - 1) + [len(flat) - size * (full - 1)]:
            return f"{where}, the fillings have {lengths} elements"
        if not torch.equal(torch.cat([piece.flatten() for pieces in found for piece in pieces]), flat):
            return f"{where}, the elements do not come in the order of the gradients"
        if any(piece.dim() != 1 or not piece.numel() for pieces in found for piece in pieces):
            return f"{where}, a piece is empty, or has more than one dimension"
        for pieces in found:
            for piece in pieces:
                piece.zero_()
        if any(gradient.any() for gradient in gradients):
            return f"{where}, a piece is a copy: what is written into it does not reach the gradient"
    return None


@exercise
def fillings(answer: Callable[..., Any]) -> None:
    """Judge the pieces of gradients that fill a buffer again and again.

    Args:
        answer: Takes gradients, and the elements of the buffer.
    """
    cases = [([(5,), (2, 3), (1,)], 4), ([(3, 4)], 12), ([(2,), (7, 3), (4,), (1, 1)], 5), ([(2,), (3,)], 100)]
    if fault := on_ranks(_fillings, 1, answer=answer, cases=cases)[0]:
        raise NotYet(fault)


def _averaged(answer: Callable[..., Any], shapes: Sequence[tuple[int, ...]], size: int) -> str | None:
    rank, n = dist.get_rank(), dist.get_world_size()
    every = [[random(10 * r + number, *shape) for number, shape in enumerate(shapes)] for r in range(n)]
    gradients = [gradient.clone() for gradient in every[rank]]
    with PeakBytes("cpu") as memory, count_traffic() as traffic:
        answer(gradients, size)
    off = max(
        float((found - torch.stack(parts).mean(0)).abs().max()) for found, *parts in zip(gradients, *every, strict=True)
    )
    if found := agree(None if off < 1e-3 else f"a gradient is off by {off:.3g} from the mean over the ranks"):
        return found
    elements = sum(gradient.numel() for gradient in gradients)
    calls, needed = len(traffic.collectives), -(-elements // size)
    if calls > needed:
        return f"the means are right, but it took {calls} messages, and {needed} fillings are enough"
    if memory.peak > 4 * size + 64:
        return f"the means are right, but it made {memory.peak} bytes, and the buffer has {4 * size}"
    return None


@exercise
def average(answer: Callable[..., Any]) -> None:
    """Judge the average of gradients over ranks through a buffer of constant size.

    Args:
        answer: Takes gradients, and the elements of the buffer; changes them in place.
    """
    cases = (([(30, 7), (3,), (50,)], 60), ([(1,), (200, 2)], 100), ([(40,), (40,), (41,)], 40))
    for n, (shapes, size) in zip(WORLDS, cases, strict=True):
        without_fault(_averaged, n, answer=answer, shapes=shapes, size=size)


# --- exercises ---


@exercise
def activation_gib(plain_gib: float, checkpointed_gib: float) -> None:
    """Judge the GiB that 28 layers keep of 8 sequences of 1,024 tokens.

    Args:
        plain_gib: With all 49h bytes per token and layer.
        checkpointed_gib: With 2h.
    """
    for name, found, factor in (("plainly", plain_gib, 49), ("checkpointed", checkpointed_gib, 2)):
        off = found - 28 * 8 * 1024 * factor * 4096 / 2**30
        if not abs(off) < 0.06:
            raise NotYet(f"{name}, {found:g} GiB are too {'many' if off > 0 else 'few'}: layers, tokens, bytes, GiB")


def _decisions(answer: Callable[..., Any], shape: ModelShape, length: int) -> list[tuple[Any, int, bool]]:
    """Run a network with the policy: each operator of forward, a matmul's width, and whether the result is kept."""
    decided: list[tuple[Any, int, bool]] = []

    def policy(context: Any, operator: Any, *inputs: Any, **options: Any) -> Any:
        decision = answer(context, operator, *inputs, **options)
        if not context.is_recompute:
            keeps = decision in (True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
            # Not from ``context.op_output``, which torch 2.11 does not have.
            decided.append((operator, inputs[-1].shape[-1] if operator in MATMULS else 0, keeps))
        return decision

    model = build(shape)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    model(**batch(shape, 2, length)).loss.backward()
    return decided


@exercise
def keep_wide_matmuls(answer: Callable[..., Any]) -> None:
    """Judge a policy that keeps what matmuls make wider than the hidden size.

    Args:
        answer: A policy of selective checkpointing for networks of TINY's hidden size.
    """
    wide_queries, wide_mlp = replace(TINY, layers=1, intermediate=24), replace(TINY, layers=1, heads=2, head_dim=24)
    for shape, length in ((replace(TINY, layers=2), 16), (wide_queries, 9), (wide_mlp, 5)):
        for operator, width, keeps in attempt(answer, _decisions, answer, shape, length):
            wide = operator in MATMULS and width > shape.hidden
            if keeps and operator not in MATMULS:
                raise NotYet(f"it keeps the output of {operator}, which is not a matmul")
            if keeps != wide:
                does = "keeps" if keeps else "recomputes"
                raise NotYet(f"it {does} a matmul's output that is {width} wide; the hidden size is {shape.hidden}")


def _weighted(answer: Callable[..., Any], trained: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """In a rank: the gradient that training would use, those of the tokens of each rank, and the bytes sent."""
    rank, n = dist.get_rank(), dist.get_world_size()
    weight = random(1, 6) / 50
    tokens = [random(10 + r, count, 6) / 50 for r, count in enumerate(trained)]  # of each rank
    labels = torch.full((9 if n == 2 else 9 + rank,), -100)  # ranks may have different lengths
    labels[len(labels) - trained[rank] :] = 3
    leaf = weight.clone().requires_grad_()
    with count_traffic() as traffic:
        # A mean over this rank's tokens, whose gradient is their mean; 0 without tokens, as in the chunked loss.
        loss = answer((tokens[rank] @ leaf).tanh().sum() / max(1, trained[rank]), labels)
    loss.backward()
    assert leaf.grad is not None
    dist.all_reduce(leaf.grad)
    together = weight.clone().requires_grad_()
    (torch.cat(tokens) @ together).tanh().mean().backward()
    assert together.grad is not None
    return leaf.grad / n, [together.grad], traffic.sent


@exercise
def weighted(answer: Callable[..., Any]) -> None:
    """Judge the loss whose gradients, averaged over ranks, are those of the mean over all ranks' tokens.

    Args:
        answer: Takes the mean loss of this rank's tokens, and its labels.
    """
    for n, trained in zip(WORLDS, ((2, 7), (0, 5, 1), (4, 4, 1, 9)), strict=True):
        for found, (expected,), sent in on_ranks(_weighted, n, answer=answer, trained=trained):
            ratio = float(found @ expected / expected.square().sum())
            if not torch.allclose(found, expected, atol=1e-6):
                what = f"the averaged gradient is {ratio:.2f} times the right one, or points elsewhere"
                raise NotYet(f"with {n} ranks that train {trained} tokens, {what}")
            if sent > 8 * n:  # also enough for an all-gather of counts
                raise NotYet(f"the gradients are right, but a rank sent {sent:.0f} bytes: one number is enough")


@exercise
def frozen_head(answer: type[torch.autograd.Function]) -> None:
    """Judge the loss of a frozen head that multiplies by it twice.

    Args:
        answer: Applied to hidden states, the head's weight, targets and the number of tokens in a chunk.
    """
    for tokens, chunk, vocabulary in ((7, 3, 40), (5, 8, 33), (30, 2, 600)):
        compare_losses(answer, tokens, 0, chunk, vocabulary, trained_head=False)
