"""Which strategy to use on these cards: does a configuration fit, and which of those that fit costs least."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from helpers.errors import UserError
from helpers.memory.predict import constants
from helpers.memory.predict.configuration import Configuration, Strategy
from helpers.memory.predict.prediction import Prediction, predict
from helpers.memory.units import GIB, MIB

# Elements; what helps an adapter or a layer of the 6B model, where DeepSpeed's defaults take gigabytes (configs/).
SMALL_BUCKET = 4_000_000
LIVE_PARAMETERS = 400_000_000


@dataclass(frozen=True)
class Fit:
    """Whether a prediction fits a card. Bytes; ``margin`` is what stays free, below 0 what is missing.

    ``largest`` is the largest item: the one to shrink; ``remedy`` a setting that alone would make it fit, if there is
    one. A Fit is true where it fits.
    """

    needed: int
    usable: int
    largest: str
    remedy: str = ""

    @property
    def margin(self) -> int:
        return self.usable - self.needed

    def __bool__(self) -> bool:
        return self.margin >= 0

    def __str__(self) -> str:
        if self:
            return f"fits: {self.margin / GIB:.2f} GiB stay free of {self.usable / GIB:.2f} usable"
        missing = f"does not fit: {-self.margin / GIB:.2f} GiB missing; the largest item is {self.largest}"
        return f"{missing}; {self.remedy}" if self.remedy else missing


@dataclass(frozen=True)
class Ranked:
    """One answer of :func:`rank_strategies`. ``traffic`` is bytes that a GPU sends in an optimizer step."""

    configuration: Configuration
    prediction: Prediction
    fit: Fit
    traffic: int
    reason: str


def fits(configuration: Configuration, card_bytes: int) -> Fit:
    """Whether the configuration fits a card of ``card_bytes``, of which 5 % stay in reserve (constants.py).

    Raises UserError for a card without memory.
    """
    if card_bytes <= 0:
        raise UserError(f"a card of {card_bytes / GIB:g} GiB holds nothing; give its memory in GiB, for example 24")
    prediction = predict(configuration)
    largest = max(prediction.items, key=lambda name: prediction.items[name])
    usable = int(card_bytes * (1 - constants.SAFETY_MARGIN_SHARE))
    remedy = ""
    if prediction.total > usable and not configuration.expandable_segments:
        without_holes = predict(replace(configuration, expandable_segments=True)).total
        if without_holes <= usable:
            setting = "PYTORCH_ALLOC_CONF=expandable_segments:True"
            remedy = f"{setting} would make it fit, with {without_holes / GIB:.2f} GiB"
    return Fit(prediction.total, usable, largest, remedy)


def traffic(configuration: Configuration) -> int:
    """Bytes that each GPU sends in one optimizer step (Rajbhandari 2019, section 7).

    An all-reduce is a reduce-scatter and an all-gather, each (N-1)/N of the data: 2Ψ under DDP, ZeRO-1 and ZeRO-2, Ψ
    being what is trained. ZeRO-3 gathers *all* parameters in forward and in backward, frozen ones included, for every
    micro-batch, and reduce-scatters the gradients of the trained ones: 3Ψ in full training.
    """
    c = configuration
    trained = c.trained * c.trained_bytes
    if c.strategy.stage == 3:
        volume = c.accumulation * (2 * c.frozen * c.stream_bytes + 3 * trained)
    else:
        volume = 2 * trained
    return volume * (c.strategy.ranks - 1) // c.strategy.ranks


def rank_strategies(wanted: Configuration, ranks: int, card_bytes: int) -> list[Ranked]:
    """Ways to run ``wanted`` on ``ranks`` cards, best first; its own strategy and checkpointing are not looked at.

    What fits goes first. Among those the order is that of the time they cost, as measured on H100s with the 6B model
    (tokens/s per GPU): DDP 13,474; ZeRO-2 12,769; DDP with checkpointing 9,251; ZeRO-3 with it 2,113; ZeRO-3 with the
    optimizer of all parameters in host memory 309. Raises UserError for no card, or one without memory.
    """
    if ranks < 1:
        raise UserError(f"{ranks} GPUs cannot train; give 1 or more")
    ranked = []
    for candidate in _candidates(wanted, ranks):
        prediction, fit = predict(candidate), fits(candidate, card_bytes)
        ranked.append(Ranked(candidate, prediction, fit, traffic(candidate), _reason(candidate, fit)))
    # What does not fit goes by how much is missing.
    return sorted(ranked, key=lambda r: (False, *_cost(r.configuration)) if r.fit else (True, -r.fit.margin))


def _candidates(wanted: Configuration, ranks: int) -> Iterator[Configuration]:
    for checkpointing in (False, True):
        for strategy in _strategies(ranks):
            # DeepSpeed runs no autocast: what the Trainer's bf16=True means there is 16-bit weights.
            precision = wanted.precision
            if precision != "fp32":
                precision = "bf16" if strategy.stage else "autocast"
            if wanted.base_bits < 16 and strategy.stage == 3:
                continue
            yield replace(wanted, strategy=strategy, precision=precision, checkpointing=checkpointing)


def _strategies(ranks: int) -> Iterator[Strategy]:
    sharded = Strategy(
        "zero-3",
        ranks,
        reduce_bucket=SMALL_BUCKET,
        max_live=LIVE_PARAMETERS,
        communicators=constants.TRAINER_ZERO_3_COMMUNICATORS,
    )
    if ranks == 1:
        yield Strategy("single")
    else:
        yield Strategy("ddp", ranks)
        yield Strategy("zero-2", ranks, reduce_bucket=SMALL_BUCKET, overlap_comm=True)
        yield sharded
    yield Strategy("zero-2", ranks, reduce_bucket=SMALL_BUCKET, overlap_comm=True, offload_optimizer=True)
    yield replace(sharded, offload_optimizer=True)
    yield replace(sharded, offload_optimizer=True, offload_parameters=True)


def _cost(c: Configuration) -> tuple[int, int, int, int]:
    """Slower is larger: host memory, then gathering parameters, then computing forward twice, then ZeRO's stage."""
    strategy = c.strategy
    offload = int(strategy.offload_optimizer) + int(strategy.offload_parameters)
    return offload, int(strategy.stage == 3), int(c.checkpointing), strategy.stage


