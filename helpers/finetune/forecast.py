"""Forecast a job's GPU memory before its weights are loaded: print it, refuse what cannot fit, compare at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from helpers.errors import UserError
from helpers.finetune.job import Job
from helpers.finetune.row_lengths import row_lengths
from helpers.memory.predict import Configuration, Prediction, predict, read_shape
from helpers.memory.predict.error_bar import error_bar
from helpers.memory.predict.jobs import configuration_of
from helpers.memory.predict.lengths import step_lengths
from helpers.memory.predict.machine import calibrated
from helpers.memory.predict.planner import fits, label, sort_strategies
from helpers.memory.units import GIB

# Phases of a job whose memory nothing predicts: generation, for example, has caches of keys and values.
NOT_PREDICTED = ("evaluate", "save", "load model")


@dataclass(frozen=True)
class Forecast:
    """A job's predicted memory.

    Attributes:
        worst: The job in the step with its longest row.
        typical: The job in a typical step.
        prediction: Memory of the worst step, which decides whether the job fits.
        gpu_bytes: Memory of the smallest GPU; None without a GPU of known size.
    """

    worst: Configuration
    typical: Configuration
    prediction: Prediction
    gpu_bytes: int | None

    @property
    def least(self) -> int:
        """The fewest bytes that the job can need, by the errors of the measured runs."""
        return error_bar(self.worst).least(self.prediction.total)

    @property
    def most(self) -> int:
        """The most bytes that the job can need, by the errors of the measured runs."""
        return error_bar(self.worst).most(self.prediction.total)

    @property
    def items(self) -> str:
        """The items of the prediction in GiB, the largest first, without those below 0.05."""
        held = sorted(self.prediction.items.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in held if size >= 0.05 * GIB)

    def lines(self) -> list[str]:
        """Describe the prediction next to the GPU's size, for people."""
        total = self.prediction.total
        line = f"GPU memory: {total / GIB:.1f} GiB predicted ({self.least / GIB:.1f} to {self.most / GIB:.1f})"
        if self.typical != self.worst:
            line += (
                f" in the worst step, of {self.worst.sequence_length} tokens per row; "
                f"{predict(self.typical).total / GIB:.1f} in a typical one, of {self.typical.sequence_length}"
            )
        size = "no GPU here" if self.gpu_bytes is None else f"the smallest GPU has {self.gpu_bytes / GIB:.1f} GiB"
        return [f"{line}; {size}", f"GPU memory: {self.items}"]

    def content(self) -> dict[str, Any]:
        """Return the prediction for ``run.json``, in GiB."""
        return {
            "total_gib": self.prediction.total / GIB,
            "least_gib": self.least / GIB,
            "most_gib": self.most / GIB,
            "items_gib": {name: size / GIB for name, size in self.prediction.items.items()},
            "peak_phase": self.prediction.peak_phase,
            "typical_gib": predict(self.typical).total / GIB,
            "worst_tokens": self.worst.sequence_length,
            "typical_tokens": self.typical.sequence_length,
            "gpu_gib": None if self.gpu_bytes is None else self.gpu_bytes / GIB,
        }

    def compared_with(self, peaks: Sequence[float], phase: str | None = None) -> str:
        """Compare with NVML at the end of the run.

        Args:
            peaks: GiB of each GPU at its peak, without what was in use before the job.
            phase: The phase of the job in which the fullest GPU had its peak, if it is known.

        Returns:
            One line.
        """
        predicted, peak = self.prediction.total / GIB, max(peaks)
        error = 100 * (predicted / peak - 1)
        line = f"GPU memory: {predicted:.2f} GiB predicted, {peak:.2f} at NVML's peak ({error:+.1f} %)"
        if phase in NOT_PREDICTED:
            line += f"; the peak came in the phase {phase!r}, and the prediction is for training steps"
        return line


def forecast(job: Job, world_size: int) -> Forecast:
    """Predict the memory of a job's typical and worst step.

    Args:
        job: The checked job.
        world_size: Number of ranks.

    Returns:
        The forecast.

    Raises:
        UserError: No prediction covers this job.
    """
    gpus = () if job.config.training.get("use_cpu") else job.machine.gpus
    sizes = [gpu.total_bytes for gpu in gpus if gpu.total_bytes is not None]
    # FlashAttention needs no mask, but it runs only on GPUs that have bf16.
    old = bool(gpus) and job.precision != "bf16"
    shape, machine = read_shape(job.model_dir), calibrated()

    def configuration(length: int | None) -> Configuration:
        found = configuration_of(job.config, job.deepspeed, shape=shape, world_size=world_size, sequence_length=length)
        return replace(found, padding_mask=found.padding_mask or old, machine=machine)

    worst = typical = configuration(None)
    if worst.padded:
        lengths = step_lengths(row_lengths(job.data.train), worst.micro_batch_size)
        worst, typical = configuration(lengths.worst), configuration(lengths.typical)
    return Forecast(worst, typical, predict(worst), min(sizes, default=None))


def forecast_or_reason(job: Job, world_size: int, *, force: bool) -> tuple[Forecast | None, list[str]]:
    """Forecast a job and refuse it if it cannot fit.

    Args:
        job: The checked job.
        world_size: Number of ranks.
        force: Try it nevertheless.

    Returns:
        The forecast, None if no prediction covers the job; and lines for people.

    Raises:
        UserError: Even with the largest error of the measured runs, the job needs more than the smallest GPU has.
    """
    try:
        found = forecast(job, world_size)
    except UserError as error:
        return None, [f"GPU memory: not predicted: {error}"]
    if found.gpu_bytes is None or found.least <= found.gpu_bytes:
        return found, found.lines()
    line = (
        f"this job cannot fit: {found.prediction.total / GIB:.1f} GiB predicted, at least {found.least / GIB:.1f}, and "
        f"the smallest GPU has {found.gpu_bytes / GIB:.1f} GiB; needed for {found.items}; "
        f"{what_would_fit(found.worst, found.gpu_bytes)}"
    )
    if not force:
        raise UserError(f"{line}; --force tries it nevertheless")
    return found, [*found.lines(), f"warning: {line}"]


def what_would_fit(asked: Configuration, gpu_bytes: int) -> str:
    """Name changes that make a configuration fit, the cheapest first: checkpointing, fewer rows, another strategy.

    Args:
        asked: The job.
        gpu_bytes: Memory of the smallest GPU.

    Returns:
        One clause for people.
    """
    remedies = _remedies(asked, gpu_bytes)
    return f"what would fit: {', or '.join(remedies)}" if remedies else "nothing would fit here"


def _remedies(asked: Configuration, gpu_bytes: int) -> list[str]:
    remedies = []
    lean = replace(asked, checkpointing=True)
    if not asked.checkpointing and (fit := fits(lean, gpu_bytes)):
        remedies.append(f"gradient_checkpointing: true ({fit.needed / GIB:.1f} GiB)")
    rows = asked.micro_batch_size
    while rows > 1:
        rows //= 2
        if fit := fits(replace(asked, micro_batch_size=rows), gpu_bytes):
            steps = -(-asked.micro_batch_size * asked.gradient_accumulation_steps // rows)
            remedies.append(
                f"per_device_train_batch_size: {rows} with gradient_accumulation_steps: {steps} "
                f"({fit.needed / GIB:.1f} GiB)"
            )
            break
    best = sort_strategies(asked, asked.strategy.world_size, gpu_bytes)[0]
    if best.fit and not (remedies and best.configuration.strategy.kind == asked.strategy.kind):
        remedies.append(f"{label(best.configuration)} ({best.fit.needed / GIB:.1f} GiB)")
    return remedies
