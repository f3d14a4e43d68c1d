"""Say in one line that another rank has gone, where a library reports a broken connection."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.errors import UserError
from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.ranks import Ranks

# gloo's words for a peer whose sockets are gone, and NCCL's.
GONE = re.compile(
    r"Connection (?:reset|closed) by peer|Broken pipe|remote (?:worker|process)|ncclRemoteError|"
    r"NCCL communicator was aborted|Socket (?:closed|Timeout)"
)


def how_to_continue(output_dir: Path) -> str:
    """Return what to do when a rank is lost: resume from the newest complete checkpoint, or start again."""
    kept = complete_checkpoints(output_dir)
    return f"continue from {kept[-1].name} with --resume" if kept else "start again"


@contextmanager
def explained_lost_rank(ranks: Ranks, output_dir: Path) -> Iterator[None]:
    """Turn a broken connection inside the block into one line.

    The rank that has gone knows why, this one does not; so its output, or the kernel's on its host, comes first.

    Args:
        ranks: This process's place.
        output_dir: The run's folder, whose newest checkpoint is named.

    Raises:
        UserError: Another rank has gone.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.store is None or not GONE.search(str(error)):
            raise
        reason = ranks.reported_error() or "another rank has gone without a word (killed, or out of host memory)"
        raise UserError(f"{reason}; {how_to_continue(output_dir)}") from error
