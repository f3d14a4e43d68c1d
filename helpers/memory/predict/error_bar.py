"""Say how far predictions were off in the committed runs, for an error bar."""

from dataclasses import dataclass

from helpers.memory.predict import constants
from helpers.memory.predict.configuration import Configuration


@dataclass(frozen=True)
class ErrorBar:
    """The largest errors of the committed runs, as shares of the prediction.

    Attributes:
        too_low: How much more a run needed than predicted, at most.
        too_high: How much less it needed, at most.
    """

    too_low: float
    too_high: float

    def least(self, predicted: int) -> int:
        """Return the fewest bytes that a run needs for which ``predicted`` were predicted."""
        return int(predicted * (1 - self.too_high))

    def most(self, predicted: int) -> int:
        """Return the most bytes that a run needs for which ``predicted`` were predicted."""
        return int(predicted * (1 + self.too_low))


def error_bar(configuration: Configuration, *, traced: bool = False) -> ErrorBar:
    """Look up how good predictions for such a configuration are.

    Args:
        configuration: The job. With the default allocator, or a prefetch of ZeRO-3, fragmentation is harder to predict.
        traced: Whether the allocator was simulated (traced.py).

    Returns:
        The largest errors, from the runs that constants.py names.
    """
    if traced:
        return ErrorBar(*constants.ERRORS_TRACED)
    c, errors = configuration, constants.ERRORS_DEFAULT_ALLOCATOR
    if c.expandable_segments:
        errors = constants.ERRORS_EXPANDABLE
    too_low, too_high = errors
    if c.strategy.zero_stage == 3 and c.strategy.world_size > 1 and c.strategy.prefetch_bucket_size:
        too_low = max(too_low, constants.PREFETCHED_TOO_LOW)
    if c.strategy.zero_stage == 3 and not c.expandable_segments:
        too_low = max(too_low, constants.ZERO_3_DEFAULT_ALLOCATOR_TOO_LOW)
    if c.lora is None and c.strategy.zero_stage in (1, 2) and c.strategy.offload_optimizer:
        too_low = max(too_low, constants.OFFLOADED_TOO_LOW)
    if c.lora is None and c.strategy.zero_stage == 1:
        too_low = max(too_low, constants.ZERO_1_FULL_TOO_LOW)
    if c.lora is None and c.strategy.zero_stage == 2:
        too_high = max(too_high, constants.ZERO_2_FULL_TOO_HIGH)
    return ErrorBar(too_low, too_high)
