"""Present the measured trainings of all parameters by the ordinary command, for the README and chapter 14."""

from collections.abc import Mapping
from typing import Any

from helpers.finetune.results import RESULTS, nvml_used, rate_with_range

FULL_RESULTS = RESULTS.with_name("full_6b.json")


def full_table(results: Mapping[str, Any]) -> str:
    """Format the runs as a Markdown table.

    Args:
        results: Contents of ``full_6b.json``.

    Returns:
        The table, and a line on the machine.
    """
    machine, runs = results["machine"], results["runs"]
    trained = next(iter(runs.values()))["trainable_parameters"]
    lines = [
        f"| all {trained / 1e9:.2f} billion parameters | GPUs | tokens per GPU and step "
        "| tokens/s per GPU (slowest to fastest) | NVML peak, GiB per GPU |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        lines.append(
            f"| {name}: `{run['config']}` with `{run['deepspeed']}` | {run['ranks']} "
            f"| {run['tokens_per_gpu_and_step']:,.0f} | {rate_with_range(run)} | {nvml_used(run):.2f} |"
        )
    weights = "random weights of the full size" if results["random_weights"] else "the published weights"
    lines += ["", f"{machine['gpus'][0]['name']}, {weights}, torch {machine['versions']['torch']}."]
    return "\n".join(lines)