def label(configuration: Configuration) -> str:
    """The strategy in a few words."""
    strategy = configuration.strategy
    parts = [{"single": "one process", "ddp": "DDP"}.get(strategy.kind, strategy.kind.replace("zero", "ZeRO"))]
    parts += ["optimizer in host memory"] if strategy.offload_optimizer else []
    parts += ["parameters in host memory"] if strategy.offload_parameters else []
    parts += ["checkpointing"] if configuration.checkpointing else []
    offloaded = configuration.checkpointing and configuration.offloaded_checkpoints
    parts += ["layer inputs in host memory"] if offloaded else []
    return " + ".join(parts)


def _reason(c: Configuration, fit: Fit) -> str:
    """One line: memory, what is sent, what it costs in speed."""
    sent = traffic(c)
    if sent == 0:
        sends = "sends nothing"
    else:
        amount = f"{sent / GIB:.2f} GiB" if sent >= 0.1 * GIB else f"{sent / MIB:.1f} MiB"
        multiple = "2Ψ" if c.strategy.stage != 3 else "3Ψ" if c.lora is None else "2Ψ of all parameters"
        sends = f"sends {amount} a step ({multiple})"
    costs = []
    if c.checkpointing:
        # Forward costs 2 FLOP per parameter and token; backward 4, or 2 where weights are frozen.
        costs.append(f"computes forward twice, {'3/2' if c.lora else '4/3'} of the work")
    if c.strategy.offload_optimizer and c.lora is None:
        costs.append("Adam on the CPU")
    if c.strategy.offload_parameters:
        costs.append("every parameter over PCIe, twice a step")
    return "; ".join([f"needs {fit.needed / GIB:.2f} GiB, {fit}", sends, *costs])
