"""Present what fewer bits for the frozen matrices cost and gain: quality on the embedded model, speed on the 6B one.

Chapters 12 and 14 show the same table.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from helpers.finetune.results import nvml_used, rate_with_range
from helpers.memory.table import Table

# Packs of the same size, compiled. The other formats have no configuration that differs only in the format.
CONFIGURATIONS = {"not rounded": "lora_fast.yaml", "fp8": "lora_fp8.yaml"}


def means(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Average the runs of each format over their seeds.

    Args:
        results: Contents of ``fewer_bits.json``.

    Returns:
        Format -> ``dev_loss`` and ``rouge-l`` at the end of the fine-tune, and ``base rouge-l`` before it.
    """
    formats: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"].values():
        formats.setdefault(run["format"], []).append(run)
    return {
        name: {
            "dev_loss": statistics.mean(run["dev_loss"][-1] for run in runs),
            "rouge-l": statistics.mean(run["scores"]["rouge-l"] for run in runs),
            "base rouge-l": statistics.mean(run["base_scores"]["rouge-l"] for run in runs),
        }
        for name, runs in formats.items()
    }


def spread(results: Mapping[str, Any]) -> float:
    """Measure what a seed changes.

    Args:
        results: Contents of ``fewer_bits.json``.

    Returns:
        How far the last dev losses without rounding are apart, as a share of their mean.
    """
    losses = [run["dev_loss"][-1] for run in results["runs"].values() if run["format"] == "not rounded"]
    return (max(losses) - min(losses)) / statistics.mean(losses)


def measured_runs(speed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Find the runs of the 6B model that differ in the format and in hardly anything else.

    Args:
        speed: Contents of ``speed_6b.json``.

    Returns:
        Format -> run, of those that were measured.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, config in CONFIGURATIONS.items():
        for run in speed["runs"].values():
            plain = run["config"] == config and run["ranks"] == 1 and not run["speed"] and not run["training"]
            if plain and name not in found:
                found[name] = run
    return found


def fewer_bits_table(results: Mapping[str, Any], speed: Mapping[str, Any]) -> Table:
    """List the quality of each format next to its speed.

    Args:
        results: Contents of ``fewer_bits.json``.
        speed: Contents of ``speed_6b.json``. Without a run in fp8, the table has no speeds.

    Returns:
        One line per format. Losses are compared with the first one's.
    """
    by_format, runs = means(results), measured_runs(speed)
    first = next(iter(by_format.values()))["dev_loss"]
    header = ["frozen matrices", "dev loss", "against the first", "ROUGE-L before", "and after"]
    rows = [
        [
            name,
            f"{mean['dev_loss']:.4f}",
            f"{mean['dev_loss'] / first - 1:+.2%}",
            f"{mean['base rouge-l']:.1f}",
            f"{mean['rouge-l']:.1f}",
        ]
        for name, mean in by_format.items()
    ]
    if "fp8" in runs:
        header += ["6B: tokens/s (slowest to fastest)", "NVML peak, GiB"]
        for row in rows:
            run = runs.get(row[0])
            row += [rate_with_range(run), f"{nvml_used(run):.2f}"] if run else ["not measured", ""]
    return Table(header, rows)
