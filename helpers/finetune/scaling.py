"""Present how the course's techniques and the 6B job scale over GPUs, for the job's handbook."""

from collections.abc import Mapping
from typing import Any

from helpers.errors import UserError
from helpers.finetune.results import RESULTS, nvml_used, rate_with_range
from helpers.plots import CourseFigure, scaling

SCALING_RESULTS = RESULTS.with_name("scaling.json")
# MiB per GPU that ChatGLM3's authors state for full fine-tuning on four GPUs.
PUBLISHED_FULL_MIB = 48346


def _measured(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {label: run for label, run in results["job"].items() if "failed" not in run}


def scaling_table(results: Mapping[str, Any]) -> str:
    """Format the job's runs as a Markdown table.

    Args:
        results: Contents of ``scaling.json``.

    Returns:
        The table, and a line on the machine; a line that says so if the job has not been measured.
    """
    runs = _measured(results)
    if not runs:
        return "Not measured yet: `tests/benchmarks/scaling.py --part job` does it."
    first = {run["name"]: run for run in sorted(runs.values(), key=lambda run: -run["ranks"])}
    lines = [
        "| | GPUs | tokens/s per GPU (slowest to fastest) | of its rate on the fewest GPUs "
        f"| share of a matmul's {results['product_tflops']:.0f} TFLOP/s | NVML peak, GiB per GPU |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs.values():
        kept = run["tokens_per_second_per_gpu"] / first[run["name"]]["tokens_per_second_per_gpu"]
        lines.append(
            f"| {run['name']} | {run['ranks']} | {rate_with_range(run)} | {kept:.0%} "
            f"| {run['share_of_product_rate']:.0%} | {nvml_used(run):.2f} |"
        )
    gpus, versions = results["machine"]["gpus"], results["machine"]["versions"]
    weights = "random weights of the full size" if results["random_weights"] else "the published weights"
    lines += ["", f"{len(gpus)} x {gpus[0]['name']}, {weights}, torch {versions['torch']}."]
    published = [run for run in runs.values() if run["ranks"] == 4 and "published" in run["name"]]
    if published:
        used = 1024 * nvml_used(published[0])
        lines.append(f"ChatGLM3's authors state {PUBLISHED_FULL_MIB:,} MiB on each of four GPUs; here {used:,.0f}.")
    return "\n".join(lines)


def scaling_figure(results: Mapping[str, Any]) -> CourseFigure:
    """Draw the job's speed and memory per GPU over the number of GPUs.

    Args:
        results: Contents of ``scaling.json``.

    Returns:
        The figure.

    Raises:
        UserError: The job has not been measured.
    """
    runs = _measured(results)
    if not runs:
        raise UserError("no run of the job in scaling.json; tests/benchmarks/scaling.py --part job makes them")
    rates: dict[str, dict[int, float]] = {}
    memory: dict[str, dict[int, float]] = {}
    for run in sorted(runs.values(), key=lambda run: run["ranks"]):
        rates.setdefault(run["name"], {})[run["ranks"]] = run["tokens_per_second_per_gpu"]
        memory.setdefault(run["name"], {})[run["ranks"]] = nvml_used(run)
    return scaling(rates, memory, "ChatGLM3-6B, the same number of tokens per step on every number of GPUs")
