"""A neutral value changes nothing: each option that can affect the loss, set to what it is without the line.

The embedded model is trained for three steps in this process, once per value.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from helpers.assets import TINY_MODEL
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
    "offload_checkpoints": False,
    "expandable_segments": False,
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


@pytest.mark.parametrize("key", NEUTRAL_TRAINING)
def test_a_neutral_value_under_training_args(key, losses, plain):
    assert losses({key: NEUTRAL_TRAINING[key]}) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("key", NEUTRAL_LORA)
def test_a_neutral_value_under_peft_config(key, losses, plain):
    assert losses(lora={key: NEUTRAL_LORA[key]}) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("key", NEUTRAL_SPEED)
def test_a_neutral_value_under_speed(key, losses, plain):
    assert losses(speed={key: NEUTRAL_SPEED[key]}) == pytest.approx(plain, abs=1e-5)


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
