"""The checkpoints that a run has finished, and what their base was held in."""

import json
from pathlib import Path

from helpers.errors import UserError
from helpers.files import read_json_object

# Written last by transformers: a checkpoint without it was not finished.
LAST_FILE = "trainer_state.json"
# Beside the adapter, which is right for this base only: PEFT's own file has no place for it.
QUANTIZATION_FILE = "quantization.json"


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The finished ``checkpoint-N`` folders of a run, by N."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit() and (p / LAST_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def write_quantization_bit(checkpoint: Path, bits: int | None) -> None:
    """Note in ``checkpoint`` that its adapter was trained on a base in 8 or 4 bits; None writes nothing."""
    if bits is not None:
        (checkpoint / QUANTIZATION_FILE).write_text(json.dumps({"quantization_bit": bits}) + "\n", encoding="utf-8")


def read_quantization_bit(checkpoint: Path) -> int | None:
    """What the adapter's base was held in while it was trained: 8, 4, or None. Raises UserError for anything else."""
    path = checkpoint / QUANTIZATION_FILE
    if not path.is_file():
        return None
    bits = read_json_object(path, f"no file {path}").get("quantization_bit")
    if bits not in (8, 4):
        raise UserError(f"{path}: quantization_bit is {bits!r} and must be 8 or 4; without the file the base is 16 bit")
    return bits
