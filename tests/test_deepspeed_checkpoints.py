"""DeepSpeed's optimizer state on another number of ranks."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime import lr_schedules
from torch.optim.lr_scheduler import LambdaLR

from helpers.libraries.deepspeed_checkpoints import (
    base_rates,
    correct_checkpoint_loading,
    regroup,
    replay_cpu_adam,
    sub_groups,
    use_options,
    use_schedule,
)


def saved(vector: torch.Tensor, ranks: int) -> list[dict]:
    """States as ZeRO saves them: weights without padding, Adam's averages with it."""
    size = -(-vector.numel() // (2 * ranks)) * 2
    states = []
    for rank in range(ranks):
        own = vector[rank * size : (rank + 1) * size]
        average = torch.nn.functional.pad(-own, (0, size - own.numel()))
        optimizer = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": average}}, "param_groups": [{"params": [0]}]}
        states.append({"base_optimizer_state": optimizer, "single_partition_of_fp32_groups": [own], "clip_grad": 1.0})
    return states


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_parts_on_other_ranks_make_the_same_vector(before, after):
    vector = torch.arange(1.0, 12.0)
    size = -(-11 // (2 * after)) * 2
    parts = [regroup(saved(vector, before), rank, [size]) for rank in range(after)]
    padded = torch.nn.functional.pad(vector, (0, size * after - 11))
    assert torch.equal(torch.cat([part["single_partition_of_fp32_groups"][0] for part in parts]), padded)
    averages = [part["base_optimizer_state"]["state"][0]["exp_avg"] for part in parts]
    assert torch.equal(torch.cat(averages), -padded)
    assert all(part["base_optimizer_state"]["state"][0]["step"] == 4 and part["clip_grad"] == 1 for part in parts)


def test_options_are_those_of_the_job_and_the_rate_is_the_schedule_s():
    groups = [{"params": ["loaded"], "lr": 0.5, "step": 3, "weight_decay": 0.0}]
    use_options(groups, [{"params": ["fresh"], "lr": 1.0, "step": 0, "weight_decay": 0.1, "initial_lr": 1.0}])
    assert groups == [{"params": ["loaded"], "lr": 0.5, "step": 3, "weight_decay": 0.1, "initial_lr": 1.0}]


def lambda_lr(optimizer, rate):
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def one_cycle(optimizer, rate):
    return lr_schedules.OneCycle(optimizer, cycle_min_lr=rate / 10, cycle_max_lr=rate, cycle_first_step_size=9)


def warmup(optimizer, rate):
    return lr_schedules.WarmupLR(optimizer, warmup_max_lr=rate, warmup_num_steps=7)


def warmup_cosine(optimizer, rate):
    return lr_schedules.WarmupCosineLR(optimizer, total_num_steps=20, warmup_num_steps=2)


def range_test(optimizer, rate):
    return lr_schedules.LRRangeTest(optimizer, lr_range_test_min_lr=rate, lr_range_test_step_size=3)


@pytest.mark.parametrize("make", [lambda_lr, one_cycle, warmup, warmup_cosine, range_test])
def test_a_resumed_schedule_gives_the_rate_of_this_job_from_the_first_step_on(make):
    def trained(rate, steps):
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=rate)
        schedule = make(optimizer, rate)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer, schedule

    def options(optimizer):
        return [(group["lr"], group["betas"]) for group in optimizer.param_groups]

    for rate in (0.1, 0.01):  # as before, and changed
        before, schedule_before = trained(0.1, 5)
        optimizer, schedule = trained(rate, 0)
        fresh, rates = [dict(group) for group in optimizer.param_groups], base_rates(schedule)
        optimizer.load_state_dict(before.state_dict())
        schedule.load_state_dict(schedule_before.state_dict())
        use_options(optimizer.param_groups, fresh)
        use_schedule(schedule, rates)
        reference, schedule_reference = trained(rate, 5)
        for _ in range(3):
            assert options(optimizer) == options(reference)
            assert schedule.get_last_lr() == schedule_reference.get_last_lr()
            for one in (schedule, schedule_reference):
                one.step()


def test_a_schedule_that_follows_the_loss_is_left_as_it_was_loaded():
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.1)
    for schedule in (None, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)):
        use_schedule(schedule, base_rates(schedule))
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.slow  # may compile
@pytest.mark.parametrize("zero_3", [False, True])
def test_adam_on_the_cpu_goes_on_to_the_last_bit(zero_3):
    def step(optimizer, parameter, number):
        torch.manual_seed(number)
        parameter.grad = torch.randn(64)
        optimizer.step()

    def fresh(values):
        parameter = torch.nn.Parameter(values.clone())
        return parameter, DeepSpeedCPUAdam([parameter], lr=1e-2)

    parameter, optimizer = fresh(torch.linspace(-1, 1, 64))
    for number in range(19):
        step(optimizer, parameter, number)
    resumed, resumed_optimizer = fresh(parameter.detach())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if zero_3:  # which takes the parameters out of the groups
        zero_optimizer = SimpleNamespace(sub_group_to_group_id={0: 0}, fp32_partitioned_groups_flat=[resumed])
        resumed_optimizer.param_groups[0]["params"] = []
        replay_cpu_adam(resumed_optimizer, sub_groups(zero_optimizer))
        resumed_optimizer.param_groups[0]["params"] = [resumed]
    else:
        replay_cpu_adam(resumed_optimizer, sub_groups(SimpleNamespace()))
    for number in range(19, 40):
        step(optimizer, parameter, number)
        step(resumed_optimizer, resumed, number)
        assert torch.equal(resumed, parameter)


class RunsCode:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return (Path.touch, (self.made,))


@pytest.mark.slow  # imports DeepSpeed
def test_a_state_that_would_run_code_is_not_loaded(tmp_path, monkeypatch):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    torch.save({"optimizer_state_dict": RunsCode(tmp_path / "made")}, tmp_path / "zero_pp_rank_0_optim_states.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # restored afterwards
    correct_checkpoint_loading()
    with pytest.raises(pickle.UnpicklingError):
        TorchCheckpointEngine().load(str(tmp_path / "zero_pp_rank_0_optim_states.pt"))
    assert not (tmp_path / "made").exists()
