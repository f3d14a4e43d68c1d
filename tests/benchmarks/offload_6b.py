"""All parameters of ChatGLM3-6B's full size trained with the optimizer in host memory, on every GPU of this machine.

    python tests/benchmarks/offload_6b.py [--results notebooks/results/offload_6b.json] [--only TEXT]
    python tests/benchmarks/offload_6b.py --tiny --results FILE      a small network on two CPU ranks: does it run?

Three settings: DeepSpeed ZeRO-3 with the files in configs/, once as fast as 24 GiB per GPU allow and once in as little
GPU memory as possible, and helpers.parallel.offload within 24 GiB. Random weights, random tokens, bf16, checkpointing,
a chunked loss. On two GPUs it needs about 180 GiB of host memory and four minutes, and a minute more if DeepSpeed's CPU
Adam has not been built yet.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.activations.chunked_loss import chunked_cross_entropy
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.hardware import describe_machine
from helpers.launch import RankError, device, environment, run
from helpers.memory.phases import phase
from helpers.memory.predict import ModelShape
from helpers.memory.units import GIB
from helpers.parallel.network import TINY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "notebooks" / "results" / "offload_6b.json"
TIMEOUT_SECONDS = 170
ALLOCATOR = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
# NVML's reading includes NCCL's buffers: use fewer channels, with smaller buffers.
SMALL_NCCL = {"NCCL_BUFFSIZE": "1048576", "NCCL_MAX_NCHANNELS": "4"}
# What a GPU holds outside torch's allocator: 1.9 GiB measured on two H100s, plus a margin.
CONTEXT_AND_NCCL = int(2.25 * GIB)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run. The field names are keys of the results file.

    Attributes:
        deepspeed: A file of configs/; None uses helpers.parallel.offload.
        rows: Sequences per micro-batch on one rank.
        length: Tokens per sequence.
        accumulation: Micro-batches per optimizer step.
        chunk: Tokens whose logits exist at the same time.
        budget_bytes: Limit on a GPU's memory, including what is outside torch's allocator.
        norm_buffer: Elements of a gradient that DeepSpeed converts to fp64 at a time, for its norm.
        environment: Environment variables of the ranks.
        steps: Optimizer steps.
    """

    deepspeed: str | None
    rows: int
    length: int
    accumulation: int
    chunk: int
    budget_bytes: int | None = None
    norm_buffer: int | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 3

    @property
    def tokens(self) -> int:
        """Tokens per rank and step."""
        return self.rows * self.length * self.accumulation


SETTINGS = {
    "24 GiB budget": Setting("ds_zero_3_offload_full.json", 8, 2048, 4, chunk=1024, budget_bytes=24 * GIB),
    "least memory": Setting(
        "ds_zero_3_offload_least_memory.json", 1, 1024, 8, chunk=256, norm_buffer=4_000_000, environment=SMALL_NCCL
    ),
    "24 GiB budget, by hand": Setting(None, 4, 2048, 8, chunk=1024, budget_bytes=24 * GIB),
}


class Head(nn.Module):
    """Put the output layer and the loss into one module, so that ZeRO-3 gathers the weight around both."""

    def __init__(self, weight: nn.Parameter, chunk: int) -> None:
        super().__init__()
        self.weight = weight
        self.chunk = chunk

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the mean loss of predicting each next token of ``ids`` [sequences, tokens]."""
        flat = hidden[:, :-1].flatten(0, 1)  # [targets, width]
        every = torch.arange(len(flat), device=flat.device)  # no position is ignored
        return chunked_cross_entropy(flat, self.weight, ids[:, 1:].flatten(), self.chunk, every)


class WithLoss(nn.Module):
    """Make a Glm network return its loss."""

    def __init__(self, network: nn.Module, chunk: int) -> None:
        super().__init__()
        self.layers = network.model
        self.head = Head(network.lm_head.weight, chunk)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean loss of ``ids`` [sequences, tokens]."""
        return self.head(self.layers(input_ids=ids, use_cache=False).last_hidden_state, ids)


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """Read the setting's file, with a value for every "auto"."""
    from helpers.config.deepspeed import fill_auto

    content = json.loads((CONFIGS / setting.deepspeed).read_text(encoding="utf-8"))
    filled = fill_auto(
        content,
        micro_batch_size=setting.rows,
        world_size=dist.get_world_size(),
        precision="bf16",
        gradient_accumulation_steps=setting.accumulation,
    )
    return filled | {"zero_force_ds_cpu_optimizer": False}


def build(shape: ModelShape, setting: Setting) -> nn.Module:
    """Build the network with random weights on this rank's device, or partitioned if ZeRO-3 is active."""
    from helpers.memory.predict.build import build_base_model

    # The checkpointing switch is the model's own; its name differs between transformers' versions.
    network = build_base_model(shape, torch.bfloat16, device())
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return WithLoss(network, setting.chunk).train()


