"""transformers' Trainer for a LoRA adapter: small checkpoints, whole or not at all, and scored answers."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from helpers.activations.offload import OffloadedActivations
from helpers.errors import UserError
from helpers.finetune.checkpoints import complete_checkpoints, write_quantization_bit
from helpers.finetune.evaluate import generate_answers
from helpers.finetune.metrics import mean_scores, score
from helpers.finetune.packing import PackCollator
from helpers.finetune.recorder import WorkCounter
from helpers.finetune.speed import evaluation_mode
from helpers.memory.predict.saved_tensors import CHECKPOINTS_IN_FLIGHT


def _shared(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    if dist.is_initialized():
        holder = [value]
        dist.broadcast_object_list(holder)
        value = holder[0]
    return value


class LoraTrainer(Trainer):
    """Trains a ``PeftModel``; only its adapter is saved.

    ``pack_collator`` makes batches of training features that are packs; evaluation always pads.
    ``offload_checkpoints`` keeps what gradient checkpointing keeps in host memory.
    ``answer_features`` (of ``evaluation_features``) are answered at each evaluation, greedily, and scored.
    """

    def __init__(
        self,
        *,
        counter: WorkCounter,
        offload_checkpoints: bool = False,
        pack_collator: PackCollator | None = None,
        answer_features: Dataset | None = None,
        max_new_tokens: int = 512,
        quantization_bit: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.counter = counter
        self.offload_checkpoints = offload_checkpoints
        self.pack_collator = pack_collator
        self.answer_features = answer_features
        self.max_new_tokens = max_new_tokens
        self.quantization_bit = quantization_bit
        self.remove_callback(PrinterCallback)  # the Recorder prints

    def get_train_dataloader(self) -> DataLoader:
        padding = self.data_collator
        self.data_collator = self.pack_collator or padding
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padding

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # The collator counts on the host; summing the mask here would make the host wait for the GPU in every step.
        tokens, rows = inputs.pop("tokens"), inputs.pop("rows", len(inputs["input_ids"]))
        if self.model.training:
            self.counter.add(tokens, rows)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        offloaded = self.offload_checkpoints and self.model.training
        with (
            OffloadedActivations(self.model, max_in_flight_bytes=CHECKPOINTS_IN_FLIGHT) if offloaded else nullcontext()
        ):
            return super().compute_loss(model, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        with evaluation_mode(self.model):
            return self._loss_and_scores(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _loss_and_scores(self, *args: Any, metric_key_prefix: str, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.answer_features is None:
            return metrics
        answers = generate_answers(
            self.model,
            self.processing_class,
            self.answer_features["prompt_ids"][:],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.args.per_device_eval_batch_size,
            label="evaluation",
        )
        means = None
        if answers is not None:
            references = self.answer_features["reference"][:]
            means = mean_scores([score(a, r) for a, r in zip(answers, references, strict=True)])
        scores = {f"{metric_key_prefix}_{name.replace('-', '_')}": value for name, value in _shared(means).items()}
        self.log(scores)
        return metrics | scores

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # transformers would copy the whole frozen model to the host first, on every rank. The adapter is whole on
        # every rank but under ZeRO-3, where gathering it is a collective.
        zero_3 = self.is_deepspeed_enabled and self.deepspeed.zero_optimization_partition_weights()
        state = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) if zero_3 else None
        folder = output_dir or self.args.output_dir
        self._save(folder, state_dict=state)
        if self.args.should_save:
            write_quantization_bit(Path(folder), self.quantization_bit)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            # RuntimeError is what torch.save raises on a full disk.
            if isinstance(error, RuntimeError) and "write" not in str(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.args.output_dir).free / 2**20
            kept = complete_checkpoints(Path(self.args.output_dir))
            remedy = (
                f"{kept[-1].name} is whole: make room and go on with --resume" if kept else "make room, start again"
            )
            raise UserError(
                f"{folder} could not be written ({error}; {free:,.0f} MiB free on its disk); {remedy}"
            ) from error
