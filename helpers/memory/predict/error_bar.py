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


def error_bar(configuration: Configuration) -> ErrorBar:
    """Look up how good predictions for such a configuration are.

    Args:
        configuration: The job. With the default allocator, fragmentation is harder to predict.

    Returns:
        The largest errors, from notebooks/results/prediction.json and finetune_6b.json.
    """
    if configuration.expandable_segments:
        return ErrorBar(*constants.ERRORS_EXPANDABLE)
    return ErrorBar(*constants.ERRORS_DEFAULT_ALLOCATOR)
