"""The optimizer and the schedule that a DeepSpeed file brings: used, refused or reported."""

from pathlib import Path

import pytest

from helpers.config.compatibility import contradictions
from helpers.config.deepspeed_defaults import SIZES, with_defaults
from helpers.config.deepspeed_optimizer import check_deepspeed_optimizer
from helpers.errors import UserError

AUTO_WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")


def check(content, training=None) -> list[str]:
    notes: list[str] = []
    check_deepspeed_optimizer(content, training or {}, Path("ds.json"), notes)
    return notes


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type 'OneBitAdam' is not supported; use Adam, AdamW"),
        ({"optimizer": {"type": "Foo"}}, "give optim under training_args"),
        (
            {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-4}}},
            "learning_rate is not an option of AdamW",
        ),
        ({"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}}, "optimizer.params.eps is not an option of Lion"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "give gradient_clipping at the top"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "3e-3"}}}, 'lr must be a number of at least 0, not "3e-3"'),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "betas must be two numbers, not 0.9"),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": 1}}}, "torch_adam must be true or false, not 1"),
        ({"scheduler": {"type": "Foo"}}, "scheduler.type 'Foo' is unknown; known are LRRangeTest, OneCycle, WarmupLR"),
        ({"scheduler": {"type": "WarmupLR", "params": {"steps": 3}}}, "does not take its params {'steps': 3}"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": AUTO_WARMUP}}, "total_num_steps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "auto"}}}, 'warmup_type is "auto"'),
    ],
)
def test_what_deepspeed_would_notice_after_loading(content, wanted):
    with pytest.raises(UserError) as caught:
        check(content)
    message = str(caught.value)
    assert wanted in message and message.startswith("ds.json") and "\n" not in message


def test_what_it_replaces_is_said():
    schedule = {"scheduler": {"type": "WarmupLR", "params": AUTO_WARMUP}}
    (note,) = check(schedule, {"lr_scheduler_type": "cosine"})
    assert note == "lr_scheduler_type cosine is ignored: ds.json brings the schedule WarmupLR"
    decay = {"scheduler": {"type": "WarmupDecayLR", "params": AUTO_WARMUP | {"total_num_steps": "auto"}}}
    assert check(decay) == ["lr_scheduler_type linear is ignored: ds.json brings the schedule WarmupDecayLR"]
    adamw = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert check(adamw, {"optim": "adafactor"}) == ["optim adafactor is ignored: ds.json brings the optimizer AdamW"]
    assert check(adamw) == check(adamw, {"optim": "adamw_torch"}) == check({}) == []


LR, WEIGHT_DECAY = "optimizer.params.lr", "optimizer.params.weight_decay"


@pytest.mark.parametrize(
    ("content", "added"),
    [
        ({}, []),
        (
            {"optimizer": {"type": "Adam"}},
            [f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")],
        ),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1, "betas": "auto"}}}, [WEIGHT_DECAY]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0}}}, ["scheduler.params.warmup_max_lr"]),
    ],
)
def test_what_a_file_leaves_open_is_auto(content, added):
    notes: list[str] = []
    completed = with_defaults(content, Path("ds.json"), notes)
    assert {key: completed[key] for key in SIZES} == dict.fromkeys(SIZES, "auto")
    assert completed["zero_optimization"] == {"stage": 0}
    assert notes == [f"ds.json leaves {', '.join([*SIZES, *added])} open: training_args decide"]
    for name in added:
        block, _, key = name.split(".")
        assert completed[block]["params"][key] == "auto"
    notes.clear()
    offload = {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    with_defaults({**completed, **offload}, Path("ds.json"), notes)
    assert notes == ["offload_param is ignored: only ZeRO-3 can move parameters to the host"]
    notes.clear()
    assert with_defaults(completed, Path("ds.json"), notes) == completed and notes == []


TRAINING = {"learning_rate": 1e-4, "max_steps": 100, "warmup_steps": 0.1}


@pytest.mark.parametrize(
    ("block", "params", "wanted"),
    [
        ("optimizer", {"lr": 1e-3}, "lr is 0.001 but learning_rate is 0.0001"),
        ("optimizer", {"betas": [0.8, 0.999]}, "betas is [0.8, 0.999] but adam_beta1 and adam_beta2 is [0.9, 0.999]"),
        ("optimizer", {"eps": 1e-6}, "eps is 1e-06 but adam_epsilon is 1e-08"),
        ("optimizer", {"weight_decay": 0.1}, "weight_decay is 0.1 but weight_decay is 0.0"),
        ("scheduler", {"warmup_max_lr": 1e-3}, "warmup_max_lr is 0.001 but learning_rate is 0.0001"),
        ("scheduler", {"total_num_steps": 50}, "total_num_steps is 50 but max_steps is 100"),
        ("scheduler", {"warmup_num_steps": 5}, "warmup_num_steps is 5 but warmup_steps is 10"),
        ("scheduler", {"warmup_num_steps": 10, "total_num_steps": 100, "warmup_max_lr": "auto"}, None),
        ("optimizer", {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}, None),
    ],
)
def test_it_agrees_with_training_args(block, params, wanted):
    assert contradictions({block: {"type": "any", "params": params}}, TRAINING, world_size=1) == [wanted] * bool(wanted)
