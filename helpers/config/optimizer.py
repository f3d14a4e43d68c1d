"""Check ``optim`` and ``optim_args``.

Of ``optim_args`` transformers reads a few names for some optimizers, and passes over all others in silence.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from helpers.config.values import suggest
from helpers.errors import UserError

# The packages of transformers' optimizers, under the names they are imported by.
_PACKAGES = {  # by a part of the optimizer's name; the first that fits
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "apex": "apex",
    "npu": "torch_npu",
    "xla": "torch_xla",
    "anyprecision": "torchdistx",
}
_ADEMAMIX = {
    **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), float),
    **dict.fromkeys(("t_alpha", "t_beta3"), int),
}
_GALORE = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str}
# What transformers/trainer_optimizer.py reads, by the beginning of the optimizer's name. Not weight_decay, which the
# groups of parameters set for themselves, and not what it would pass on as text (RMSprop of bitsandbytes).
READ: dict[str, dict[str, type]] = {
    "sgd": {"momentum": float, "dampening": float, "nesterov": bool},
    "adagrad": {"lr_decay": float, "eps": float},
    "rmsprop_": {},
    "rmsprop": {"momentum": float, "alpha": float, "eps": float, "centered": bool},
    "ademamix": _ADEMAMIX,
    "paged_ademamix": _ADEMAMIX,
    "galore": _GALORE,
    "apollo": {**_GALORE, "proj": str, "scale_type": str},
    "adamw_anyprecision": {
        "use_kahan_summation": bool,
        **dict.fromkeys(("momentum_dtype", "variance_dtype", "compensation_buffer_dtype"), str),
    },
    "adamw_torch_4bit": {"bf16_stochastic_round": bool},
    "adamw_torch_8bit": {"bf16_stochastic_round": bool},
    "grokadamw": dict.fromkeys(
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), float
    ),
    "schedule_free": {"weight_lr_power": float, "r": float},
    "stable_adamw": {"max_lr": float},
}
_OWN_KEYS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_BUILT = ("sgd", "adagrad", "rmsprop")  # torch's own, which take a parameter on any machine


def check_optimizer(training: Mapping[str, Any], where: str) -> None:
    """Check that the optimizer can be made with its arguments; it is built where that needs no GPU.

    Args:
        training: Keyword arguments of ``TrainingArguments``.
        where: The block's place, for messages.

    Raises:
        UserError: A package is missing, ``optim_args`` are not pairs, or the optimizer reads no such name or value.
    """
    optimizer = training.get("optim", TrainingArguments.optim)
    package = next((package for part, package in _PACKAGES.items() if part in optimizer), None)
    if package and find_spec(package) is None:
        raise UserError(f"{where}: optim {optimizer} needs the package {package}; install it, or remove the line")
    given = training.get("optim_args")
    if not given:
        return
    # As transformers takes them apart.
    pairs = [part.split("=") for part in given.replace(" ", "").split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(f"{where}: optim_args must be key=value pairs with commas between them, not {given!r}")
    known = next((read for name, read in READ.items() if optimizer.startswith(name)), {})
    for key, value in pairs:
        if key in known:
            _check_value(value, known[key], f"{where}: optim_args {key}")
        elif key in _OWN_KEYS:
            raise UserError(f"{where}: optim_args {key} has no effect on {optimizer}; give {_OWN_KEYS[key]} instead")
        else:
            remedy = suggest(key, known) if known else "; it reads none, remove optim_args"
            raise UserError(f"{where}: optim_args: {optimizer} reads no {key!r}{remedy}")
    if len({key for key, _ in pairs}) < len(pairs):
        raise UserError(f"{where}: optim_args has a key twice: {given!r}; keep one")
    if optimizer in _BUILT:
        rate = training.get("learning_rate", TrainingArguments.learning_rate)
        settings: Any = SimpleNamespace(  # what get_optimizer_cls_and_kwargs reads of TrainingArguments
            optim=optimizer, optim_args=given, learning_rate=rate, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8
        )
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(settings)
            kind([torch.zeros(1)], **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: optim_args {given!r} do not fit {optimizer}: {error}") from error


def _check_value(value: str, kind: type, where: str) -> None:
    if kind is bool and value.lower() not in ("true", "false"):
        raise UserError(f"{where} must be true or false, not {value!r}")
    if kind in (int, float):
        try:
            finite = math.isfinite(kind(value))
        except ValueError:
            finite = False
        if not finite:
            raise UserError(f"{where} must be a {'whole ' if kind is int else ''}number, not {value!r}")
