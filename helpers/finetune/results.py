"""Present the measurements of the 6B model, as tables and figures for the README and chapter 14.

Nothing else in this package uses it.
"""

import json
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.memory.phases import Phase
from helpers.memory.timeline import Timeline
from helpers.memory.units import GIB
from helpers.plots import CourseFigure, memory_bars, memory_timeline, rates_and_memory

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results" / "finetune_6b.json"
TIMELINE = RESULTS.with_name("finetune_6b_timeline.json")
SAME_FINETUNE = RESULTS.with_name("same_finetune.json")
FEWER_BITS = RESULTS.with_name("fewer_bits.json")
LOSS_RESULTS = RESULTS.with_name("fp8_losses.json")
SPEED_RESULTS = RESULTS.with_name("speed_6b.json")
OFFLOAD_RESULTS = RESULTS.with_name("offload_6b.json")
# What the README shows of the speed benchmark; chapter 14 shows the rest.
HEADLINES = (
    *("published recipe", "packing", "lora_fast.yaml: packing, compiled layers"),
    "lora_fp8.yaml: frozen matrices in fp8",
)
# GiB: what ChatGLM3's authors state for their recipe, and a common GPU size.
MEMORY_MARKS = {"published: 14,082 MiB": 14082 / 1024, "24 GB": 24.0}
# Per trainable parameter, in fp32: weight, gradient, and Adam's two moments.
TRAINED_BYTES = 16
ADAPTER_WEIGHT_BYTES = 4
# (number of GPUs, GB of each) of the GPU table. GB are GiB here; the driver and a desktop take some of them.
GPU_SIZES = ((1, 8), (1, 12), (1, 16), (1, 24), (2, 24), (1, 80))
USABLE_SHARE = 0.95


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """Read the results of the benchmark in tests/benchmarks that has the same name.

    Args:
        path: The results file.

    Returns:
        Its contents.

    Raises:
        UserError: The file does not exist.
    """
    if not path.is_file():
        raise UserError(
            f"no measurements in {path}; tests/benchmarks/{path.stem}.py writes them on a machine with GPUs"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def memory_parts(run: dict[str, Any]) -> dict[str, float]:
    """Split the memory of a run's fullest GPU by what holds it.

    Parameters are what torch held once the model was loaded (sharded under ZeRO-3, quantised under QLoRA), without the
    adapter. Optimizer states (16 bytes per trainable parameter, its weight and gradient included) and ZeRO-2's buckets
    are computed. The rest is what torch's allocator and NVML measured beyond them: under ZeRO-3 the gathered weights of
    the moment count as activations.

    Args:
        run: One entry of a results file's ``runs``.

    Returns:
        Category -> GiB. The sum is NVML's peak minus what was in use before the run.
    """
    gpu = max(range(len(run["nvml_peak_gib"])), key=lambda i: run["nvml_peak_gib"][i])
    allocated, reserved = run["torch_allocated_gib"][gpu], run["torch_reserved_gib"][gpu]
    used = run["nvml_peak_gib"][gpu] - run["nvml_before_gib"][gpu]
    adapter = TRAINED_BYTES * run["trainable_parameters"] / GIB
    weights = run["loaded_gib"] - ADAPTER_WEIGHT_BYTES * run["trainable_parameters"] / GIB
    buckets = run["bucket_bytes"] / GIB
    return {
        "parameters": weights,
        "optimizer states": adapter,
        "communication buffers": buckets,
        "activations": allocated - weights - adapter - buckets,
        "allocator cache": reserved - allocated,
        "CUDA context and NCCL": used - reserved,
    }


def by_way(results: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Group the runs by the way to train.

    Args:
        results: Contents of ``finetune_6b.json``.

    Returns:
        ``{way: {number of GPUs: run}}``, in the file's order.
    """
    ways: dict[str, dict[int, dict[str, Any]]] = {}
    for run in results["runs"].values():
        ways.setdefault(run["name"], {})[run["ranks"]] = run
    return ways


def rate_with_range(run: dict[str, Any]) -> str:
    """Format a run's tokens per second and GPU.

    Args:
        run: One of a results file.

    Returns:
        The median, and in brackets the slowest and the fastest interval.
    """
    slowest, fastest = run["tokens_per_second_per_gpu_range"]
    return f"{run['tokens_per_second_per_gpu']:,.0f} ({slowest:,.0f} to {fastest:,.0f})"


def _peaks(run: dict[str, Any]) -> str:
    return " / ".join(f"{p - b:.2f}" for p, b in zip(run["nvml_peak_gib"], run["nvml_before_gib"], strict=True))


def markdown_table(results: dict[str, Any]) -> str:
    """Format the runs as a Markdown table: one line per way to train, speed and NVML's peaks per number of GPUs.

    Args:
        results: Contents of ``finetune_6b.json``.

    Returns:
        The table and a paragraph on the machine.
    """
    counts = sorted({run["ranks"] for run in results["runs"].values()})
    heads = [
        head
        for count in counts
        for head in (f"{_gpus(count)}: tokens/s per GPU (slowest to fastest)", "NVML peak of each, GiB")
    ]
    lines = [" | ".join(("| LoRA, r = 8", *heads)) + " |", "|---" * (1 + len(heads)) + "|"]
    for way, runs in by_way(results).items():
        found = [
            text for c in counts for text in ((rate_with_range(runs[c]), _peaks(runs[c])) if c in runs else ("", ""))
        ]
        lines.append(" | ".join((f"| {way}", *found)) + " |")
    lines += ["", _measured_on(results)]
    return "\n".join(lines)


def _measured_on(results: dict[str, Any]) -> str:
    gpus, versions = results["machine"]["gpus"], results["machine"]["versions"]
    weights = "random weights of the full size" if results["random_weights"] else "the published weights"
    return (
        f"{len(gpus)} x {gpus[0]['name']}, {weights}, examples of {results['mean_tokens']:.0f} tokens on average; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, deepspeed {versions['deepspeed']}. "
        "Padding is not counted as tokens. Speeds are medians over the intervals of a run: if two ranges overlap, do "
        "not conclude which is faster. NVML's peaks are without what the GPU used before."
    )


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def gpu_table(results: dict[str, Any]) -> str:
    """Format which measured run is the fastest that fits a GPU of each size, as a Markdown table.

    Args:
        results: Contents of ``finetune_6b.json``, measured on larger GPUs.

    Returns:
        The table, and a paragraph on the machine. A size that no run fits has no line; a second line if a run in fp8
        is the fastest, because not every GPU of that size can multiply in fp8.
    """
    lines = [
        "| your GPUs | the fastest measured run that fits | NVML peak, GiB | tokens/s per GPU (slowest to fastest) |",
        "|---|---|---|---|",
    ]
    for count, size in GPU_SIZES:
        runs = [run for run in results["runs"].values() if run["ranks"] == count]
        fitting = [run for run in runs if nvml_used(run) <= size * USABLE_SHARE]
        gpus = f"{size} GB" if count == 1 else f"{count} x {size} GB"
        everywhere = [run for run in fitting if not run.get("fp8")]  # runs of before have no such key
        for label, those in ((gpus, everywhere), (f"{gpus}, compute capability 8.9 or later", fitting)):
            best = max(those, key=lambda run: run["tokens_per_second_per_gpu"], default=None)
            if best and (those is everywhere or best.get("fp8")):
                lines.append(f"| {label} | {best['name']} | {nvml_used(best):.2f} | {rate_with_range(best)} |")
    return "\n".join([*lines, "", _measured_on(results)])


def _weights(results: dict[str, Any]) -> str:
    return "random weights, full size" if results["random_weights"] else "the published weights"


def memory_figure(results: dict[str, Any]) -> CourseFigure:
    """Draw the memory of each way to train as stacked bars, the numbers of GPUs next to each other.

    Args:
        results: Contents of ``finetune_6b.json``.

    Returns:
        The figure.
    """
    bars = {
        f"{way}, {_gpus(count)}": memory_parts(run)
        for way, runs in by_way(results).items()
        for count, run in sorted(runs.items())
    }
    return memory_bars(bars, f"LoRA on ChatGLM3-6B ({_weights(results)}): memory of the fullest GPU")


def run_figure(path: Path = TIMELINE) -> CourseFigure:
    """Draw the memory of every GPU through one whole run of the benchmark, with its phases.

    Args:
        path: The file that the benchmark wrote.

    Returns:
        The figure.
    """
    content = read_results(path)
    phases = [Phase(**phase) for phase in content["phases"]]
    return memory_timeline(Timeline.load(path), phases, f"LoRA on ChatGLM3-6B with DDP ({_weights(content)})")


def nvml_used(run: dict[str, Any]) -> float:
    """Compute the peak memory of a run's fullest GPU.

    Args:
        run: One entry of a results file's ``runs``.

    Returns:
        GiB by NVML, minus what was in use before the run.
    """
    return max(p - b for p, b in zip(run["nvml_peak_gib"], run["nvml_before_gib"], strict=True))


def speed_table(results: dict[str, Any]) -> str:
    """Format the headline runs that were measured as a Markdown table: speed, share of a matmul's rate, memory.

    Args:
        results: Contents of ``speed_6b.json``.

    Returns:
        The gain that the slowest and fastest intervals leave certain, the table, and a line on the machine.
    """
    runs = {label: results["runs"][label] for label in HEADLINES if label in results["runs"]}
    first, *_, last = (run["tokens_per_second_per_gpu_range"] for run in runs.values())
    machine = results["machine"]
    lines = [
        f"At least {last[0] / first[1]:.0f} times as fast: the slowest interval of the last line against the fastest "
        "of the first.",
        "",
        f"| LoRA, r = 8, examples of {results['mean_tokens']:.0f} tokens | GPUs "
        f"| tokens/s per GPU (slowest to fastest) | share of a matmul's {results['product_tflops']:.0f} TFLOP/s "
        "| NVML peak, GiB |",
        "|---|---|---|---|---|",
    ]
    for label, run in runs.items():
        share = f"{run['share_of_product_rate']:.0%}"
        lines.append(f"| {label} | {run['ranks']} | {rate_with_range(run)} | {share} | {nvml_used(run):.2f} |")
    lines += ["", f"{machine['gpus'][0]['name']}, {_weights(results)}, torch {machine['versions']['torch']}."]
    return "\n".join(lines)


def speed_figure(results: dict[str, Any]) -> CourseFigure:
    """Draw the speed benchmark's runs on one GPU as bars: speed with its range, and memory.

    Args:
        results: Contents of ``speed_6b.json``.

    Returns:
        The figure.
    """
    alone = {label: run for label, run in results["runs"].items() if run["ranks"] == 1}
    return rates_and_memory(
        {r: (v["tokens_per_second_per_gpu"], *v["tokens_per_second_per_gpu_range"]) for r, v in alone.items()},
        {label: nvml_used(run) for label, run in alone.items()},
        MEMORY_MARKS,
        f"LoRA on ChatGLM3-6B ({_weights(results)}), one {results['machine']['gpus'][0]['name']}",
    )


def offload_table(results: dict[str, Any]) -> str:
    """Format the runs that train all parameters with the optimizer in host memory, as a Markdown table.

    Args:
        results: Contents of ``offload_6b.json``.

    Returns:
        The table.
    """
    lines = [
        f"| all {results['parameters'] / 1e9:.2f} billion parameters | tokens per GPU and step | tokens/s per GPU "
        "| NVML peak, GiB per GPU | host memory, GiB in all |",
        "|---|---|---|---|---|",
    ]
    for name, run in results["settings"].items():
        lines.append(
            f"| {name}, `{run['setting']['deepspeed']}` | {run['tokens_per_gpu_and_step']:,} "
            f"| {run['tokens_per_second_per_gpu']:,.0f} | {max(run['nvml_peak']) / GIB:.2f} "
            f"| {run['host_bytes'] / GIB:.0f} |"
        )
    return "\n".join(lines)
