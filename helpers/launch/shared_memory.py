"""Find and remove shared-memory segments of processes that are killed and cannot remove them on their own.

A segment (NCCL and data loaders use them) is a file in memory. Its name outlives the process that created it, so
after a kill it would occupy host memory until the next reboot.
"""

import os
from collections.abc import Iterable
from pathlib import Path

SEGMENTS = Path("/dev/shm")


def find_segments(process_groups: Iterable[int]) -> set[Path]:
    """Return the named segments that processes of these groups have mapped or open; empty without /proc."""
    groups = set(process_groups)
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) in groups:
                maps = (process / "maps").read_text(encoding="utf-8", errors="surrogateescape")
                mapped = {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
                opened = {os.readlink(link) for link in (process / "fd").iterdir()}
                found |= {Path(name) for name in mapped | opened if name.startswith(f"{SEGMENTS}/")}
        except OSError:  # the process has ended, or belongs to another user
            continue
    return {path for path in found if path.exists()}  # a segment already unlinked reads "name (deleted)"


def remove_segments(segments: Iterable[Path]) -> None:
    """Remove the names; the system frees a segment once no process has it mapped."""
    for path in segments:
        path.unlink(missing_ok=True)
