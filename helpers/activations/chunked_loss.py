"""Cross-entropy of a large vocabulary without the logits of all tokens: chapter 11 derives what is here.

The logits of ChatGLM3 have 65,024 numbers for each token. A plain loss keeps them in 16 bit, in fp32, and as their
log-softmax. Here they exist for ``chunk`` tokens at a time, and are computed again in backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helpers.errors import UserError

IGNORED = -100  # the label of a token that is not trained: torch's and transformers' own


def chunked_cross_entropy(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int, places: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of ``hidden @ head_weight.T`` over the tokens whose label is not -100, a scalar in fp32.

    ``hidden`` [tokens, width] is what the output layer ``head_weight`` [vocabulary, width] reads; ``labels`` [tokens]
    says which word each of them should predict, so a causal model's labels must be shifted before. Loss and gradients
    are those of ``F.cross_entropy`` on the logits in fp32, up to the order of sums. Tokens that are not trained cost
    nothing. Where none is trained, the loss and all gradients are 0: a rank without a label can take part with the
    others, where the plain loss is 0/0.

    ``places`` [trained] says which tokens have a label that is not -100. Without it the device looks, and the host
    waits for the answer.

    Of the logits at most ``chunk`` x vocabulary exist at a time, with 4 bytes each, or 6 where the product is in 16
    bit. Where the head is trained, forward keeps 12 bytes a trained token, backward makes the logits again, one more
    product with ``head_weight``, and the head's gradient adds up over chunks in the product's type. Where it is frozen,
    as under LoRA, forward makes the gradient of ``hidden`` at once, while the logits are there, and keeps that. Under
    autocast the product is in autocast's type, as that of a linear layer. There is no second derivative.

    Raises :class:`UserError` for shapes that do not fit together and a ``chunk`` below 1.
    """
    if chunk < 1:
        raise UserError(f"chunked_cross_entropy: chunk is {chunk}; give the number of tokens to work on at a time")
    if hidden.dim() != 2 or head_weight.dim() != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise UserError(
            f"chunked_cross_entropy: hidden is {tuple(hidden.shape)} and head_weight {tuple(head_weight.shape)}; "
            "give [tokens, width] and [vocabulary, width]"
        )
    if labels.shape != hidden.shape[:1]:
        raise UserError(
            f"chunked_cross_entropy: labels is {tuple(labels.shape)} for {hidden.shape[0]} tokens; give one for each"
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    places = (labels != IGNORED).nonzero().squeeze(1) if places is None else places
    function = _ChunkedCrossEntropy if head_weight.requires_grad else _FrozenHead
    return function.apply(hidden, head_weight, labels, chunk, places)


def following(labels: Tensor) -> Tensor:
    """The label that each token of ``labels`` [rows, tokens] should predict: its successor's; -100 for a row's last."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, trained: Tensor) -> Tensor:
        normalisers = torch.empty(trained.numel(), device=hidden.device)
        loss = torch.zeros((), device=hidden.device)
        for places, part in _chunks(trained, normalisers, chunk):
            logits = _logits(hidden, weight, places)
            right = logits.gather(1, labels[places, None]).squeeze(1)
            total, largest = _exponentials(logits)
            part.copy_(total.log_() + largest)
            loss += (part - right).sum()
            del logits  # or it would be there beside the next chunk's
        ctx.save_for_backward(hidden, weight, labels, trained, normalisers)
        ctx.chunk = chunk
        return loss / max(1, trained.numel())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, trained, normalisers = ctx.saved_tensors
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        scale = gradient / max(1, trained.numel())
        for places, part in _chunks(trained, normalisers, ctx.chunk):
            # The gradient of the logits: the probabilities, less 1 at the right word; in place, for it is large.
            logits = _logits(hidden, weight, places).sub_(part[:, None]).exp_()
            logits[torch.arange(places.numel(), device=places.device), labels[places]] -= 1
            logits = logits.mul_(scale).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[places] = logits @ weight
            if weight_gradient is not None:
                weight_gradient.addmm_(logits.T, hidden[places])
            del logits
        return hidden_gradient, weight_gradient, None, None, None


class _FrozenHead(torch.autograd.Function):
    """The same without a gradient for the head: that of ``hidden`` is made in forward, and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, trained: Tensor) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for places in trained.split(chunk) if trained.numel() else ():
            wanted = labels[places, None]
            # Passed on without a name, so that they are gone when there are probabilities.
            right, probabilities = _probabilities(hidden[places] @ weight.T, wanted)
            loss -= right.sum()
            if hidden_gradient is not None:
                probabilities.scatter_(1, wanted, right.expm1_().to(weight.dtype))  # less 1 at the right word
                hidden_gradient[places] = probabilities @ weight
            del probabilities
        ctx.scale = 1 / max(1, trained.numel())
        ctx.save_for_backward(hidden_gradient)
        return loss * ctx.scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_gradient,) = ctx.saved_tensors
        return hidden_gradient * (gradient * ctx.scale), None, None, None, None


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn ``logits`` [tokens, vocabulary] into ``exp(logits - largest)``, in place; their sums, and the largest.

    torch.logsumexp would make a copy. The largest is subtracted so that exp cannot overflow.
    """
    largest = logits.amax(1, keepdim=True)
    return logits.sub_(largest).exp_().sum(1), largest.squeeze(1)


def _probabilities(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the probability of the ``wanted`` [tokens, 1] words, in fp32, and all probabilities.

    Those have the type of ``logits`` [tokens, vocabulary]: of 16 bit through one fp32 copy, made by the kernel that
    reads the logits; of 32 bit in their place.
    """
    if logits.dtype != torch.float32:
        logarithms = torch.log_softmax(logits, 1, dtype=torch.float32)
        return logarithms.gather(1, wanted), torch.exp(logarithms, out=logits)
    right = logits.gather(1, wanted)
    total, largest = _exponentials(logits)
    return right - largest[:, None] - total.log()[:, None], logits.div_(total[:, None])


def _chunks(trained: Tensor, normalisers: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(trained.split(chunk), normalisers.split(chunk), strict=True) if trained.numel() else iter(())


def _logits(hidden: Tensor, weight: Tensor, places: Tensor) -> Tensor:
    """The logits of the tokens at ``places`` in fp32, in memory of their own."""
    return (hidden[places] @ weight.T).float()
