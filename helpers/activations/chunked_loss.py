"""Cross-entropy over a large vocabulary without the logits of all tokens. Chapter 11 derives it.

ChatGLM3's logits are 65,024 numbers per token. An ordinary loss stores them three times: in 16 bit, in fp32, and as
their log-softmax. Here they exist for ``chunk`` tokens at a time.

torch 2.13 has a loss of this kind as well: ``torch.nn.functional.linear_cross_entropy(..., options=
LinearCrossEntropyOptions(...))``. In fp32 both agree. We keep ours for two reasons. With bf16 inputs, theirs returns
the loss in bf16, which can be off in the second digit; ours is always fp32. And theirs computes the logits of ignored
tokens too, unless you select the others first.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from helpers.errors import UserError

IGNORE_INDEX = -100  # label of a token that does not count; the default of torch and transformers


def chunked_cross_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int, target_positions: Tensor | None = None
) -> Tensor:
    """Compute the mean cross-entropy of ``hidden @ head_weight.T`` without ever holding all logits.

    Loss and gradients are those of ``F.cross_entropy`` on fp32 logits, up to the order of additions. Ignored tokens
    cost no computation. If every token is ignored, the loss and all gradients are 0, so a rank without targets can
    still take part in collectives; the ordinary loss would be 0/0.

    At most ``chunk`` x vocabulary logits exist at a time, at 4 bytes each (6 if the matrix multiplication is in 16
    bit). Second derivatives are not supported.

    * Trainable head: forward keeps 12 bytes per target; backward recomputes the logits (one more matrix multiplication)
      and accumulates the head's gradient over chunks in the dtype of the matrix multiplication.
    * Frozen head, as under LoRA: forward computes the gradient of ``hidden`` while the logits exist, and keeps that.

    Args:
        hidden: Input of the output layer, [tokens, width].
        head_weight: Weight of the output layer, [vocabulary, width].
        targets: Token id that each position should predict, [tokens] int64, or ``IGNORE_INDEX``. A causal model's
            labels must be shifted by one before.
        chunk: Number of tokens whose logits exist at a time.
        target_positions: Positions whose target is not ``IGNORE_INDEX``, [targets] int64. Without it, the device
            searches for them and the host has to wait for the answer.

    Returns:
        The mean loss over all targets, an fp32 scalar. Under autocast the matrix multiplication runs in autocast's
        dtype, as for a linear layer.

    Raises:
        UserError: If the shapes do not fit together or ``chunk`` is below 1.
    """
    if chunk < 1:
        raise UserError(f"chunked_cross_entropy: chunk is {chunk}; give the number of tokens to work on at a time")
    if hidden.dim() != 2 or head_weight.dim() != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise UserError(
            f"chunked_cross_entropy: hidden is {tuple(hidden.shape)} and head_weight {tuple(head_weight.shape)}; "
            "give [tokens, width] and [vocabulary, width]"
        )
    if targets.shape != hidden.shape[:1]:
        raise UserError(
            f"chunked_cross_entropy: targets is {tuple(targets.shape)} for {hidden.shape[0]} tokens; give one for each"
        )
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    if target_positions is None:
        target_positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    function = _ChunkedCrossEntropy if head_weight.requires_grad else _FrozenHead
    return function.apply(hidden, head_weight, targets, chunk, target_positions)


def call_through(layer: nn.Module, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Compute ``function(*args)`` inside a call of ``layer``.

    ZeRO-3 gathers a layer's weights in hooks that run when the layer is called; the loss reads the weight of the
    output layer without calling it.

    Args:
        layer: The layer whose weights ``function`` reads.
        function: What to compute.
        args: Its arguments.

    Returns:
        What ``function`` returned.
    """
    replaced = vars(layer).get("forward")  # None unless somebody else has replaced it before
    setattr(layer, "forward", function)  # noqa: B010 (mypy: a method cannot be assigned to)
    try:
        return layer(*args)
    finally:
        del layer.forward
        if replaced is not None:
            setattr(layer, "forward", replaced)  # noqa: B010


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss with a trainable head: backward recomputes each chunk's logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, positions: Tensor) -> Tensor:
        log_sum_exp = torch.empty(positions.numel(), device=hidden.device)  # [targets] fp32
        loss = torch.zeros((), device=hidden.device)
        for chunk_positions, chunk_log_sum_exp in _chunks(positions, log_sum_exp, chunk):
            logits = _logits(hidden, weight, chunk_positions)  # [chunk, vocabulary] fp32
            target_logit = logits.gather(1, targets[chunk_positions, None]).squeeze(1)  # [chunk]
            sums, largest = _exponentials(logits)
            chunk_log_sum_exp.copy_(sums.log_() + largest)  # a view: fills log_sum_exp
            loss += (chunk_log_sum_exp - target_logit).sum()  # -log softmax, at the target
            del logits  # otherwise it would still exist while the next chunk's is computed
        ctx.save_for_backward(hidden, weight, targets, positions, log_sum_exp)
        ctx.chunk = chunk
        return loss / max(1, positions.numel())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, positions, log_sum_exp = ctx.saved_tensors
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        scale = gradient / max(1, positions.numel())
        for chunk_positions, chunk_log_sum_exp in _chunks(positions, log_sum_exp, ctx.chunk):
            # Gradient of the logits: the probabilities, minus 1 at the target. In place, because it is large.
            logits = _logits(hidden, weight, chunk_positions).sub_(chunk_log_sum_exp[:, None]).exp_()
            logits[torch.arange(chunk_positions.numel(), device=hidden.device), targets[chunk_positions]] -= 1
            logits = logits.mul_(scale).to(weight.dtype)  # [chunk, vocabulary]
            if hidden_gradient is not None:
                hidden_gradient[chunk_positions] = logits @ weight  # [chunk, width]
            if weight_gradient is not None:
                weight_gradient.addmm_(logits.T, hidden[chunk_positions])  # [vocabulary, width]
            del logits
        return hidden_gradient, weight_gradient, None, None, None


