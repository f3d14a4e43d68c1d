"""A fine-tune of a few steps on a small model: its configuration, its rows, and what it leaves."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from helpers.assets import TINY_DATA
from helpers.finetune import job
from helpers.finetune.ranks import Ranks

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "helpers" / "finetune" / "train.py"
STEPS = 4
ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, store=None)

CONFIG = {
    "data_config": {"train_file": "train.json", "val_file": "dev.json"},
    "max_input_length": 96,
    "max_output_length": 96,
    "max_eval_samples": 4,
    "training_args": {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        # Adam divides by a gradient's size: with the usual 1e-8, the rounding of a tiny one becomes a whole step.
        "adam_epsilon": 1e-3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "predict_with_generate": True,
        "generation_config": {"max_new_tokens": 8},
        "seed": 1,
    },
    "peft_config": {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj"]},
}


def merged(base: dict, changes: dict) -> dict:
    """``base`` with ``changes``, blocks merged."""
    return base | {
        key: merged(base.get(key, {}), value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def write_config(folder: Path, **changes) -> Path:
    """Write ``CONFIG`` with ``changes`` to ``folder``, which is made if it does not exist; None removes a block."""
    folder.mkdir(exist_ok=True)
    path = folder / "lora.yaml"
    content = {key: value for key, value in merged(CONFIG, changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def train_beside(rank_server, config: Path, data_dir: Path, model_dir: Path, *options: object, nprocs: int) -> Path:
    """Train as ``config`` says; returns the output folder, which is beside ``config``."""
    output = config.parent / "output"
    finished = rank_server.run(TRAIN, data_dir, model_dir, config, *options, "--output-dir", output, nprocs=nprocs)
    assert finished.returncode == 0, finished.stderr
    return output


def write_rows(folder: Path, *, train: int, dev: int) -> Path:
    """Write the first rows of the embedded data set to ``folder``."""
    for name, rows in (("train.json", train), ("dev.json", dev)):
        lines = (TINY_DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in ``checkpoint``."""
    return load_file(checkpoint / "adapter_model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of any element; both must hold the same tensors."""
    assert a.keys() == b.keys() and all(a[name].numel() for name in a)
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def prepare(data_dir: Path, model_dir: Path, config: Path, deepspeed=None, *, resume=False, ranks=ONE_RANK) -> job.Job:
    """Check a job whose output folder is beside its configuration."""
    output = config.parent / "output"
    return job.prepare(data_dir, str(model_dir), config, deepspeed, output_dir=output, resume=resume, ranks=ranks)
