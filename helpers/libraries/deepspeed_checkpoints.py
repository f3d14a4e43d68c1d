"""Correct how DeepSpeed loads a checkpoint: without running code from it, on any number of ranks, to the last bit."""

import os
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from helpers.errors import UserError

STATE, GROUPS, PADDINGS = "base_optimizer_state", "single_partition_of_fp32_groups", "group_paddings"
# What a group of an optimizer holds besides its options.
_NOT_OPTIONS = ("params", "step", "lr")


def correct_checkpoint_loading() -> None:
    """Replace how DeepSpeed's engine loads checkpoints.

    - A file that holds more than tensors and DeepSpeed's own plain objects is refused: it could run its code.
    - The state of ZeRO-1 and ZeRO-2 is regrouped if another number of ranks saved it.
    - Options of the optimizer are those of this job. DeepSpeed would silently go back to those of the checkpoint.
    - Adam on the CPU continues bit for bit.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks torch.load for all that pickle can do
    load_zero, load_checkpoint = DeepSpeedEngine._load_zero_checkpoint, DeepSpeedEngine.load_checkpoint
    if getattr(load_checkpoint, "is_corrected", False):
        return

    def load_regrouped(engine: Any, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
        saved_ranks, ranks = engine.loaded_checkpoint_dp_world_size, engine.seq_dp_world_size
        if saved_ranks == ranks or engine.zero_optimization_partition_weights():
            return load_zero(engine, load_dir, tag, load_optimizer_states)
        names = engine._get_all_zero_checkpoint_names(load_dir, tag, engine.bfloat16_enabled())
        states = [engine.checkpoint_engine.load(name, map_location="cpu")["optimizer_state_dict"] for name in names]
        rank = dist.get_rank(group=engine.optimizer.dp_process_group)
        state = regroup(states, rank, [group.numel() for group in engine.optimizer.single_partition_of_fp32_groups])
        engine.optimizer.load_state_dict([state] * ranks, load_from_fp32_weights=engine.zero_load_from_fp32_weights())
        return True

    def load(engine: Any, *args: Any, **kwargs: Any) -> Any:
        options = [dict(group) for group in engine.optimizer.param_groups]
        rates = base_rates(engine.lr_scheduler)
        try:
            with torch.serialization.safe_globals(_plain_classes()):
                loaded = load_checkpoint(engine, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"a state in {args[0]} holds more than numbers and is not loaded: it could run code "
                f"({' '.join(str(error).split())[:120]}); resume from a checkpoint that this job wrote"
            ) from error
        use_options(engine.optimizer.param_groups, options)
        use_schedule(engine.lr_scheduler, rates)
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = engine.gradient_clipping()
        replay_cpu_adam(getattr(engine.optimizer, "optimizer", None), sub_groups(engine.optimizer))
        return loaded

    setattr(load, "is_corrected", True)  # noqa: B010 (mypy: a function has no such attribute)
    DeepSpeedEngine._load_zero_checkpoint = load_regrouped
    DeepSpeedEngine.load_checkpoint = load


def _plain_classes() -> list[Any]:
    """Return the classes of what DeepSpeed itself puts into its states. None does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def use_options(groups: list[dict[str, Any]], options: list[dict[str, Any]]) -> None:
    """Give an optimizer's groups other options than those that were loaded; the schedule decides the learning rate.

    Args:
        groups: ``param_groups`` after loading.
        options: Copies of the groups from before.
    """
    for group, before in zip(groups, options, strict=True):
        group |= {key: value for key, value in before.items() if key not in _NOT_OPTIONS}


def base_rates(schedule: Any) -> list[Any]:
    """Return the learning rates that a schedule of torch multiplies; others keep theirs when a state is loaded."""
    return list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else []


