"""Choose a strategy for given GPUs: does a configuration fit, and which of those that fit costs least time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from helpers.errors import UserError
from helpers.memory.predict import constants
from helpers.memory.predict.configuration import Configuration, Strategy
from helpers.memory.predict.prediction import Prediction, predict
from helpers.memory.predict.step_seconds import step_seconds
from helpers.memory.units import GIB, MIB

# Elements. They suit an adapter or a layer of the 6B model; DeepSpeed's defaults take gigabytes (configs/).
SMALL_BUCKET = 4_000_000
LIVE_PARAMETERS = 400_000_000


@dataclass(frozen=True)
class Fit:
    """Whether a prediction fits a GPU; true if it does.

    Attributes:
        prediction: Bytes that the configuration needs.
        usable: Bytes of the GPU that may be used.
        remedy: A setting that alone would make it fit, or empty.
    """

    prediction: Prediction
    usable: int
    remedy: str = ""

    @property
    def needed(self) -> int:
        """Bytes at the predicted peak."""
        return self.prediction.total

    @property
    def largest(self) -> str:
        """The largest item at the peak: the one to shrink."""
        items = self.prediction.items
        return max(items, key=lambda name: items[name])

    @property
    def margin(self) -> int:
        """Bytes that stay free; negative if some are missing."""
        return self.usable - self.needed

    def __bool__(self) -> bool:
        return self.margin >= 0

    def __str__(self) -> str:
        if self:
            return f"fits: {self.margin / GIB:.2f} GiB stay free of {self.usable / GIB:.2f} usable"
        missing = f"does not fit: {-self.margin / GIB:.2f} GiB missing; the largest item is {self.largest}"
        return f"{missing}; {self.remedy}" if self.remedy else missing


@dataclass(frozen=True)
class Candidate:
    """One answer of :func:`sort_strategies`.

    Attributes:
        configuration: The job with this strategy.
        fit: Whether it fits, with its prediction.
        traffic: Bytes that each GPU sends per optimizer step.
        seconds: Predicted time of a step on H100s, to compare candidates with each other.
        reason: Memory, time, traffic and what it costs in speed, in one line.
    """

    configuration: Configuration
    fit: Fit
    traffic: int
    seconds: float
    reason: str

    @property
    def prediction(self) -> Prediction:
        """Bytes that the configuration needs."""
        return self.fit.prediction


def fits(configuration: Configuration, gpu_bytes: int, prediction: Prediction | None = None) -> Fit:
    """Predict whether a configuration fits a GPU, of which 5 % stay in reserve (constants.py).

    Args:
        configuration: The job.
        gpu_bytes: Memory of the GPU in bytes.
        prediction: Its memory, if it is known better than by formula.

    Returns:
        The answer, with the margin and, if it does not fit, the largest item.

    Raises:
        UserError: The GPU has no memory.
    """
    if gpu_bytes <= 0:
        raise UserError(f"a GPU of {gpu_bytes / GIB:g} GiB holds nothing; give its memory in GiB, for example 24")
    prediction = prediction or predict(configuration)
    usable = int(gpu_bytes * (1 - constants.SAFETY_MARGIN_SHARE))
    remedy = ""
    if prediction.total > usable and not configuration.expandable_segments:
        without_holes = predict(replace(configuration, expandable_segments=True)).total
        if without_holes <= usable:
            setting = "PYTORCH_ALLOC_CONF=expandable_segments:True"
            remedy = f"{setting} would make it fit, with {without_holes / GIB:.2f} GiB"
    return Fit(prediction, usable, remedy)


def traffic(configuration: Configuration) -> int:
    """Count the bytes that each GPU sends per optimizer step (ZeRO, Rajbhandari et al. 2020, section 7).

    An all-reduce is a reduce-scatter and an all-gather, each of which sends (N-1)/N of the data: 2Ψ under DDP, ZeRO-1
    and ZeRO-2, where Ψ is what is trained. ZeRO-3 gathers *all* parameters in forward and in backward, frozen ones
    included, for every micro-batch, and reduce-scatters the gradients of the trained ones: 3Ψ in full training.
    """
    c = configuration
    trained = c.trainable_parameters * c.trainable_bytes
    if c.strategy.zero_stage == 3:
        volume = c.gradient_accumulation_steps * (2 * c.frozen_parameters * c.residual_bytes + 3 * trained)
    else:
        volume = 2 * trained
    return volume * (c.strategy.world_size - 1) // c.strategy.world_size


def sort_strategies(configuration: Configuration, world_size: int, gpu_bytes: int) -> list[Candidate]:
    """Sort the ways to run a job on ``world_size`` GPUs, best first.

    Configurations that fit come first, the fastest before the others (step_seconds.py; of two that take the same time
    to two digits, the simpler one). Configurations that do not fit follow, those that miss least first.

    Args:
        configuration: The job. Its own strategy and checkpointing are ignored.
        world_size: Number of GPUs.
        gpu_bytes: Memory of each GPU, in bytes.

    Returns:
        One candidate per strategy, with and without checkpointing.

    Raises:
        UserError: The number of GPUs or their memory is not above 0.
    """
    if world_size < 1:
        raise UserError(f"{world_size} GPUs cannot train; give 1 or more")
    candidates = []
    for variant in _variants(configuration, world_size):
        fit = fits(variant, gpu_bytes)
        sent = traffic(variant)
        seconds = step_seconds(variant, sent)
        candidates.append(Candidate(variant, fit, sent, seconds, _reason(variant, fit, sent, seconds)))
    # Candidates that do not fit are sorted by how much they miss.
    return sorted(
        candidates,
        key=lambda c: (False, _two_digits(c.seconds), *_cost(c.configuration)) if c.fit else (True, -c.fit.margin),
    )


def _two_digits(seconds: float) -> float:
    return float(f"{seconds:.2g}")


def _variants(configuration: Configuration, world_size: int) -> Iterator[Configuration]:
    for checkpointing in (False, True):
        for strategy in _strategies(world_size):
            # DeepSpeed does not use autocast: the Trainer's bf16=True means 16-bit weights there.
            precision = configuration.precision
            if precision != "fp32":
                precision = "bf16" if strategy.zero_stage else "autocast"
            if configuration.quantized and strategy.zero_stage == 3:
                continue
            yield replace(configuration, strategy=strategy, precision=precision, checkpointing=checkpointing)


def _strategies(world_size: int) -> Iterator[Strategy]:
    sharded = Strategy(
        "zero-3",
        world_size,
        reduce_bucket_size=SMALL_BUCKET,
        max_live_parameters=LIVE_PARAMETERS,
        max_reuse_distance=LIVE_PARAMETERS,
    )
    if world_size == 1:
        yield Strategy("single")
    else:
        yield Strategy("ddp", world_size)
        yield Strategy("zero-2", world_size, reduce_bucket_size=SMALL_BUCKET, overlap_comm=True)
        yield sharded
    yield Strategy("zero-2", world_size, reduce_bucket_size=SMALL_BUCKET, overlap_comm=True, offload_optimizer=True)
    yield replace(sharded, offload_optimizer=True)
    yield replace(sharded, offload_optimizer=True, offload_parameters=True)


def _cost(c: Configuration) -> tuple[int, int, int, int]:
    """Rank by how much is changed: host memory, gathered parameters, a recomputed forward, then the ZeRO stage."""
    strategy = c.strategy
    offload = int(strategy.offload_optimizer) + int(strategy.offload_parameters)
    return offload, int(strategy.zero_stage == 3), int(c.checkpointing), strategy.zero_stage


def label(configuration: Configuration) -> str:
    """Name a configuration's strategy in a few words.

    Args:
        configuration: The job.

    Returns:
        For example "ZeRO-3 + optimizer in host memory + checkpointing".
    """
    strategy = configuration.strategy
    parts = [{"single": "one process", "ddp": "DDP"}.get(strategy.kind, strategy.kind.replace("zero", "ZeRO"))]
    parts += ["optimizer in host memory"] if strategy.offload_optimizer else []
    parts += ["parameters in host memory"] if strategy.offload_parameters else []
    parts += ["checkpointing"] if configuration.checkpointing else []
    offloaded = configuration.checkpointing and configuration.offloaded_checkpoints
    parts += ["layer inputs in host memory"] if offloaded else []
    return " + ".join(parts)


def _reason(c: Configuration, fit: Fit, sent: int, seconds: float) -> str:
    """Write one line: memory, time, traffic and what it costs in speed."""
    if sent == 0:
        sends = "sends nothing"
    else:
        amount = f"{sent / GIB:.2f} GiB" if sent >= 0.1 * GIB else f"{sent / MIB:.1f} MiB"
        multiple = "2Ψ" if c.strategy.zero_stage != 3 else "3Ψ" if c.lora is None else "2Ψ of all parameters"
        sends = f"sends {amount} a step ({multiple})"
    costs = []
    if c.checkpointing:
        # Per parameter and token, forward costs 2 FLOP; backward 4, or 2 if the weights are frozen.
        costs.append(f"computes forward twice, {'3/2' if c.lora else '4/3'} of the work")
    if c.strategy.offload_optimizer and c.lora is None:
        costs.append("Adam on the CPU")
    if c.strategy.offload_parameters:
        costs.append("every parameter over PCIe, twice a step")
    time = f"about {seconds:.2f} s a step on H100s"
    return "; ".join([f"needs {fit.needed / GIB:.2f} GiB, {fit}", time, sends, *costs])
