"""Measurements of the 6B fine-tune as a table and as parts of a bar: what the README and chapter 14 show.

python -m helpers.finetune.results        writes the table into README.md, between its markers
"""

import json
from pathlib import Path
from typing import Any

from helpers.errors import UserError, exit_with_one_line
from helpers.files import replacing
from helpers.memory.timeline import GIB

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results" / "finetune_6b.json"
BEGIN, END = "<!-- results: finetune_6b -->", "<!-- end of results -->"
# Per trained parameter: fp32 weight, gradient, and Adam's two moments.
TRAINED_BYTES = 16


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """What tests/benchmarks/finetune_6b.py wrote. Raises UserError where there is nothing."""
    if not path.is_file():
        raise UserError(
            f"no measurements in {path}; tests/benchmarks/finetune_6b.py writes them on a machine with GPUs"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def memory_parts(run: dict[str, Any]) -> dict[str, float]:
    """GiB of one run's fullest GPU, by what holds them; they add up to NVML's peak less what was used before.

    The first three are computed (2 bytes a frozen parameter, partitioned by ZeRO-3; 16 a trained one; ZeRO-2's buckets
    at the size in its file), the rest is what torch's allocator and NVML counted beyond them.
    """
    gpu = max(range(len(run["nvml_peak_gib"])), key=lambda i: run["nvml_peak_gib"][i])
    allocated, reserved = run["torch_allocated_gib"][gpu], run["torch_reserved_gib"][gpu]
    used = run["nvml_peak_gib"][gpu] - run["nvml_before_gib"][gpu]
    weights = 2 * run["frozen_parameters"] / GIB / (run["ranks"] if run["zero_stage"] == 3 else 1)
    adapter = TRAINED_BYTES * run["trainable_parameters"] / GIB
    buckets = run["bucket_bytes"] / GIB
    return {
        "parameters": weights,
        "optimizer states": adapter,
        "communication buffers": buckets,
        "activations": allocated - weights - adapter - buckets,
        "allocator cache": reserved - allocated,
        "CUDA context and NCCL": used - reserved,
    }


def markdown_table(results: dict[str, Any]) -> str:
    """One row per run: speed, NVML's peak, torch's peaks (of the fullest GPU)."""
    gpus = results["machine"]["gpus"]
    lines = [
        "| LoRA, r = 8, 4 rows a GPU | GPUs | tokens/s per GPU | seconds a step | NVML peak, GiB | torch reserved, GiB "
        "| torch allocated, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, run in results["runs"].items():
        used = max(p - b for p, b in zip(run["nvml_peak_gib"], run["nvml_before_gib"], strict=True))
        slowest, fastest = run["tokens_per_second_per_gpu_range"]
        lines.append(
            f"| {label} | {run['ranks']} | {run['tokens_per_second_per_gpu']:,.0f} ({slowest:,.0f} to {fastest:,.0f}) "
            f"| {run['step_seconds']:.2f} "
            f"| {used:.2f} | {max(run['torch_reserved_gib']):.2f} | {max(run['torch_allocated_gib']):.2f} |"
        )
    versions = results["machine"]["versions"]
    weights = "random weights of the full size" if results["random_weights"] else "the published weights"
    lines.append("")
    lines.append(
        f"{len(gpus)} x {gpus[0]['name']}, {weights}, rows of {results['mean_tokens']:.0f} tokens in the mean; torch "
        f"{versions['torch']}, transformers {versions['transformers']}, deepspeed {versions['deepspeed']}. Padding is "
        "not counted as tokens. Speeds are medians over the intervals of a run (slowest to fastest): where two ranges "
        "overlap, nothing is said about which is faster. NVML's peak is without what the GPU used before."
    )
    if all(run["ranks"] == 1 for run in results["runs"].values()):
        lines[-1] += " With one rank there is nobody to share with: DDP sends nothing, and ZeRO partitions nothing."
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """``text`` with ``table`` between its markers. Raises UserError where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"README.md has no place for the table; put {BEGIN} and {END} where it belongs")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    readme = ROOT / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), markdown_table(read_results()))
    with replacing(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    exit_with_one_line(main)