def use_schedule(schedule: Any, rates: list[Any]) -> None:
    """Set the learning rate that this job's schedule has at the step that was loaded.

    Args:
        schedule: torch's or DeepSpeed's, after loading; others, which follow the loss, are left as they are.
        rates: :func:`base_rates` from before.
    """
    groups: list[dict[str, Any]] = schedule.optimizer.param_groups if schedule is not None else []
    if isinstance(schedule, LambdaLR):
        # The same multiplication as in its step: unless an option has changed, the learning rate is what was loaded.
        schedule.base_lrs = rates
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        rates = [base * factor for base, factor in zip(rates, factors, strict=True)]
    elif getattr(schedule, "last_batch_iteration", -1) >= 0:  # DeepSpeed's
        rates = schedule.get_lr()
        if getattr(schedule, "cycle_momentum", False):
            for group, betas in zip(groups, schedule.get_mom(), strict=True):
                group["betas"] = betas
    else:
        return
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def regroup(states: list[dict[str, Any]], rank: int, sizes: list[int]) -> dict[str, Any]:
    """Cut one rank's part out of the optimizer states that another number of ranks saved.

    A group's parameters are one flat vector, cut into equal parts, one per rank, with padding at the end.

    Args:
        states: The states of ZeRO-1 or ZeRO-2, by the rank that saved them.
        rank: Whose part is wanted.
        sizes: Number of elements of a rank's part now, for each group.

    Returns:
        A state for ``load_state_dict`` of DeepSpeed's optimizer.
    """
    first = states[0]
    parts = [[state[GROUPS][i] for state in states] for i in range(len(sizes))]
    optimizer: dict[str, Any] = {"state": {}, "param_groups": first[STATE]["param_groups"]}
    for i, group in enumerate(optimizer["param_groups"]):
        (key,) = group["params"]
        saved = [state[STATE]["state"].get(key, {}) for state in states]
        optimizer["state"][key] = {}
        for name, value in saved[0].items():
            if torch.is_tensor(value) and value.dim() > 0:
                unpadded = [own[name][: part.numel()] for own, part in zip(saved, parts[i], strict=True)]
                value = _part(unpadded, rank, sizes[i])
            optimizer["state"][key][name] = value
    masters = [_part(own, rank, size) for own, size in zip(parts, sizes, strict=True)]
    return first | {STATE: optimizer, GROUPS: masters, PADDINGS: [0] * len(sizes)}


def _part(parts: list[torch.Tensor], rank: int, size: int) -> torch.Tensor:
    own = torch.cat(parts)[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(own, (0, size - own.numel()))


def sub_groups(zero_optimizer: Any) -> list[tuple[int, torch.Tensor]] | None:
    """List what the optimizer of ZeRO-3 updates, in its order: it takes parameters out of the groups after each step.

    Args:
        zero_optimizer: DeepSpeed's.

    Returns:
        Index of the group, and the flat parameter; None for other stages, whose groups hold their parameters.
    """
    group_of = getattr(zero_optimizer, "sub_group_to_group_id", None)
    if group_of is None:
        return None
    return [(group_of[i], flat) for i, flat in enumerate(zero_optimizer.fp32_partitioned_groups_flat)]


def replay_cpu_adam(optimizer: Any, parameters: list[tuple[int, torch.Tensor]] | None = None) -> None:
    """Bring DeepSpeed's Adam on the CPU to the state it had when the checkpoint was saved.

    Its bias correction multiplies by beta once a step. After a jump it takes beta's power instead, which rounds
    differently: weights were off by 1e-7. So it takes all steps again, on no elements.

    Args:
        optimizer: The optimizer inside DeepSpeed's; others than ``DeepSpeedCPUAdam`` are left as they are.
        parameters: What it updates, in its order, with the index of the group; None takes those in the groups.
    """
    adam = getattr(optimizer, "ds_opt_adam", None)
    if adam is None:
        return
    nothing = [torch.empty(0) for _ in range(4)]
    groups = optimizer.param_groups
    if parameters is None:
        parameters = [(i, p) for i, group in enumerate(groups) for p in group["params"]]
    steps = [(groups[i], int(optimizer.state[p]["step"])) for i, p in parameters if "step" in optimizer.state[p]]
    for step in range(1, max((last for _, last in steps), default=0) + 1):
        for group, last in steps:
            if step <= last:
                options = (*group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
                adam.adam_update(optimizer.opt_id, step, group["lr"], *options, *nothing)
