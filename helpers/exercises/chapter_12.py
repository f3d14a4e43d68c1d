"""Chapter 12: 8 bits by rows, NF4's levels, blocks, quantised scales, a gradient through them, and the exercises."""

from collections.abc import Callable
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from helpers.exercises.answers import WORLDS, Function, NotYet, agree, attempt, call, exercise, without_fault
from helpers.exercises.inputs import random
from helpers.memory.peak_bytes import PeakBytes
from helpers.parallel.traffic import count_traffic

# QLoRA's table (Dettmers et al. 2023, appendix E), to four digits.
BELOW = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911]
NF4_ROUNDED = [*BELOW, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]

# --- the chapter's own functions ---


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 50


def _tensors(found: Any, names: str) -> tuple[torch.Tensor, ...]:
    """Raise unless the answer returned as many tensors as there are names."""
    expected = names.split(", ")
    if not isinstance(found, tuple | list) or len(found) != len(expected):
        raise NotYet(f"it must return {len(expected)} things: {names}")
    if not all(isinstance(tensor, torch.Tensor) for tensor in found):
        raise NotYet(f"all that it returns must be tensors: {names}")
    return tuple(found)


def _check_shape(where: str, name: str, found: torch.Tensor, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise NotYet(f"{where}, the shape of {name} is {list(found.shape)}, not {list(shape)}")


def _check_nearest(where: str, codes: torch.Tensor, scaled: torch.Tensor, table: torch.Tensor) -> None:
    """Raise unless every code is the number of a level that no other level is closer to."""
    if codes.is_floating_point() or not 0 <= int(codes.min()) <= int(codes.max()) < len(table):
        raise NotYet(f"{where}, codes must be whole numbers from 0 to {len(table) - 1}, one for each level")
    distances = (scaled.flatten()[:, None] - table).abs()
    own = distances.gather(1, codes.flatten().long()[:, None]).squeeze(1)
    if wrong := int((own > distances.amin(1) + 1e-5).sum()):
        raise NotYet(f"{where}, {wrong} of {len(own)} codes are not the nearest level's")


@exercise
def int8_rows(answer: Function) -> None:
    """Judge whole numbers of 8 bits and a scale for each row.

    Args:
        answer: Takes a matrix.
    """
    for seed, shape in enumerate(((3, 7), (1, 2), (16, 65))):
        weight, where = _normal(seed, *shape), f"for a matrix of shape {list(shape)}"
        codes, scales = _tensors(call(answer, weight.clone()), "codes, scales")
        if codes.dtype != torch.int8:
            raise NotYet(f"codes are {codes.dtype}, which is not an integer of 8 bits")
        _check_shape(where, "codes", codes, shape)
        _check_shape(where, "scales", scales, (shape[0], 1))
        ratio = scales * 127 / weight.abs().amax(1, keepdim=True)
        if not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4):
            off = ratio.flatten()[(ratio - 1).abs().argmax()]
            raise NotYet(f"{where}, a row's scale is {off:.3f} times the one that maps its largest weight to 127")
        far = (codes * scales - weight).abs() / scales
        if far.max() > 0.501:
            raise NotYet(f"{where}, a weight is {far.max():.2f} steps away from its level; the nearest is half a step")


@exercise
def nf4_codebook(answer: Function) -> None:
    """Judge NF4's sixteen levels.

    Args:
        answer: Takes the quantile of the outermost level, and has QLoRA's as default.
    """
    for outermost in (None, 0.95, 0.99):
        found = call(answer) if outermost is None else call(answer, outermost)
        where = "with the default" if outermost is None else f"with the outermost quantile {outermost}"
        if not isinstance(found, torch.Tensor) or found.shape != (16,) or found.dtype != torch.float32:
            raise NotYet(f"{where}, it does not return a tensor of 16 levels in fp32")
        levels = found.tolist()
        if levels != sorted(levels) or levels[0] != -1 or levels[-1] != 1:
            raise NotYet(f"{where}, levels should rise from -1 to 1, and go from {levels[0]:.3f} to {levels[-1]:.3f}")
        if levels[7] != 0:
            raise NotYet(f"{where}, zero is not the eighth level")
        expected = NF4_ROUNDED if outermost is None else _quantiles(outermost)
        off = [abs(mine - right) for mine, right in zip(levels, expected, strict=True)]
        if max(off) > 1e-4:
            worst = off.index(max(off))
            raise NotYet(f"{where}, level {worst} of 0 to 15 is off by {max(off):.4f}")


def _quantiles(outermost: float) -> list[float]:
    above, below = (
        [NormalDist().inv_cdf(outermost + (0.5 - outermost) * step / count) for step in range(count)]
        for count in (8, 7)
    )
    return [-level / below[0] for level in below] + [0.0] + [level / above[0] for level in reversed(above)]