def host_adam(parameters: Iterator[nn.Parameter], prefer_deepspeed: bool) -> torch.optim.Optimizer:
    """Create DeepSpeed's CPU Adam if it can be built, otherwise torch's fused one, which works on the CPU as well."""
    parameters = list(parameters)
    if prefer_deepspeed:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(parameters, lr=1e-5, adamw_mode=True)
        except Exception as error:  # a compiler's, a missing header's, a loader's
            if dist.get_rank() == 0:
                print(f"DeepSpeed's CPU Adam cannot be used ({type(error).__name__}); torch's fused Adam instead")
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def with_deepspeed(shape: ModelShape, setting: Setting, prefer_deepspeed: bool) -> tuple[Any, Any, str]:
    """Return the model, the engine (backward and step) and the name of the optimizer's class."""
    from helpers.libraries.deepspeed import configure_deepspeed

    configure_deepspeed(device())
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = deepspeed_config(setting)
    if setting.norm_buffer:  # no file can set it; the default makes an fp64 copy of the whole embedding's gradient
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        DeepSpeedZeroOptimizer_Stage3._constant_buffered_norm2.__defaults__ = (setting.norm_buffer,)
    alive = HfDeepSpeedConfig(config)  # transformers partitions what it makes as long as this object lives
    model = build(shape, setting)
    del alive
    print_progress("partitioned")
    optimizer = host_adam(model.parameters(), prefer_deepspeed)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    return engine, engine, type(optimizer).__name__


class ByHand:
    """Give helpers.parallel.offload the engine's two methods."""

    def __init__(self, model: nn.Module, accumulation: int) -> None:
        from helpers.parallel.offload import OffloadedAdamW

        self._optimizer = OffloadedAdamW(model, lr=1e-5)
        self._accumulation = accumulation
        self._micro_batches = 0

    def backward(self, loss: Tensor) -> None:
        """Accumulate this micro-batch's gradients on the host."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """Update after the last micro-batch; do nothing before."""
        self._micro_batches += 1
        if self._micro_batches % self._accumulation == 0:
            self._optimizer.step()


def pin_to_cores() -> None:
    """Restrict this rank to its share of the CPU cores, so that its host memory is close to its threads."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // dist.get_world_size()
    if share:
        os.sched_setaffinity(0, cores[dist.get_rank() * share : (dist.get_rank() + 1) * share])


def print_progress(text: str) -> None:
    """Print a line on rank 0, with the time and the host memory in use."""
    if dist.get_rank() == 0:
        print(f"{time.strftime('%H:%M:%S')} {text}, host {host_bytes() / GIB:.0f} GiB", flush=True)


def host_bytes() -> int:
    """Return the host memory in use by this machine or container; a container's count includes its file cache."""
    counter = Path("/sys/fs/cgroup/memory.current")
    return int(counter.read_text()) if counter.is_file() else psutil.virtual_memory().used


def now() -> float:
    """Return the time in seconds, after the device has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(shape: ModelShape, settings: dict[str, Any], prefer_deepspeed: bool) -> dict[str, Any]:
    """Train a few steps on this rank; return losses, the seconds of each step's parts, and peaks of memory."""
    setting = Setting(**settings)
    pin_to_cores()
    host_before = host_bytes()
    rank_device = device()
    if setting.budget_bytes and rank_device.type == "cuda":
        total = torch.cuda.get_device_properties(rank_device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (setting.budget_bytes - CONTEXT_AND_NCCL) / total))
    torch.manual_seed(0)
    begin = now()
    with phase("load"):
        if setting.deepspeed:
            model, engine, adam = with_deepspeed(shape, setting, prefer_deepspeed)
        else:
            model = build(shape, setting)
            engine, adam = ByHand(model, setting.accumulation), "AdamW"
    loading = now() - begin
    print_progress(f"ready after {loading:.0f} s, {adam}, {torch.get_num_threads()} threads per rank")
    steps, losses, host_peak = [], [], 0
    generator = torch.Generator().manual_seed(dist.get_rank())
    for number in range(setting.steps):
        seconds = {"forward": 0.0, "backward": 0.0, "step": 0.0}
        for _ in range(setting.accumulation):
            ids = torch.randint(1, shape.vocab, (setting.rows, setting.length), generator=generator).to(rank_device)
            timestamps = [now()]
            with phase("forward"):
                loss = model(ids)
            timestamps.append(now())
            with phase("backward"):
                engine.backward(loss)
            timestamps.append(now())
            with phase("step"):
                engine.step()
            timestamps.append(now())
            for part, earlier, later in zip(seconds, timestamps, timestamps[1:], strict=False):
                seconds[part] += later - earlier
        losses.append(loss.item())
        del loss
        host_peak = max(host_peak, host_bytes())
        steps.append(seconds)
        speed = setting.tokens / sum(seconds.values())
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print_progress(
            f"step {number + 1} of {setting.steps}: {speed:,.0f} tokens/s per GPU, loss {losses[-1]:.2f}, {parts}"
        )
    on_gpu = rank_device.type == "cuda"
    return {
        "adam": adam,
        "threads": torch.get_num_threads(),
        "loading_seconds": loading,
        "losses": losses,
        "steps": steps,
        "host_bytes": host_peak - host_before,
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else None,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] if on_gpu else None,
    }