class _FrozenHead(torch.autograd.Function):
    """The loss with a frozen head: forward computes the gradient of ``hidden``, backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, positions: Tensor) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk_positions in positions.split(chunk) if positions.numel() else ():
            chunk_targets = targets[chunk_positions, None]  # [chunk, 1]
            # The logits are passed on without a name, so that they are freed as soon as the probabilities exist.
            log_probability, probabilities = _probabilities(hidden[chunk_positions] @ weight.T, chunk_targets)
            loss -= log_probability.sum()
            if hidden_gradient is not None:
                # The gradient of the logits is p - 1 at the target; expm1 of log p is exactly that.
                probabilities.scatter_(1, chunk_targets, log_probability.expm1_().to(weight.dtype))
                hidden_gradient[chunk_positions] = probabilities @ weight  # [chunk, width]
            del probabilities
        ctx.scale = 1 / max(1, positions.numel())
        ctx.save_for_backward(hidden_gradient)
        return loss * ctx.scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_gradient,) = ctx.saved_tensors
        return hidden_gradient * (gradient * ctx.scale), None, None, None, None


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace ``logits`` [tokens, vocabulary] by ``exp(logits - largest)``; return the sums and the largest, [tokens].

    torch.logsumexp would make a copy. Subtracting the largest keeps exp from overflowing.
    """
    largest = logits.amax(1, keepdim=True)  # [tokens, 1]
    return logits.sub_(largest).exp_().sum(1), largest.squeeze(1)


def _probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fp32 log-probability of ``targets`` [tokens, 1], and all probabilities [tokens, vocabulary].

    The probabilities have the dtype of ``logits`` and replace them: 16-bit logits through one fp32 copy, made by the
    kernel that reads them; fp32 logits in place.
    """
    if logits.dtype != torch.float32:
        log_probabilities = torch.log_softmax(logits, 1, dtype=torch.float32)
        return log_probabilities.gather(1, targets), torch.exp(log_probabilities, out=logits)
    target_logit = logits.gather(1, targets)  # [tokens, 1]
    sums, largest = _exponentials(logits)
    return target_logit - largest[:, None] - sums.log()[:, None], logits.div_(sums[:, None])


def _chunks(positions: Tensor, log_sum_exp: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both into the same chunks. Without targets return no chunk: ``split`` would return an empty one."""
    return zip(positions.split(chunk), log_sum_exp.split(chunk), strict=True) if positions.numel() else iter(())


def _logits(hidden: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Compute the fp32 logits of the tokens at ``positions``, in memory of their own."""
    return (hidden[positions] @ weight.T).float()
