"""Chapter 04: conjugate communications, shards of matrices, a divided vocabulary and its loss, and the exercises."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.nn import functional

from helpers.chatglm3 import ChatGLM3Config
from helpers.errors import UserError
from helpers.exercises.answers import WORLDS, NotYet, exercise, on_ranks
from helpers.exercises.inputs import random
from helpers.exercises.passes import both_passes, check_passes
from helpers.parallel.tensor import shard_plan
from helpers.parallel.traffic import count_traffic

# --- the chapter's own functions ---


def _conjugates(copy: Any, reduce: Any, size: int) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    x, upstream = random(rank, 2, size), random(50 + rank, 2, size)
    return [both_passes(operation.apply, x, upstream) for operation in (copy, reduce)]


@exercise
def copy_and_reduce(copy: type[Function], reduce: type[Function]) -> None:
    """Judge the two communications of a tensor parallel block.

    Args:
        copy: Stands at the entrance.
        reduce: Stands at the exit.
    """
    for n, size in zip(WORLDS, (3, 1, 8), strict=True):
        xs, upstreams = ([random(seed + rank, 2, size) for rank in range(n)] for seed in (0, 50))
        all_reduced = 2 * (n - 1) / n * 4 * 2 * size
        for rank, found in enumerate(on_ranks(_conjugates, n, copy=copy, reduce=reduce, size=size)):
            where = f"on rank {rank} of {n}"
            check_passes(where, "Copy", found[0], (xs[rank], torch.stack(upstreams).sum(0)), (0, all_reduced))
            check_passes(where, "Reduce", found[1], (torch.stack(xs).sum(0), upstreams[rank]), (all_reduced, 0))


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head")


def _shards(answer: Callable[..., Any], groups: int) -> dict[str, tuple[torch.Tensor, bool]]:
    found = {}
    for name in MATRICES:
        shard = answer(random(len(name), 24, 48), name, groups)
        found[name] = shard.clone(), shard.untyped_storage().nbytes() > shard.numel() * 4
    bias = answer(random(7, 24), "k_proj", groups)
    return found | {"k_proj's bias": (bias.clone(), False)}


@exercise
def local_shard(answer: Callable[..., Any]) -> None:
    """Judge which part of each matrix of a layer a rank gets.

    Args:
        answer: Takes the full tensor, the name of its module, and the number of groups of keys and values.
    """
    for n, groups in zip(WORLDS, (4, 3, 2), strict=True):
        for rank, found in enumerate(on_ranks(_shards, n, answer=answer, groups=groups)):
            parts = min(n, groups)
            part = rank * parts // n
            rows = {name: list(range(24 // n * rank, 24 // n * (rank + 1))) for name in MATRICES}
            rows["k_proj"] = rows["v_proj"] = list(range(24 // parts * part, 24 // parts * (part + 1)))
            half = list(range(12 // n * rank, 12 // n * (rank + 1)))
            rows["gate_up_proj"] = half + [12 + row for row in half]
            for name, (shard, is_view) in found.items():
                where = f"on rank {rank} of {n}, with {groups} groups of keys and values"
                full = random(7, 24) if "bias" in name else random(len(name), 24, 48)
                cut = full.chunk(n, 1)[rank] if name in ("o_proj", "down_proj") else full[rows[name.split("'")[0]]]
                if shard.shape != cut.shape:
                    shapes = f"{list(shard.shape)}, not {list(cut.shape)}"
                    raise NotYet(f"{where}, the part of {name} {list(full.shape)} is {shapes}")
                if not torch.equal(shard, cut):
                    raise NotYet(f"{where}, the part of {name} has the right shape, but another rank's elements")
                if is_view:
                    raise NotYet(f"{where}, the part of {name} is a view: it keeps the full tensor in memory")


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _embedded(answer: Any, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    module = answer(nn.Parameter(random(0, 24, 5)), _Sum.apply)
    with count_traffic() as traffic:
        output = module(random(1, 2, length).long() % 24)
        output.backward(random(2, 2, length, 5))
    return output.detach(), module.weight.grad, len(traffic.collectives)


@exercise
def embedding(answer: type[nn.Module]) -> None:
    """Judge the embedding whose tokens are divided among the ranks.

    Args:
        answer: Takes the full weight and the function that sums over the ranks.
    """
    for n, length in zip(WORLDS, (40, 1, 17), strict=True):
        weight = random(0, 24, 5).requires_grad_()
        expected = functional.embedding(random(1, 2, length).long() % 24, weight)
        expected.backward(random(2, 2, length, 5))
        assert weight.grad is not None
        for rank, (output, gradient, calls) in enumerate(on_ranks(_embedded, n, answer=answer, length=length)):
            where = f"on rank {rank} of {n}"
            if output.shape != expected.shape or not torch.equal(output, expected.detach()):
                raise NotYet(f"{where}, the embeddings are not those of the full matrix")
            if not torch.equal(gradient, weight.grad.chunk(n)[rank]):
                raise NotYet(f"{where}, the output is right, but the gradient of its rows is not")
            if calls != 1:
                raise NotYet(f"the embedding is right, but it took {calls} collectives: leave is one")


def _lost(answer: Any, tokens: int) -> dict[str, Any]:
    rank, n = dist.get_rank(), dist.get_world_size()
    targets = random(1, tokens).long() % 24
    targets[tokens // 2] = -100
    logits = random(0, tokens, 24) * 4
    found = both_passes(lambda x: answer.apply(x, targets), logits.chunk(n, -1)[rank].clone(), random(2, tokens) / 50)
    logits.requires_grad_()
    loss = functional.cross_entropy(logits, targets, reduction="none")
    loss.backward(random(2, tokens) / 50)
    assert logits.grad is not None
    return found | {"expected": (loss.detach(), logits.grad.chunk(n, -1)[rank])}


@exercise
def cross_entropy(answer: type[Function]) -> None:
    """Judge the loss on logits whose vocabulary is divided among the ranks.

    Args:
        answer: Maps [tokens, vocabulary / ranks] and [tokens] to the loss of each token.
    """
    for n, tokens in zip(WORLDS, (9, 2, 30), strict=True):
        for rank, found in enumerate(on_ranks(_lost, n, answer=answer, tokens=tokens)):
            sent = 3 * 2 * (n - 1) / n * 4 * tokens
            check_passes(f"on rank {rank} of {n}", "CrossEntropy", found, found["expected"], (sent, 0))


def _of_tokens(gather: Any, scatter: Any, size: int) -> list[dict[str, Any]]:
    rank, n = dist.get_rank(), dist.get_world_size()
    part, whole = random(rank, 2, size, 3), random(50 + rank, 2, n * size, 3)
    return [both_passes(gather.apply, part, whole), both_passes(scatter.apply, whole, part)]


@exercise
def gather_and_scatter(gather: type[Function], scatter: type[Function]) -> None:
    """Judge the two communications of sequence parallelism; tokens are dimension 1.

    Args:
        gather: Stands at the entrance of a block.
        scatter: Stands at the exit.
    """
    for n, size in zip(WORLDS, (3, 1, 2), strict=True):
        parts = torch.cat([random(rank, 2, size, 3) for rank in range(n)], 1)
        total = torch.stack([random(50 + rank, 2, n * size, 3) for rank in range(n)]).sum(0)
        sent = (n - 1) / n * 4 * total.numel()
        for rank, found in enumerate(on_ranks(_of_tokens, n, gather=gather, scatter=scatter, size=size)):
            where, mine = f"on rank {rank} of {n}", total.chunk(n, 1)[rank]
            check_passes(where, "Gather", found[0], (parts, mine), (sent, sent))
            check_passes(where, "Scatter", found[1], (mine, parts), (sent, sent))


# --- exercises ---


@exercise
def layer_megabytes(megabytes: float) -> None:
    """Judge what one of four GPUs sends for a layer of ChatGLM3-6B, one sequence of 4,096 tokens, in bf16.

    Args:
        megabytes: Millions of bytes, forward and backward.
    """
    expected = 8 * 4096 * 4096 * 3 / 4 * 2 / 1e6
    if not abs(megabytes - expected) < 2:
        too = "much" if megabytes > expected else "little"
        raise NotYet(f"{megabytes:g} megabytes are too {too}: how many all-reduces, of how many bytes, times what?")


@exercise
def possible_ranks(answer: set[int]) -> None:
    """Judge into how many parts ChatGLM3-6B can be divided.

    Args:
        answer: All numbers of ranks.
    """
    works = set()
    for ranks in range(1, 129):
        try:
            shard_plan(ChatGLM3Config(), ranks)
            works.add(ranks)
        except UserError:
            pass
    try:
        found = set(answer)
    except TypeError:
        raise NotYet("give all numbers, as a set") from None
    if wrong := sorted(found - works):
        raise NotYet(f"into {wrong[0]} parts something does not divide")
    if found != works:
        raise NotYet(f"these work, but {len(works - found)} more numbers do")


def _gathered(answer: Any, size: int) -> dict[str, Any]:
    rank, n = dist.get_rank(), dist.get_world_size()
    return both_passes(answer.apply, random(rank, 4, size), random(50, 4, n * size))


@exercise
def gather_output(answer: type[Function]) -> None:
    """Judge the operation that gives every rank the whole output of a column parallel layer.

    Args:
        answer: An operation of autograd on [tokens, output / ranks].
    """
    for n, size in zip(WORLDS, (3, 1, 6), strict=True):
        whole = torch.cat([random(rank, 4, size) for rank in range(n)], 1)
        sent = (n - 1) / n * 4 * whole.numel()
        for rank, found in enumerate(on_ranks(_gathered, n, answer=answer, size=size)):
            expected = whole, random(50, 4, n * size).chunk(n, 1)[rank]
            check_passes(f"on rank {rank} of {n}", "GatherOutput", found, expected, (sent, 0))


class _Normed(nn.Module):
    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.input_layernorm, self.q_proj = nn.RMSNorm(sizes[0]), nn.Linear(2, 3)
        self.norm = nn.LayerNorm(sizes[1])


def _finished(answer: Callable[..., Any], sizes: tuple[int, int]) -> tuple[dict[str, bool], int, int]:
    model, expected = _Normed(sizes), {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        every = [random(31 * rank + number, *parameter.shape) for rank in range(dist.get_world_size())]
        parameter.grad = every[dist.get_rank()].clone()
        expected[name] = torch.stack(every).sum(0) if "norm" in name else every[dist.get_rank()]
    with count_traffic() as traffic:
        answer(model)
    right = {
        name: parameter.grad is not None and torch.equal(parameter.grad, expected[name])
        for name, parameter in model.named_parameters()
    }
    return right, len(traffic.collectives), traffic.sent


@exercise
def finish(answer: Callable[[nn.Module], None]) -> None:
    """Judge the sum of all norms' gradients in a single all-reduce.

    Args:
        answer: Takes a model after the last backward, and changes gradients in place.
    """
    for n, sizes in zip(WORLDS, ((4, 4), (1, 6), (8, 3)), strict=True):
        for rank, (right, calls, sent) in enumerate(on_ranks(_finished, n, answer=answer, sizes=sizes)):
            if wrong := [name for name, is_right in right.items() if not is_right]:
                raise NotYet(f"on rank {rank} of {n}, the gradient of {wrong[0]} is not right")
            if calls != 1:
                raise NotYet(f"the gradients are right, but it took {calls} collectives: one is enough")
            if sent > 2 * (n - 1) / n * 4 * (sizes[0] + 2 * sizes[1]) + 1:
                raise NotYet(f"the gradients are right, but rank {rank} sent {sent} bytes: send the norms' only")
