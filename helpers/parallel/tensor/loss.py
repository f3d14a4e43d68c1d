"""Cross-entropy where each rank has the logits of its part of the vocabulary; no rank ever holds all of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


def vocabulary_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup, ignore_index: int = -100
) -> Tensor:
    """The loss of each token [tokens], in fp32; 0 where its target is ``ignore_index``.

    ``logits`` [tokens, vocabulary / ranks] is this rank's part, in order of ranks; ``targets`` [tokens] is the same on
    all. A token costs three numbers to be all-reduced: its largest logit, the sum of exponentials, and the target's
    logit, which one rank knows. Backward needs no communication (Shoeybi et al. 2019, section 3).
    """
    return _CrossEntropy.apply(logits, targets, group, ignore_index)


def causal_loss(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """What transformers' ``ForCausalLMLoss`` computes, of ``logits`` [rows, tokens, vocabulary / ranks].

    A token predicts the next one. The mean over all targets, or their sum divided by ``num_items_in_batch``.
    """
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].flatten()
    total = vocabulary_parallel_cross_entropy(logits.flatten(0, 1), targets, group, ignore_index).sum()
    return total / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, ignore_index: int) -> Tensor:
        logits_fp32 = logits.float()
        largest = logits_fp32.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted = logits_fp32 - largest[:, None]  # so that no exponential overflows
        part = logits.shape[-1]
        place = targets - dist.get_rank(group) * part
        here = (place >= 0) & (place < part)
        place = torch.where(here, place, 0)
        of_target = torch.where(here, shifted.gather(-1, place[:, None])[:, 0], 0.0)
        exponentials = shifted.exp_()
        # Two of the three numbers in one message.
        total, of_target = both = torch.stack([exponentials.sum(-1), of_target])
        dist.all_reduce(both, group=group)
        probabilities = exponentials.div_(total[:, None])
        ignored = targets == ignore_index
        ctx.save_for_backward(probabilities, place, here, ignored)
        ctx.dtype = logits.dtype
        return (total.log() - of_target).masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, place, here, ignored = ctx.saved_tensors
        grad = probabilities.clone()
        grad.scatter_add_(-1, place[:, None], -here[:, None].to(grad.dtype))
        grad *= gradient.masked_fill(ignored, 0.0)[:, None]
        return grad.to(ctx.dtype), None, None, None
