"""Judge an answer on every rank, with inputs that its author has not seen, in one sentence.

A judge is a function decorated with :func:`exercise`. It raises :class:`NotYet` with the sentence that the learner
reads, and returns if the answer is right. It calls the answer through :func:`call`, or in ranks through
:func:`on_ranks`. What the answer raises, and a rank that hangs, then becomes such a sentence as well: a learner never
sees a traceback of this package.
"""

import functools
import inspect
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from helpers.errors import UserError
from helpers.launch import RankError, run

WORLDS = (2, 3, 4)  # numbers of ranks: even, odd, and two pairs
SECONDS = 20.0  # after which ranks that compute for milliseconds count as hung
UNANSWERED = "NotImplementedError"
# A frame of the learner's code in a rank's traceback: the line, and the function.
FRAME = re.compile(r"(?:Cell In\[\d+\]|File \"<(?!frozen)[^\"]*>\"), line (\d+), in (\w+)")

Function = Callable[..., Any]  # what a learner wrote


class NotYet(Exception):
    """The answer is not right yet; the message says in one sentence what differs, without giving the result away."""


class NotAnswered(Exception):
    """The answer is missing: it is None, or its body still raises NotImplementedError."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a judge found.

    Attributes:
        right: Whether the answer is right.
        text: What the learner reads: "right", "not answered yet", or "not yet" with one sentence.
    """

    right: bool
    text: str

    def __repr__(self) -> str:
        """Return the text: a notebook shows it under a cell that ends with a judge."""
        return self.text


def exercise(judge: Callable[..., None]) -> Callable[..., Verdict]:
    """Turn a judge into a function that returns a verdict.

    Args:
        judge: Takes the learner's answer or answers.

    Returns:
        The function to call in the notebook.
    """

    @functools.wraps(judge)
    def verdict(*answers: Any, **named: Any) -> Verdict:
        if any(answer is None for answer in (*answers, *named.values())):
            return Verdict(False, "not answered yet")
        try:
            judge(*answers, **named)
        except NotAnswered:
            return Verdict(False, "not answered yet")
        except NotYet as reason:
            return Verdict(False, f"not yet: {reason}")
        except Exception as error:  # the judge cannot use it, such as a sum instead of a list of parts
            kind = type(error).__name__
            return Verdict(False, f"not yet: it is of another kind than was asked for ({kind}: {error})")
        return Verdict(True, "right")

    return verdict


def call(answer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call the answer in this process.

    Args:
        answer: What the learner wrote.
        arguments: Its arguments.
        named: Its keyword arguments.

    Returns:
        What it returned.

    Raises:
        NotAnswered: It is still blank.
        NotYet: It raised something.
    """
    return attempt(answer, answer, *arguments, **named)


def attempt(answer: Any, trial: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run a trial of the answer in this process.

    Args:
        answer: What the learner wrote: a function, or a class whose methods the trial calls.
        trial: Uses it, and leaves to the judge what is right.
        arguments: The trial's arguments.
        named: Its keyword arguments.

    Returns:
        What the trial returned.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: The answer raised something.
    """
    try:
        with _limited():
            return trial(*arguments, **named)
    except NotImplementedError:
        raise NotAnswered from None
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _file(answer)]
        place = (frames[-1].lineno, frames[-1].name) if frames else None
        raise NotYet(f"it raised {_describe(type(error).__name__, str(error), place)}") from None


@contextmanager
def _limited() -> Iterator[None]:
    """Raise in the block, wherever it is, if it takes too long: an endless loop would hold the notebook.

    Only the main thread can be interrupted; elsewhere the block may take as long as it likes.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"it does not return within {SECONDS:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def on_ranks(trial: Callable[..., Any], nprocs: int, **arguments: Any) -> list[Any]:
    """Run a trial of the answer on ranks of this machine's CPU.

    Args:
        trial: Calls the answer, which is one of its arguments, and returns what is to be judged.
        nprocs: The number of ranks.
        arguments: The trial's keyword arguments.

    Returns:
        What the trial returned, by rank.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: A rank raised, died or hung; or the answer cannot be sent to ranks.
    """
    try:
        return run(trial, nprocs, timeout=SECONDS, on_cpu=True, **arguments).results
    except RankError as error:
        if error.type == UNANSWERED:
            raise NotAnswered from None
        reason = _explain(error)
        raise NotYet(reason if nprocs == 1 else f"with {nprocs} ranks, {reason}") from None
    except UserError as error:
        raise NotYet(str(error)) from None


def agree(fault: str | None) -> str | None:
    """In a rank: find the first rank that found a fault, so that all ranks can end their trial at the same place.

    Args:
        fault: What this rank found; None if all is well so far.

    Returns:
        The rank and its fault, the same on every rank; None without a fault.
    """
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(faults) if found), None)


def without_fault(trial: Callable[..., str | None], nprocs: int, **arguments: Any) -> None:
    """Run a trial on ranks that returns a fault.

    Args:
        trial: Calls the answer, and returns what :func:`agree` found.
        nprocs: The number of ranks.
        arguments: The trial's keyword arguments.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: The trial found a fault; or a rank raised, died or hung.
    """
    if fault := on_ranks(trial, nprocs, **arguments)[0]:
        raise NotYet(f"with {nprocs} ranks, {fault}")


def alone(trial: Callable[..., str | None], **arguments: Any) -> None:
    """Run a trial that returns a fault in a process of its own, where it may replace what the answer calls.

    Args:
        trial: Calls the answer, and returns the fault or None.
        arguments: The trial's keyword arguments.

    Raises:
        NotAnswered: The answer is still blank.
        NotYet: The trial found a fault; or it raised, died or hung.
    """
    if fault := on_ranks(trial, 1, **arguments)[0]:
        raise NotYet(fault)


def _file(answer: Any) -> str | None:
    """Return the file of the learner's code: for a class that of its methods."""
    members = [getattr(answer, name) for name in vars(answer)] if isinstance(answer, type) else [answer]
    codes = (getattr(inspect.unwrap(member), "__code__", None) for member in members if callable(member))
    return next((code.co_filename for code in codes if code), None)


def _explain(error: RankError) -> str:
    """Return one clause for a failed run."""
    headline, *details = str(error).split("\n")
    if error.type is None:
        if error.rank is not None:
            return headline
        waits = [line.split(": ")[0] for line in details if line.startswith("rank ")]
        return f"it does not return: {', '.join(waits)}"
    frames = FRAME.findall("\n".join(details))
    # The line that names the error, with its module if it is not a built-in one.
    message = next((line for line in details if re.match(rf"(\w+\.)*{error.type}\b", line)), error.type)
    return (
        f"rank {error.rank} raised {_describe(error.type, message.partition(': ')[2], frames[-1] if frames else None)}"
    )


def _describe(kind: str, message: str, place: tuple[object, object] | None) -> str:
    """Return the error with the line of the learner's code that it came from, if that is known."""
    first = message.split("\n")[0]
    text = f"{kind}: {first}" if first else kind
    return f"{text} (line {place[0]} of {place[1]})" if place else text
