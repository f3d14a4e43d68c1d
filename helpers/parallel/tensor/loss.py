"""Cross-entropy over a sharded vocabulary: each rank has the logits of its part of the vocabulary, and none has all."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup, ignore_index: int = -100
) -> Tensor:
    """Compute the cross-entropy of each token, in fp32 (Shoeybi et al. 2019, section 3).

    With the logits z and the target y it is log(sum_v exp(z_v - m)) - (z_y - m), where m is the largest logit. A token
    needs three numbers all-reduced: m, the sum, and z_y, which only one rank knows. Backward needs no communication.

    Args:
        logits: This rank's part of the vocabulary, in the order of ranks [tokens, vocabulary / world_size].
        targets: Token ids [tokens], equal on all ranks.
        group: The ranks that share the vocabulary.
        ignore_index: Target of tokens that do not count.

    Returns:
        The loss of each token [tokens]; 0 if its target is ``ignore_index``.
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, group, ignore_index)


def vocab_parallel_causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute the loss of predicting each next token, as transformers' ``ForCausalLMLoss`` does with all logits.

    Args:
        logits: This rank's part of the vocabulary [sequences, tokens, vocabulary / world_size].
        labels: Token ids [sequences, tokens], not shifted, equal on all ranks.
        group: The ranks that share the vocabulary.
        num_items_in_batch: Number to divide the sum by; by default the number of targets, which gives the mean.
        ignore_index: Label of tokens that do not count.

    Returns:
        The loss, a scalar, equal on all ranks.
    """
    # The logits of a token predict the token after it; the last token of a sequence has no target.
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].flatten()
    total = vocab_parallel_cross_entropy(logits.flatten(0, 1), targets, group, ignore_index).sum()
    return total / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, ignore_index: int) -> Tensor:
        logits_fp32 = logits.float()  # [tokens, vocabulary / world_size]
        max_logit = logits_fp32.amax(-1)  # [tokens]
        dist.all_reduce(max_logit, dist.ReduceOp.MAX, group=group)
        shifted = logits_fp32 - max_logit[:, None]  # so that no exponential overflows
        # The target's column, if it is in this rank's part of the vocabulary. Other tokens read column 0, unused.
        local_vocab_size = logits.shape[-1]
        column = targets - dist.get_rank(group) * local_vocab_size
        is_local = (column >= 0) & (column < local_vocab_size)
        column = torch.where(is_local, column, 0)
        target_logit = torch.where(is_local, shifted.gather(-1, column[:, None])[:, 0], 0.0)
        exponentials = shifted.exp_()  # in place: the shifted logits are not needed any more
        # Two of the three numbers travel in one message.
        sum_exp, target_logit = both = torch.stack([exponentials.sum(-1), target_logit])
        dist.all_reduce(both, group=group)
        probabilities = exponentials.div_(sum_exp[:, None])
        is_ignored = targets == ignore_index
        ctx.save_for_backward(probabilities, column, is_local, is_ignored)
        ctx.dtype = logits.dtype
        return (sum_exp.log() - target_logit).masked_fill_(is_ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # The gradient of token v is p_v - [v is the target]: this rank knows both for its part of the vocabulary.
        probabilities, column, is_local, is_ignored = ctx.saved_tensors
        logits_gradient = probabilities.clone()
        logits_gradient.scatter_add_(-1, column[:, None], -is_local[:, None].to(logits_gradient.dtype))
        logits_gradient *= gradient.masked_fill(is_ignored, 0.0)[:, None]
        return logits_gradient.to(ctx.dtype), None, None, None