@exercise
def blocks(quantise: Function, dequantise: Function) -> None:
    """Judge levels of any table with a scale for each block, and the way back.

    Args:
        quantise: Gets a matrix, the levels and the size of a block.
        dequantise: Gets codes, scales, the levels and the matrix's shape.
    """
    for seed, (shape, block, levels) in enumerate((((4, 6), 8, 5), ((2, 128), 64, 16), ((9, 3), 27, 3))):
        weight = _normal(seed, *shape)
        inner = torch.rand(levels - 2, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
        table = torch.cat([torch.tensor([-1.0]), inner.sort().values, torch.tensor([1.0])])  # at uneven distances
        where, count = f"for a matrix of shape {list(shape)} in blocks of {block}", weight.numel() // block
        codes, scales = _tensors(call(quantise, weight.clone(), table, block), "codes, scales")
        _check_shape(where, "codes", codes, (count, block))
        _check_shape(where, "scales", scales, (count,))
        in_blocks = weight.reshape(count, block)
        if not torch.allclose(scales, in_blocks.abs().amax(1)):
            raise NotYet(f"{where}, a scale is not what maps the largest of its block's weights to 1")
        _check_nearest(where, codes, in_blocks / scales[:, None], table)
        for given in (random(seed, count, block).long() % levels, codes):
            back = call(dequantise, given, scales, table, torch.Size(shape))
            _check_shape(where, "the dequantised matrix", back, shape)
            if not torch.allclose(back.reshape(count, block), table[given.long()] * scales[:, None]):
                raise NotYet(f"{where}, dequantising does not return each code's level times its block's scale")


@exercise
def double_quantisation(quantise: Function, dequantise: Function) -> None:
    """Judge the quantisation of scales in blocks of 256, and the way back.

    Args:
        quantise: Gets positive scales and a table of 256 levels.
        dequantise: Gets what the other returns, and the table.
    """
    for seed, count in enumerate((256, 1024, 768)):
        table = torch.rand(254, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        table = torch.cat([torch.tensor([-1.0]), table.sort().values, torch.tensor([1.0])])
        side = 1 if seed % 2 else -1  # whether the scale that is farthest from the mean is a large or a small one
        scales, where = 0.2 + side * _normal(seed, count).abs(), f"for {count} scales"
        codes, outer, mean = _tensors(call(quantise, scales.clone(), table), "codes, outer, mean")
        if mean.dim() or not torch.allclose(mean, scales.mean()):
            raise NotYet(f"{where}, the last thing that it returns is not the mean of all scales")
        _check_shape(where, "outer", outer, (count // 256,))
        _check_shape(where, "codes", codes, (count // 256, 256))
        centred = (scales - scales.mean()).view(-1, 256)
        if not torch.allclose(outer, centred.abs().amax(1), atol=1e-6):
            raise NotYet(f"{where}, an outer scale is not what maps its block's largest centred scale to 1 or -1")
        _check_nearest(where, codes, centred / outer[:, None], table)
        chosen = random(seed, count // 256, 256).long() % 256
        back = call(dequantise, chosen, outer, mean, table)
        _check_shape(where, "the dequantised scales", back, (count,))
        if not torch.allclose(back.view(-1, 256), table[chosen] * outer[:, None] + mean, atol=1e-6):
            raise NotYet(f"{where}, the way back does not undo what was done to the scales")


def _multiplied(answer: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> Any:
    """Run both passes: the output, the gradient of x, and the bytes kept between them, without the output."""
    leaf = x.clone().requires_grad_()
    with PeakBytes("cpu") as memory:
        given = leaf * 1  # made here, so that it counts if it is kept
        output = answer.apply(given, codes, scales, shape)
        del given
        kept = memory.now - 4 * output.numel()
    output.backward(random(9, *output.shape) / 50)
    return output.detach(), leaf.grad, kept


@exercise
def quantised_product(answer: type[torch.autograd.Function]) -> None:
    """Judge the matmul by a matrix that is stored in NF4.

    Args:
        answer: Applied to x, codes, scales and the matrix's shape.
    """
    table = torch.tensor(NF4_ROUNDED)
    for seed, (rows, shape, block) in enumerate((((3,), (5, 8), 4), ((2, 5), (64, 48), 64), ((7,), (1, 90), 30))):
        x, size = random(seed, *rows, shape[1]) / 50, torch.Size(shape)
        codes = random(seed + 5, size.numel() // block, block).long() % 16
        scales = _normal(seed, len(codes)).abs()
        dense = (table[codes] * scales[:, None]).view(size)
        expected = x.clone().requires_grad_()
        (expected @ dense.T).backward(random(9, *rows, shape[0]) / 50)
        output, gradient, kept = attempt(answer, _multiplied, answer, x, codes, scales, size)
        where = f"for x of shape {list(x.shape)} and a matrix of shape {list(shape)}"
        _check_shape(where, "the output", output, (*rows, shape[0]))
        if not torch.allclose(output, x @ dense.T, atol=1e-4):
            raise NotYet(f"{where}, the output is not x times the transposed matrix")
        assert expected.grad is not None
        if gradient is None or not torch.allclose(gradient, expected.grad, atol=1e-4):
            raise NotYet(f"{where}, the gradient of x is not the dense matrix's")
        if kept:
            raise NotYet(f"{where}, {kept} bytes are kept from forward to backward besides codes and scales")


# --- exercises ---


@exercise
def bits_per_weight(bits: float) -> None:
    """Judge the bits of a weight in NF4 with blocks of 32 and double quantisation.

    Args:
        bits: To three decimals.
    """
    off = bits - (4 + 8 / 32 + 32 / (32 * 256))
    if not abs(off) < 6e-4:
        raise NotYet(f"{bits:g} is too {'many' if off > 0 else 'few'}: how many weights share each kind of scale?")


@exercise
def saved_by_both(gib: float) -> None:
    """Judge what embedding and output layer would lose at 4.127 bits.

    Args:
        gib: Two decimals.
    """
    off = gib - 2 * 65024 * 4096 * (16 - 4.127) / 8 / 2**30
    if not abs(off) < 6e-3:
        raise NotYet(f"{gib:g} GiB are too {'many' if off > 0 else 'few'}: matrices, bits before, bits after, GiB")


@exercise
def int4_blocks(answer: Function) -> None:
    """Judge whole numbers from -7 to 7 with a scale for each 64 weights.

    Args:
        answer: Takes a matrix, and returns the dequantised one.
    """
    for seed, shape in enumerate(((3, 128), (1, 64), (4, 48))):
        weight = _normal(seed, *shape)
        scales = weight.reshape(-1, 64).abs().amax(1, keepdim=True) / 7
        expected = (weight.reshape(-1, 64) / scales).round() * scales
        found = call(answer, weight.clone())
        where = f"for a matrix of shape {list(shape)}"
        _check_shape(where, "the result", found, shape)
        found = found.to(expected.dtype)  # an answer may have computed in fp64
        if not torch.allclose(found, expected.view(shape), atol=1e-7):
            size, right = ((tensor.view_as(weight) - weight).norm() / weight.norm() for tensor in (found, expected))
            raise NotYet(
                f"{where}, the error is {size:.1%} of the weights, where such levels and blocks have {right:.1%}"
            )


def _shared(answer: Function, rows: int) -> str | None:
    """In a rank: what is wrong with a 4-bit weight after rank 0's was shared."""
    rank, n = dist.get_rank(), dist.get_world_size()
    weight, first = _four_bits(rank, rows), dict(_parts(_four_bits(0, rows)))
    before = weight.data_ptr()
    with count_traffic() as traffic:
        answer(weight)
    wrong = [name for name, tensor in _parts(weight) if not torch.equal(tensor, first[name])]
    fault = f"{wrong[0]} is not what rank 0 had" if wrong else None
    if not fault and weight.data_ptr() != before:
        fault = "the weight has other memory than before: whoever holds a view of it still has the old codes"
    if found := agree(fault):
        return found
    most = sum(tensor.nbytes for tensor in first.values()) * (n - 1) / n
    sent = f"the weights are right, but a rank sent {traffic.sent:.0f} bytes, and {most:.0f} are enough"
    return sent if traffic.sent > most + 1 else None


def _four_bits(seed: int, rows: int) -> Any:
    """Make a weight with the attributes of bitsandbytes' 4-bit one: two codes per byte, and scales of scales."""
    weight = torch.nn.Parameter((random(seed, rows * 32, 1) + 50).to(torch.uint8), requires_grad=False)
    inner = SimpleNamespace(absmax=random(seed + 20, rows), code=torch.arange(256.0))
    state = SimpleNamespace(
        absmax=(random(seed + 10, rows) + 50).to(torch.uint8), state2=inner, offset=random(seed + 30, 1)[0]
    )
    weight.quant_state = state  # type: ignore[attr-defined]  # bitsandbytes' subclass has it
    return weight


def _parts(weight: Any) -> list[tuple[str, torch.Tensor]]:
    state = weight.quant_state
    return [
        ("weight.data", weight.data),
        ("quant_state.absmax", state.absmax),
        ("quant_state.state2.absmax", state.state2.absmax),
        ("quant_state.offset", state.offset),
    ]


@exercise
def share(answer: Callable[[Any], None]) -> None:
    """Judge whether all ranks have rank 0's 4-bit weight, codes and scales.

    Args:
        answer: Takes a rank's own weight, and changes it in place.
    """
    for n, rows in zip(WORLDS, (3, 1, 8), strict=True):
        without_fault(_shared, n, answer=answer, rows=rows)
