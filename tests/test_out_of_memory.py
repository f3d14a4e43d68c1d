"""When GPU memory runs out: one line with what would fit, according to the prediction."""

import dataclasses
import re

import pytest
import torch
from small_finetune import prepare, write_config

from helpers.errors import UserError
from helpers.finetune import forecast
from helpers.finetune.out_of_memory import advice, explained_out_of_memory
from helpers.hardware import Gpu
from helpers.memory.predict import ModelShape
from helpers.memory.units import GIB


@pytest.fixture
def job_on(tmp_path, data_dir, small_checkpoint, monkeypatch):
    """A job with the 6B model's sizes on GPUs of so many GiB; None for no GPU."""
    monkeypatch.setattr(forecast, "read_shape", lambda _: ModelShape())

    def make(gib, **changes):
        prepared = prepare(data_dir, small_checkpoint, write_config(tmp_path, **changes))
        gpus = () if gib is None else (Gpu("a GPU", int(gib * GIB), (9, 0)), Gpu("a larger one", 2**40, (9, 0)))
        return dataclasses.replace(prepared, machine=dataclasses.replace(prepared.machine, gpus=gpus))

    return make


LARGE = {"training_args": {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}}
NUMBER = r"\d+\.\d GiB"
ITEMS = r"\([^()]*parameters \d+\.\d, [^()]*\)"


@pytest.mark.parametrize(
    ("gib", "changes", "wanted"),
    [
        (
            24,
            LARGE,
            rf"{NUMBER} are predicted for this job {ITEMS}, 22.8 usable; what would fit: gradient_checkpointing: true "
            rf"\({NUMBER}\), or per_device_train_batch_size: \d+ with gradient_accumulation_steps: \d+ \({NUMBER}\)",
        ),
        (
            8,
            {},
            rf"{NUMBER} are predicted for this job {ITEMS}, 7.6 usable; what would fit: ZeRO-3 \+ optimizer in host "
            rf"memory \+ parameters in host memory.* \({NUMBER}\)",
        ),
        (1, {}, rf"{NUMBER} are predicted for this job {ITEMS}, 0.\d usable; nothing would fit here"),
        (
            80,
            {},
            rf"{NUMBER} are predicted for this job {ITEMS}, 76.0 usable: it should fit, so look with nvidia-smi .*",
        ),
        (None, {}, "lower per_device_train_batch_size, or set gradient_checkpointing: true"),
        (
            24,
            {"peft_config": {"target_modules": ["q_proj", "lm_head"]}},
            "lower per_device_train_batch_size, or set gradient_checkpointing: true",
        ),
    ],
)
def test_what_would_fit_is_said(gib, changes, wanted, job_on):
    assert re.fullmatch(wanted, advice(job_on(gib, **changes), world_size=1))


def test_fewer_rows_make_the_same_step(job_on):
    found = re.search(r"batch_size: (\d+) with gradient_accumulation_steps: (\d+)", advice(job_on(24, **LARGE), 1))
    assert int(found[1]) * int(found[2]) == 128


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("NCCL: CUDA out of memory")])
def test_the_rank_is_named(error, job_on):
    with (
        pytest.raises(UserError, match=r"^rank 3 ran out of GPU memory; .* are predicted"),
        explained_out_of_memory(job_on(24), rank=3, world_size=4),
    ):
        raise error


def test_other_errors_stay_what_they_are(job_on):
    with pytest.raises(RuntimeError, match="shape"), explained_out_of_memory(job_on(24), rank=0, world_size=1):
        raise RuntimeError("a shape is wrong")
