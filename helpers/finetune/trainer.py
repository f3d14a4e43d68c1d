"""Extend transformers' Trainer: small atomic checkpoints, offloading, scored answers."""

import atexit
import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from helpers.activations import CHECKPOINT_BYTES_IN_FLIGHT
from helpers.activations.offload import OffloadedActivations
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.finetune.checkpoints import Files, describe_files, write_manifest
from helpers.finetune.continued import ContinuedTrainer
from helpers.finetune.evaluate import generate_answers
from helpers.finetune.finite import FiniteCheck
from helpers.finetune.loading import write_base_format
from helpers.finetune.method import Model, gathered_prefix
from helpers.finetune.metrics import mean_scores, score
from helpers.finetune.output_disk import check_still_there, disk_error, is_disk_error
from helpers.finetune.packing import PackCollator
from helpers.finetune.recorder import WorkCounter, gather_objects
from helpers.finetune.speed import evaluation_mode
from helpers.finetune.stop import ignore_signals_in_worker, kill_workers
from helpers.finetune.whole_model import write_trained
from helpers.memory.phases import phase


def _broadcast(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank."""
    if dist.is_initialized():
        holder = [value]
        dist.broadcast_object_list(holder)
        value = holder[0]
    return value


class LoraTrainer(ContinuedTrainer):
    """Train a ``PeftModel`` and save only its adapter, or train and save a whole model.

    Args:
        counter: Counts the tokens and examples of this rank.
        offload_checkpoints: Keep the layer inputs that gradient checkpointing saves in host memory.
        pack_collator: Makes the training batches if the training features are packs; evaluation always pads.
        answer_features: Prompts (``evaluation_features``) that are answered greedily and scored at each evaluation.
        max_new_tokens: Longest answer to generate.
        base_format: Number format of the frozen base, recorded in every checkpoint: 8, 4, "fp8", or None.
        facts: What decides the training, recorded in every checkpoint.
        base_folder: Folder of the model that the training began with.
        **kwargs: Arguments of ``transformers.Trainer``.
    """

    model: Model
    processing_class: ChatGLMTokenizer

    def __init__(
        self,
        *,
        counter: WorkCounter,
        offload_checkpoints: bool = False,
        pack_collator: PackCollator | None = None,
        answer_features: Dataset | None = None,
        max_new_tokens: int = 512,
        base_format: int | str | None = None,
        facts: dict[str, Any] | None = None,
        base_folder: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.counter = counter
        self.offload_checkpoints = offload_checkpoints
        self.pack_collator = pack_collator
        self.answer_features = answer_features
        self.max_new_tokens = max_new_tokens
        self.base_format = base_format
        self.facts = facts or {}
        self._all_in_training_mode = False
        self.base_folder = base_folder
        self.finite_check = FiniteCheck(self.processing_class)
        self.add_callback(self.finite_check)  # after the Recorder, which writes the step down
        self.remove_callback(PrinterCallback)  # the Recorder prints
        if self.label_smoother is not None:
            # Otherwise the Trainer decides by the model's class name whether labels are shifted already.
            self.compute_loss_func = self.label_smoother

    def get_train_dataloader(self) -> DataLoader:
        padding = self.data_collator
        self.data_collator = self.pack_collator or padding
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = padding
        inner: Any = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper starts this one's workers
        inner.worker_init_fn = partial(ignore_signals_in_worker, inner.worker_init_fn)
        atexit.register(kill_workers)
        # It draws its workers' seeds here, once an epoch or once at all, and not from the numbers of dropout.
        inner.generator = torch.Generator()
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # The collator counted on the host. Summing the mask here would make the host wait for the GPU in every step.
        tokens, rows = inputs.pop("tokens"), inputs.pop("rows", len(inputs["input_ids"]))
        if self.model.training:
            self.counter.add(tokens, rows)
        return super()._prepare_inputs(inputs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        input_ids = inputs["input_ids"]
        if self._all_in_training_mode:
            # The Trainer calls it in every step, and it goes through a thousand modules: milliseconds of the host.
            vars(model)["train"] = lambda: model
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            vars(model).pop("train", None)
        self._all_in_training_mode = True
        self.finite_check.add(self.state.global_step + 1, loss, input_ids)
        return loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        return 6 * inputs["input_ids"].numel() * self._counted_parameters

    @cached_property
    def _counted_parameters(self) -> int:
        # The Trainer counts them in every step, going through more than a thousand modules: milliseconds of the host.
        return self.model.num_parameters(exclude_embeddings=True)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.label_smoother is not None:
            # The smoother gets the shifted labels and all logits: without targets, the model computes no loss itself.
            inputs = {
                key: value for key, value in inputs.items() if key not in ("shift_labels", "target_positions")
            } | {"labels": inputs["shift_labels"]}
        if not (self.offload_checkpoints and self.model.training):
            return super().compute_loss(model, inputs, *args, **kwargs)
        with OffloadedActivations(self.model, max_in_flight_bytes=CHECKPOINT_BYTES_IN_FLIGHT):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        self._all_in_training_mode = False
        # Its data loader draws a seed: training goes on as if there had been no evaluation.
        with phase("evaluate"), evaluation_mode(self.model), torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return metrics | self._score_answers(metric_key_prefix)

    def _score_answers(self, prefix: str) -> dict[str, float]:
        """Answer the prompts and log the mean scores; nothing without prompts."""
        if self.answer_features is None:
            return {}
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
        scores = {f"{prefix}_{name.replace('-', '_')}": value for name, value in _broadcast(means).items()}
        self.log(scores)
        return scores

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # transformers would first copy the whole frozen model to the host, on every rank. Every rank has the full
        # adapter, except under ZeRO-3, where gathering it is a collective: layer by layer, into rank 0's host memory.
        engine: Any = self.deepspeed
        zero_3 = self.is_deepspeed_enabled and engine.zero_optimization_partition_weights()
        whole = not isinstance(self.model, PeftModel)
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=not whole) if zero_3 else None
        folder = Path(output_dir) if output_dir else self._output_dir
        if not whole:
            with gathered_prefix(self.model, state):
                self._save(str(folder), state_dict=state)
        elif self.args.should_save:
            write_trained(folder, state or self.model.state_dict(), self.processing_class, like=self.base_folder)
        if self.args.should_save:
            write_base_format(folder, self.base_format)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):  # a whole model was loaded from its checkpoint to begin with
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        # The names in the file are the published ones: transformers would skip all of them.
        best = Path(str(self.state.best_model_checkpoint))
        loaded = ChatGLM3ForCausalLM.from_checked_folder(best, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None  # the configuration has a default
        return Path(self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.finite_check.check_before_saving(model, self.args, self.state)
        folder = self._output_dir / f"checkpoint-{self.state.global_step}"
        try:
            with phase("save"):
                self._save_whole_checkpoint(folder, model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_disk_error(error, self._output_dir):
                raise
            line = disk_error(error, self._output_dir, folder, saving=True)  # while the disk is as full as it was
            if self.args.should_save:  # of another rank's error rank 0 learns, and does the same
                shutil.rmtree(folder, ignore_errors=True)
            raise line from error

    def _save_whole_checkpoint(self, folder: Path, model: torch.nn.Module, trial: Any) -> None:
        """Save, declare the checkpoint complete when all ranks have, and only then remove older ones."""
        check_still_there(self._output_dir, self._output_dir)
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # of an earlier try, perhaps on more ranks: no file of it may stay
        _broadcast(None)  # no rank writes before that
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        files: Files = {}
        for of_rank in gather_objects(describe_files(folder, self.args.process_index)):
            files |= of_rank
        if self.args.should_save:
            write_manifest(folder, files, self.facts)
            rotate_checkpoints(
                str(self._output_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
