"""A neutral value changes nothing: each option that can affect the loss, set to what it is without the line.

The embedded model is trained for three steps in this process, once with all values of a block that go together. Only if
that changes the loss is each value tried alone, to name it.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from helpers.assets import TINY_MODEL
from helpers.config.finetune import SpeedOptions
from helpers.config.options import IGNORED_LORA, IGNORED_TRAINING, REFUSED_LORA, REFUSED_TRAINING
from helpers.config.values import annotations
from helpers.finetune import train
from helpers.finetune.recorder import read_metrics
from helpers.finetune.trainer import LoraTrainer

pytestmark = pytest.mark.slow

BASE = {
    "max_input_length": 64,
    "max_output_length": 96,
    "training_args": {
        "max_steps": 3,
        "learning_rate": 3.0e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "seed": 42,
        "use_cpu": True,
    },
    "peft_config": {"peft_type": "LORA", "r": 8, "lora_alpha": 32},
}
NEUTRAL_TRAINING = {
    "label_smoothing_factor": 1e-9,
    "neftune_noise_alpha": 0.0,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {},
    "average_tokens_across_devices": True,
    "gradient_checkpointing": True,
    "activation_checkpointing": False,
    "dataloader_num_workers": 0,
    "dataloader_drop_last": False,
    "dataloader_pin_memory": False,
    "train_sampling_strategy": "random",
    "group_by_length": False,
    "data_seed": 42,
    "full_determinism": False,
    "bf16": False,
    "fp16": False,
    "num_train_epochs": 3.0,
    "torch_empty_cache_steps": 1,
    "logging_nan_inf_filter": True,
    "include_num_input_tokens_seen": "all",
    "eval_on_start": False,
    "accelerator_config": {"split_batches": False},
    "activation_checkpointing_kwargs": None,
    "gradient_checkpointing_kwargs": None,
    "optim_target_modules": None,
    "tf32": None,
    "dataloader_in_order": True,
    "ignore_data_skip": False,
    "load_best_model_at_end": False,
    "restore_callback_states_from_checkpoint": False,
    "logging_first_step": False,
}
# Another spelling of a value above, or not possible beside one.
APART = ("warmup_ratio", "group_by_length", "activation_checkpointing")
# Options that decide when, where and how something is written, printed, evaluated or sent, not what is trained.
NO_EFFECT = {
    *("output_dir", "run_name", "project", "report_to", "debug", "log_level", "log_level_replica", "log_on_each_node"),
    *("logging_strategy", "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
    *("save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("eval_steps", "eval_delay", "per_device_eval_batch_size", "metric_for_best_model", "greater_is_better"),
    *("dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    # Ranks and DeepSpeed: tests/test_train.py compares them with one process.
    *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_static_graph", "ddp_timeout", "deepspeed"),
    # peft_config; layers_pattern only says where layers_to_transform counts.
    *("task_type", "layers_pattern"),
}
NEUTRAL_LORA = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "exclude_modules": [],
    "modules_to_save": [],
    "layers_to_transform": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
}
NEUTRAL_SPEED = {
    "packing": None,
    "loss_chunk": 7,
    "padding_mask": True,
    "compile_layers": False,
    "recompute_inputs": False,
    "shared_dropout": True,  # without dropout
    "offload_checkpoints": False,
    "expandable_segments": False,
    "gpu_memory_gib": 80,
    "small_nccl_buffers": True,
    "fp8": False,
    "fp8_transposed": False,
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory, data_dir):
    """Train with changes to ``BASE``; returns the loss of each step."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(train, "draw_figures", lambda *_: None)
    monkeypatch.setattr(train.StopOnSignal, "install", lambda self: None)
    monkeypatch.setattr(train, "quiet_libraries", lambda: None)

    def run(training: dict | None = None, lora: dict | None = None, speed: dict | None = None) -> list[float]:
        folder: Path = tmp_path_factory.mktemp("run")
        content = BASE | {
            "training_args": BASE["training_args"] | (training or {}),
            "peft_config": BASE["peft_config"] | (lora or {}),
            "speed": speed or {},
        }
        config = folder / "lora.yaml"
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        train.main([str(data_dir), str(TINY_MODEL), str(config), "--output-dir", str(folder / "output")])
        return [record["loss"] for record in read_metrics(folder / "output" / "metrics.jsonl") if "loss" in record]

    yield run
    monkeypatch.undo()


@pytest.fixture(scope="module")
def plain(losses) -> list[float]:
    """The losses with none of the options."""
    found = losses()
    assert len(found) == 3 and found[0] == pytest.approx(2.119, abs=5e-4)
    return found


GROUPS = {
    "training": {key: value for key, value in NEUTRAL_TRAINING.items() if key not in APART},
    "training, apart": {key: NEUTRAL_TRAINING[key] for key in APART},
    "lora": NEUTRAL_LORA,
    "speed": NEUTRAL_SPEED,
}


@pytest.mark.parametrize("name", GROUPS)
def test_neutral_values_change_no_loss(name, losses, plain):
    block, values = name.partition(",")[0], GROUPS[name]

    def the_same(chosen: dict) -> bool:
        return losses(**{block: chosen}) == pytest.approx(plain, abs=1e-5)

    if not the_same(values):
        alone = [key for key, value in values.items() if not the_same({key: value})]
        pytest.fail(f"not neutral: {', '.join(alone) or 'only together'}")


@pytest.mark.parametrize(
    ("options", "values", "settled"),
    [
        (TrainingArguments, NEUTRAL_TRAINING, IGNORED_TRAINING | REFUSED_TRAINING | BASE["training_args"]),
        (LoraConfig, NEUTRAL_LORA, IGNORED_LORA | REFUSED_LORA | BASE["peft_config"]),
        (SpeedOptions, NEUTRAL_SPEED, {}),
    ],
)
def test_every_accepted_option_is_tried_or_said_to_have_no_effect(options, values, settled):
    """An option that a new version of a library adds fails here, until somebody decides."""
    undecided = annotations(options).keys() - values.keys() - settled.keys() - NO_EFFECT
    if options is LoraConfig:
        undecided -= {"layer_replication"}  # refused by check_lora
    assert undecided == set()


def test_smoothing_of_nothing_changes_nothing_in_packs_either(losses):
    packed = {"packing": 256}
    assert losses({"label_smoothing_factor": 1e-9}, speed=packed) == pytest.approx(losses(speed=packed), abs=1e-5)


@pytest.mark.parametrize("packing", [None, 256])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_is_that_of_torch(packing, accumulation, losses, monkeypatch):
    seen = []
    original = LoraTrainer.compute_loss

    def watched(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        loss = original(self, model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        given = {key: value for key, value in inputs.items() if "labels" not in key and key != "target_positions"}
        with torch.no_grad():
            logits = model(**given).logits
        total = F.cross_entropy(
            logits.flatten(0, 1), inputs["shift_labels"].flatten(), label_smoothing=0.1, reduction="sum"
        )
        seen.append((loss.item(), (total / num_items_in_batch).item()))
        return loss

    monkeypatch.setattr(LoraTrainer, "compute_loss", watched)
    losses(
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": accumulation, "max_steps": 2},
        speed={"packing": packing},
    )
    assert len(seen) == 2 * accumulation
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-5)
