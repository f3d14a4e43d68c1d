"""Measure what a launch costs: the rank server against torchrun, and the NVML sampler against a training step.

    python tests/benchmarks/launch.py [--results notebooks/results/launch.json]

Everything that is compared is measured in this one run: the launch on a machine without a GPU, the sampler on a
machine with one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.errors import exit_with_one_line
from helpers.files import atomic_write
from helpers.hardware import backend_for, default_nprocs, describe_machine
from helpers.launch import device, run
from helpers.memory.nvml import open_nvml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results" / "launch.json"
STEPS, CPU_RANKS, LAUNCHES = 21, 8, 10
PAIRS, BLOCK_STEPS = 30, 200


def train(steps: int = STEPS) -> float:
    """A small DDP training on this rank's device; returns the last loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)).to(device())
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(32, 64, device=device())
    for _ in range(steps):
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def from_torchrun() -> None:
    """Run the same function in one rank of torchrun."""
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()


def against_torchrun() -> dict[str, float]:
    """Time the same training on eight gloo ranks, by the rank server and by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={CPU_RANKS}"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    subprocess.run([*command, __file__, "--torchrun"], check=True, env=environ)
    torchrun = time.perf_counter() - begin
    begin = time.perf_counter()
    run(train, CPU_RANKS)
    ours = time.perf_counter() - begin
    return {"torchrun_seconds": torchrun, "run_seconds": ours, "times_faster": torchrun / ours}


def start_seconds(nprocs: int) -> list[float]:
    """Time several launches until all ranks have used their process group; return the seconds."""
    found = []
    for _ in range(LAUNCHES):
        result = run(lambda: dist.all_reduce(torch.ones(1, device=device())) or None, nprocs)
        found.append(result.start_seconds + result.seconds)
    return found


# Samples from one line of input to the next, in its own process, as run() does.
SAMPLE_ON_DEMAND = """
import sys
from helpers.memory.sampler import Sampler
while sys.stdin.readline():
    with Sampler():
        print(flush=True)
        sys.stdin.readline()
    print(flush=True)
"""


def sampler_cost() -> dict[str, float]:
    """Compare steps with and without another process sampling NVML at 100 Hz, in alternating blocks."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, device="cuda") for _ in range(8)))
    x = torch.randn(512, 2048, device="cuda")

    def block() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(BLOCK_STEPS):
            model(x).pow(2).mean().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    process = subprocess.Popen(
        [sys.executable, "-c", SAMPLE_ON_DEMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )

    def toggle() -> None:
        print(file=process.stdin, flush=True)
        process.stdout.readline()

    block()
    ratios = []
    for _ in range(PAIRS):
        without = block()
        toggle()
        sampled = block()
        toggle()
        ratios.append(sampled / without)
    process.stdin.close()
    process.wait()
    nvml = open_nvml()
    gpu = nvml.visible()[0]
    begin = time.perf_counter()
    for _ in range(1000):
        nvml.memory(gpu)
    reading = (time.perf_counter() - begin) / 1000
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "step_seconds": without / BLOCK_STEPS,
        "reading_seconds": reading,
        "step_ratio_median": quartiles[1],
        "step_ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--torchrun", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torchrun:
        return from_torchrun()
    machine = describe_machine()
    run(train, 1, steps=1)  # the first launch starts the server
    content: dict[str, Any] = {"machine": asdict(machine)}
    if not machine.gpus:
        content["against_torchrun"] = against_torchrun()
    for nprocs in {default_nprocs(machine), len(machine.gpus) + 2}:
        seconds = start_seconds(nprocs)
        key = f"start_{backend_for(nprocs, machine)}_{nprocs}_ranks_seconds"
        content[key] = {"median": statistics.median(seconds), "slowest": max(seconds)}
    if machine.gpus:
        content["sampler"] = sampler_cost()
    with atomic_write(arguments.results) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in content.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    exit_with_one_line(main)
