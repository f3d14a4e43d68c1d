"""ChatGLM3 as the fine-tune trains it: the published network, with a loss that never holds all logits."""

from functools import update_wrapper
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.activations.chunked_loss import IGNORE_INDEX, call_through, chunked_cross_entropy
from helpers.chatglm3.model import ChatGLM3ForCausalLM


class TrainedChatGLM3ForCausalLM(ChatGLM3ForCausalLM):
    """``ChatGLM3ForCausalLM`` that computes the loss of the collators' batches in chunks.

    With ``loss_chunk`` (the number of tokens whose logits exist at a time) and ``shift_labels`` in the batch, the
    output has a loss and no logits. In any other call it is its parent class; ``labels`` alone get the parent's loss.

    Attributes:
        loss_chunk: Tokens per chunk; None computes all logits at once.
    """

    loss_chunk: int | None = None

    def forward(self, *args: Any, target_positions: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        targets, chunk = kwargs.get("shift_labels"), self.loss_chunk
        # An adapter on the output layer makes it more than one matrix; then all logits are computed.
        if targets is None or chunk is None or type(self.lm_head) is not nn.Linear:
            return super().forward(*args, **kwargs)
        for name in ("labels", "shift_labels"):
            kwargs.pop(name, None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        hidden = self.model(*args, **kwargs).last_hidden_state  # [rows, tokens, width]
        targets = targets.flatten()  # [rows * tokens]

        def loss_of(hidden: Tensor) -> Tensor:
            return chunked_cross_entropy(hidden, self.lm_head.weight, targets, chunk, target_positions)

        loss = call_through(self.lm_head, loss_of, hidden.flatten(0, 1))
        if num_items_in_batch is not None:
            # A mean over this batch becomes its share of the mean over all targets of the step, on all ranks.
            count = target_positions.numel() if target_positions is not None else (targets != IGNORE_INDEX).sum()
            loss = loss * count / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss)

    # Generation looks at the signature of forward to find out what it may pass, position ids for one: the parent's.
    update_wrapper(forward, ChatGLM3ForCausalLM.forward)
