"""The checkpoints that a run has finished."""

from pathlib import Path

# Written last by transformers: a checkpoint without it was not finished.
LAST_FILE = "trainer_state.json"


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The finished ``checkpoint-N`` folders of a run, by N."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit() and (p / LAST_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))
