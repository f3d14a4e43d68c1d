"""Report options of the Trainer that another one leaves without effect, and rates with which little can be learned."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from helpers.config.blocks import training_setting

WITHOUT_BETAS = ("sgd", "adagrad", "adafactor", "rmsprop")  # beginnings of optimizers' names
HIGHEST_RATE = 1.0  # Adam moves each weight by about the rate in a step, and weights are smaller than this


def overruled_options(training: Mapping[str, Any]) -> list[str]:
    """List the options that are given and not used, because of another one.

    Args:
        training: Keyword arguments of ``TrainingArguments``.

    Returns:
        One line for each option whose value is not the default.
    """
    setting = partial(training_setting, training)
    optimizer, schedule = setting("optim"), setting("lr_scheduler_type")
    by_strategy = {
        f"{kind}_steps": f"{kind}_strategy is {setting(f'{kind}_strategy')}"
        for kind in ("logging", "eval", "save")
        if setting(f"{kind}_strategy") != "steps"
    }
    reasons = dict(by_strategy)
    if setting("max_steps") > 0:
        reasons["num_train_epochs"] = f"max_steps {setting('max_steps')} decides"
    if schedule == "constant":
        reasons["warmup_steps"] = "lr_scheduler_type is constant; take constant_with_warmup"
    if optimizer.startswith(WITHOUT_BETAS):
        reasons |= dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), f"optim is {optimizer}")
    return [
        f"{key} is ignored: {reason}"
        for key, reason in reasons.items()
        if key in training and training[key] != training_setting({}, key)
    ]


def rate_notes(training: Mapping[str, Any], planned: int) -> list[str]:
    """Warn of a learning rate that is 0, or stays below its value, or is larger than any weight.

    Args:
        training: Keyword arguments of ``TrainingArguments``.
        planned: Optimizer steps of the whole training.

    Returns:
        One line for each.
    """
    rate, warmup = training_setting(training, "learning_rate"), training_setting(training, "warmup_steps")
    notes = []
    if rate == 0:
        notes.append("warning: learning_rate 0 trains nothing")
    if rate >= HIGHEST_RATE:
        notes.append(f"warning: learning_rate {rate:g} is very high; LoRA usually takes 1e-5 to 1e-3")
    if rate * training_setting(training, "weight_decay") >= 1:
        notes.append("warning: weight_decay times learning_rate is 1 or more, so each step removes the whole weight")
    if warmup >= planned > 0 and training_setting(training, "lr_scheduler_type") != "constant":
        notes.append(
            f"warning: warmup_steps {warmup:g} does not end within the {planned:,} steps of the training, so the "
            "learning rate stays below learning_rate"
        )
    return notes
