"""What ranks tell each other of themselves, and when it means that one waits for another in vain."""

from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import transformers

from helpers.finetune import ranks

LONGEST_BEAT = 5.0  # whoever was stopped itself (Ctrl-Z, a suspended machine) has waited for nobody meanwhile
POLLS = Path(ranks.__file__)  # ranks look there again and again whether another has arrived
PACKAGES = (Path(__file__).parents[1], Path(transformers.__file__).parent)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself: a running number, its host, step and line, and whether it has finished."""

    number: int
    host: str
    step: int
    where: str
    stack: int
    done: bool = False


class Judge:
    """Decide from the ranks' beats whether this rank waits in vain; its time passes only by :meth:`pass_time`."""

    def __init__(self, rank: int, world_size: int, limit: float) -> None:
        self.rank, self.limit = rank, limit
        self.now = self.answered = 0.0
        self.beats: list[Beat | None] = [None] * world_size
        self.heard, self.moved = [0.0] * world_size, [0.0] * world_size

    def pass_time(self, seconds: float) -> None:
        """Let time pass, at most ``LONGEST_BEAT`` and half of the limit: this rank may not have listened meanwhile."""
        self.now += min(seconds, LONGEST_BEAT, self.limit / 2)

    def hear(self, rank: int, beat: Beat) -> None:
        """Note the newest beat of a rank, which may be the one that is known."""
        last = self.beats[rank]
        if last is None or beat.number != last.number:
            self.heard[rank] = self.now
        if last is None or (beat.step, beat.stack) != (last.step, last.stack):
            self.moved[rank] = self.now
        self.beats[rank] = beat

    def verdict(self) -> str | None:
        """Return why this rank waits in vain; None as long as it may be worth it."""
        own = self.beats[self.rank]
        place = f"rank {self.rank} waits {own.where}" if own else f"rank {self.rank} waits"
        if self.now - self.answered > self.limit:
            return f"the job's store, on {self._name(0)}'s host, has not answered for {self.limit:.0f} s; {place}"
        waited = {rank for rank, beat in enumerate(self.beats) if not (beat and beat.done)}
        silent = [rank for rank in waited - {self.rank} if self.answered - self.heard[rank] > self.limit]
        if silent:
            who = ", ".join(self._name(rank) for rank in silent)
            return f"{who}: silent for {self.limit:.0f} s (stopped, or its network has failed); {place}"
        if all(self.beats[rank] and self.answered - self.moved[rank] > self.limit for rank in waited) and waited:
            each = "; ".join(f"{self._name(rank)} {beat.where}" for rank in waited if (beat := self.beats[rank]))
            return f"no rank has moved for {self.limit:.0f} s: {each}"
        return None

    def _name(self, rank: int) -> str:
        beat = self.beats[rank]
        return f"rank {rank} on {beat.host} (last step {beat.step})" if beat else f"rank {rank} (never heard of)"


def where(frame: FrameType | None) -> tuple[str, int]:
    """Return the innermost line of the job or the Trainer in ``frame``, with its collective, and the stack's hash."""
    line, collective, stack = "", "", []
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path == POLLS:  # one place, whichever of its lines a look falls into; the line that waits is further out
            line, collective, stack = "", "", [(name, 0)]
            frame = frame.f_back
            continue
        stack.append((str(path), frame.f_lineno))
        if not collective and path.name == "distributed_c10d.py" and not name.startswith("_"):
            collective = f", in {name}"
        elif not collective and name == "_engine_run_backward":
            collective = ", in a collective of backward"
        package = next((root for root in PACKAGES if path.is_relative_to(root)), None)
        if not line and package:
            line = f"at {path.relative_to(package.parent)}:{frame.f_lineno} ({name})"
        frame = frame.f_back
    return line + collective, hash(tuple(stack))
