"""Read the committed runs on GPUs: the predicted and the measured memory of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers.files import read_json_object

# The first that exists counts. Of the second, what was added when the formulas were finished and never used for them:
FILES = ("prediction_validation.json", "prediction.json")
ADDED_LATER = ("LoRA, 16-bit weights, one long row", "6B LoRA, ZeRO-2, published buckets")
# What traced.py said about the drawn configurations.
TRACES = "prediction_traced.json"


@dataclass(frozen=True)
class ValidatedRun:
    """One configuration, predicted and measured, in bytes of the fullest GPU.

    Attributes:
        name: Its settings, in words.
        ranks: Number of GPUs.
        held_out: Whether no constant and no formula was fitted to it.
        predicted: The prediction.
        measured: NVML's peak, without what was in use before.
        item_errors: Predicted minus measured bytes, for each item that has a measurement of its own.
        traced: The prediction with a simulated allocator (traced.py); None if the run cannot be traced.
    """

    name: str
    ranks: int
    held_out: bool
    predicted: int
    measured: int
    item_errors: Mapping[str, int]
    traced: int | None = None

    @property
    def error_percent(self) -> float:
        """The prediction's error in percent of the measurement; above 0 it is too high."""
        return 100 * (self.predicted / self.measured - 1)

    @property
    def traced_error_percent(self) -> float | None:
        """The error with a simulated allocator, in the same way; None if there is none."""
        return None if self.traced is None else 100 * (self.traced / self.measured - 1)

    @property
    def worst_item(self) -> str:
        """The item with the largest error."""
        return max(self.item_errors, key=lambda item: abs(self.item_errors[item]))


def read_validation(folder: Path) -> list[ValidatedRun]:
    """Read the committed runs.

    Args:
        folder: notebooks/results.

    Returns:
        The runs of the validation on one and two GPUs. If its file is missing, those of prediction.json, with
        expandable segments. Runs that failed are left out.

    Raises:
        UserError: The results file is missing.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[-1])
    content = read_json_object(path, f"no measurements in {path}; tests/benchmarks/prediction.py writes them")
    runs, traces = [], _read_traces(folder)
    for name, entry in content["configurations"].items():
        if "failed" in entry or any(rank["nvml"] is None for rank in entry["measured"]):
            continue
        rank = max(entry["measured"], key=lambda found: found["nvml"])
        runs.append(
            ValidatedRun(
                name,
                len(entry["measured"]),
                entry.get("held_out", name in ADDED_LATER),
                entry["predicted_total"],
                rank["nvml"],
                MappingProxyType(item_errors(entry)),
                traces[name] + entry["predicted_total"] - entry["predicted_reserved"] if name in traces else None,
            )
        )
    return runs


def _read_traces(folder: Path) -> dict[str, int]:
    """Read the bytes that the simulated allocator held, by the name of the configuration; none without the file."""
    if not (folder / TRACES).is_file():
        return {}
    content = read_json_object(folder / TRACES, "tests/benchmarks/validate_prediction.py --trace writes it")
    return {name: found["reserved"] for name, found in content["configurations"].items()}


def item_errors(entry: Mapping[str, Any]) -> dict[str, int]:
    """Return predicted less measured bytes of the fullest rank for what can be measured by itself.

    Args:
        entry: A configuration of a results file.

    Returns:
        Bytes by item.
    """
    rank = max(entry["measured"], key=lambda found: found["nvml"])
    predicted = entry["predicted"]
    outside = predicted["CUDA context"] + predicted["NCCL"]
    states = {name: predicted[name] - rank[name] for name in ("parameters", "optimizer states") if name in rank}
    if states and entry["configuration"]["strategy"]["kind"].startswith("zero"):
        # Measured were Adam's two states alone, without the fp32 copy of the weights, which is as large as one of them.
        states["optimizer states"] -= predicted["optimizer states"] // 3
    return states | {
        "all tensors": entry["predicted_allocated"] - rank["allocated"],
        "allocator allowance": predicted["allocator allowance"] - (rank["reserved"] - rank["allocated"]),
        "CUDA context and NCCL": outside - (rank["nvml"] - rank["reserved"]),
    }