def summary(setting: Setting, outcome: list[dict[str, Any]], nvml: list[int | None]) -> dict[str, Any]:
    """Summarise a run: peaks over the whole run, loading included; speed without the first step, which warms up."""
    first = outcome[0]
    steady = first["steps"][1:] or first["steps"]
    seconds = [sum(step.values()) for step in steady]
    return {
        "setting": dataclasses.asdict(setting),
        "tokens_per_gpu_and_step": setting.tokens,
        "tokens_per_second_per_gpu": setting.tokens / median(seconds),
        "seconds": {part: median(step[part] for step in steady) for part in steady[0]},
        "step_seconds": median(seconds),
        "nvml_peak": nvml,
        "host_bytes": max(rank["host_bytes"] for rank in outcome),
        "ranks": outcome,
    }


def measure(shape: ModelShape, setting: Setting, ranks: int, prefer_deepspeed: bool) -> dict[str, Any]:
    """Run one setting; if a rank fails, the entry has its error under "failed"."""
    threads = {"OMP_NUM_THREADS": str(max(1, describe_machine().cpu_cores // ranks))}
    with environment(ALLOCATOR | threads | setting.environment):
        try:
            result = run(
                train,
                ranks,
                timeout=TIMEOUT_SECONDS,
                shape=shape,
                settings=dataclasses.asdict(setting),
                prefer_deepspeed=prefer_deepspeed,
            )
        except RankError as error:
            return {"setting": dataclasses.asdict(setting), "failed": str(error)}
    return summary(setting, result.results, [rank.nvml for rank in result.memory.ranks])


def build_adam() -> tuple[str, float]:
    """Compile DeepSpeed's CPU Adam once, in one rank; return the class that works, and the seconds it took."""
    import deepspeed

    from helpers.libraries.deepspeed import skip_cpu_collectives

    begin = time.perf_counter()
    skip_cpu_collectives()
    deepspeed.utils.logger.setLevel("ERROR")
    adam = host_adam(iter([nn.Parameter(torch.zeros(8))]), prefer_deepspeed=True)
    name, seconds = type(adam).__name__, time.perf_counter() - begin
    print(f"{name} is ready after {seconds:.0f} s", flush=True)
    return name, seconds


def line(name: str, entry: dict[str, Any]) -> str:
    """Format one setting for the terminal."""
    if "failed" in entry:
        return f"{name:24} failed: {entry['failed'].strip().splitlines()[-1]}"
    peaks = [peak for peak in entry["nvml_peak"] if peak is not None]
    nvml = f"{max(peaks) / GIB:.2f} GiB" if peaks else "not available"
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in entry["seconds"].items())
    return (
        f"{name:24} NVML peak {nvml}, {entry['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, "
        f"{entry['step_seconds']:.2f} s per step ({parts}), host {entry['host_bytes'] / GIB:.1f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--adam", choices=["deepspeed", "torch"], default="deepspeed")
    parser.add_argument("--tiny", action="store_true", help="a small network on two CPU ranks, two short steps")
    arguments = parser.parse_args()
    machine = describe_machine()
    if arguments.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        machine = describe_machine()
    elif not machine.gpus:
        raise UserError("no GPU here; this measures the 6B model on GPUs (--tiny shows on a CPU that it runs)")
    shape, ranks = (TINY, 2) if arguments.tiny else (ModelShape(), len(machine.gpus))
    chosen = {name: setting for name, setting in SETTINGS.items() if arguments.only in name}
    if not chosen:
        raise UserError(f"--only {arguments.only}: no such setting; there are {', '.join(SETTINGS)}")
    prefer_deepspeed = arguments.adam == "deepspeed"
    content: dict[str, Any] = {"machine": dataclasses.asdict(machine), "parameters": shape.parameters, "settings": {}}
    if prefer_deepspeed:
        adam, content["adam_build_seconds"] = run(build_adam, 1, timeout=TIMEOUT_SECONDS).results[0]
        prefer_deepspeed = adam == "DeepSpeedCPUAdam"
    for name, setting in chosen.items():
        if arguments.tiny:
            setting = dataclasses.replace(setting, rows=2, length=32, accumulation=2, chunk=24, steps=2)
        print(f"{name}: {setting.tokens:,} tokens per GPU and step", flush=True)
        content["settings"][name] = measure(shape, setting, ranks, prefer_deepspeed)
        print(line(name, content["settings"][name]), flush=True)
        with atomic_write(arguments.results) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, entry in content["settings"].items() if "failed" in entry]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    exit_with_one_line(main)
