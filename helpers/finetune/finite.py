"""End training if the loss or a weight is not finite, before a checkpoint is written."""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.errors import UserError
from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.recorder import gather_objects

# Of which loss and tokens are kept, 33 KB for a pack of 4,096. When there are as many, the losses are looked at.
MOST_BATCHES = 512
CHARACTERS = 24  # of a row, to find it by
BadBatch = tuple[int, float, str]  # the step, the loss, and how the rows begin


class FiniteCheck(TrainerCallback):
    """Look for nan and infinity where the host waits for the GPU anyway: when the loss is logged, and before a save.

    A training step only keeps its loss and its tokens, on the GPU.

    Attributes:
        tokenizer: Shows the rows of a bad batch.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self.tokenizer = tokenizer
        self._recent: list[tuple[int, Tensor, Tensor]] = []
        self._found: BadBatch | None = None

    def add(self, step: int, loss: Tensor, input_ids: Tensor) -> None:
        """Keep one micro-batch's loss and tokens, without looking at them.

        Args:
            step: The optimizer step that it belongs to, counted from 1.
            loss: Of this rank, on any device.
            input_ids: [rows, tokens], on any device.
        """
        if len(self._recent) == MOST_BATCHES:
            self._look()
        self._recent.append((step, loss.detach(), input_ids))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Look at the losses since the last log, and at the norm of the gradients.

        Args:
            args: The Trainer's arguments.
            state: Its state.
            control: Its switches; not used.
            logs: The logged values; only a loss is looked at.
            kwargs: What else the Trainer passes.

        Raises:
            UserError: Any rank's loss or gradient is not finite; on every rank.
        """
        if logs is None or "loss" not in logs:
            return
        # Under fp16 a gradient that overflows lowers the loss scale, and its step is left out.
        norm = 0.0 if args.fp16 else float(logs.get("grad_norm") or 0.0)
        bad = "" if math.isfinite(norm) else f"the norm of the gradients is {norm} at step {state.global_step}"
        self._check(args, state, bad)

    def check_before_saving(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Raise UserError on every rank if what would be saved is not finite; the last good checkpoint stays.

        Args:
            model: Its trainable parameters are looked at; under ZeRO-3, this rank's part of them.
            args: The Trainer's arguments.
            state: The Trainer's state.
        """
        parts = [getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad]
        finite = all(bool(torch.isfinite(part).all()) for part in parts)
        self._check(
            args, state, "" if finite else f"what is trained is no longer finite after step {state.global_step}"
        )

    def _check(self, args: TrainingArguments, state: TrainerState, bad: str) -> None:
        self._look()
        found = self._found
        by_rank = gather_objects((found, bad))
        batches = [(found[0], rank, *found[1:]) for rank, (found, _) in enumerate(by_rank) if found]
        others = [text for _, text in by_rank if text]
        if batches:
            step, rank, value, rows = min(batches)
            what = f"the loss is {value} at step {step} on rank {rank}, whose rows begin {rows}"
        elif others:
            what = others[0]
        else:
            return
        assert args.output_dir is not None
        kept = complete_checkpoints(Path(args.output_dir))
        hint = f"{kept[-1]} is the last good checkpoint" if kept else "no checkpoint was written before"
        advice = f"look at these rows, and try a learning_rate below {args.learning_rate:g}"
        if batches and step == 1:  # nothing has been learned yet
            advice = "look at these rows, and at the base model's weights"
        raise UserError(f"{what}; {hint}; {advice}")

    def _look(self) -> None:
        """Wait for the losses, and keep the first batch of this rank whose loss is not finite."""
        recent, self._recent = self._recent, []
        if self._found is not None or not recent:
            return
        finite = torch.stack([loss.float() for _, loss, _ in recent]).isfinite().tolist()
        if all(finite):
            return
        step, loss, input_ids = recent[finite.index(False)]
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)).split() for ids in input_ids.tolist()]
        self._found = step, loss.item(), ", ".join(repr(" ".join(words)[:CHARACTERS]) for words in texts)
