"""Shared-memory segments of processes that are about to be killed, which then cannot remove them."""

import os
from collections.abc import Iterable
from pathlib import Path

SEGMENTS = Path("/dev/shm")


def segments_of(process_groups: Iterable[int]) -> set[Path]:
    """The named segments that processes of these groups have mapped or open; empty where there is no /proc."""
    groups = set(process_groups)
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) in groups:
                mapped = {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()}
                opened = {os.readlink(link) for link in (process / "fd").iterdir()}
                found |= {Path(name) for name in mapped | opened if name.startswith(f"{SEGMENTS}/")}
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    return {path for path in found if path.exists()}  # those that were unlinked already read "name (deleted)"


def remove(segments: Iterable[Path]) -> None:
    """Remove the names; a segment goes with the last process that has it mapped."""
    for path in segments:
        path.unlink(missing_ok=True)
