"""DeepSpeed's optimizer state on another number of ranks."""

import pickle
from pathlib import Path

import pytest
import torch

from helpers.libraries.deepspeed_checkpoints import correct_checkpoint_loading, regroup, use_options


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
