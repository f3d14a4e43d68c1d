"""Show where the time of a step goes on a GPU: kernels, copies, NCCL, and waiting for the host.

    profiles = {"ZeRO-2": profile_step(step, device())}
    profile_table(profiles)

torch.profiler records what the GPU did. Kernels, copies and NCCL overlap on several streams, so their times do not add
up to the step's. Here each instant counts once, for the first kind of :data:`KINDS` that runs at it.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.memory.table import Table

MATMUL, OTHER, COPY, NCCL, IDLE = "matmuls and attention", "other kernels", "copies", "NCCL, not hidden", "idle GPU"
KINDS = (MATMUL, OTHER, COPY, NCCL, IDLE)
# Kernels of cuBLAS (nvjet is its name for Hopper's), CUTLASS, FlashAttention and cuDNN.
MATMUL_NAMES = re.compile("gemm|nvjet|cutlass|xmma|splitk|flash|fmha|sdpa", re.IGNORECASE)
MARKER = "spin_kernel"  # of torch.cuda._sleep
# Categories of events in the trace.
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")

Interval = tuple[float, float]


@dataclass(frozen=True)
class StepProfile:
    """Where the time of one step on one GPU went.

    Attributes:
        seconds: By kind, in the order of ``KINDS``; together they are the step.
        nccl: Seconds in which an NCCL kernel ran, hidden behind other work or not. It runs from the call on this rank,
            so waiting for a slower rank is part of it.
        host_waits: Seconds in which the host waited for the GPU, without the wait at the end of the step.
        operations: Kernels, copies and memory fills.
    """

    seconds: Mapping[str, float]
    nccl: float
    host_waits: float
    operations: int

    @property
    def step(self) -> float:
        """Seconds from the call until the GPU has done its work and the host waits for it."""
        return sum(self.seconds.values())

    def largest_change(self, other: "StepProfile") -> tuple[str, float]:
        """Find the kind of work that contributes most to the difference between two steps.

        Args:
            other: The step to compare with.

        Returns:
            The kind, and its seconds here minus its seconds there.
        """
        changes = {kind: self.seconds[kind] - other.seconds[kind] for kind in KINDS}
        return max(changes.items(), key=lambda change: abs(change[1]))


def profile_step(step: Callable[[], object], device: torch.device) -> StepProfile | None:
    """Run a step twice under torch.profiler and summarise the second, because starting the tracer takes time.

    Tracing slows the host down. So the idle time is an upper bound.

    Args:
        step: Runs one step. All ranks must call this together if there are several.
        device: This rank's device.

    Returns:
        The summary; None on a CPU, which has no kernels to trace, or if the driver does not let them be traced.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # else torch 2.11 warns
            if dist.is_initialized():
                dist.barrier()  # else NCCL's first kernel would wait for the rank whose tracer starts last
            for part in (lambda: None, step):
                part()
                torch.cuda.synchronize(device)
                torch.cuda._sleep(1)  # a kernel that marks the two ends of the step
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return summarise(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def summarise(events: Iterable[Mapping[str, Any]]) -> StepProfile | None:
    """Summarise the trace of one step: what comes after the first marker and before the second.

    Args:
        events: ``traceEvents`` of torch.profiler's Chrome trace; times are in microseconds. The step ends with a wait
            for the GPU.

    Returns:
        Seconds by kind; None if the trace does not have the two markers.
    """
    traced = [event for event in events if event.get("ph") == "X" and event.get("cat") in (*GPU_WORK, *HOST_CALLS)]
    marks = sorted(_interval(event) for event in traced if event["cat"] == "kernel" and MARKER in event["name"])
    if len(marks) != 2:
        return None
    (_, begin), (end, _) = marks
    traced = [event for event in traced if begin <= event["ts"] < end and MARKER not in event["name"]]
    busy: dict[str, list[Interval]] = {kind: [] for kind in KINDS[:-1]}
    waits: list[Interval] = []
    for event in traced:
        if event["cat"] in GPU_WORK:
            busy[_kind(event)].append(_interval(event))
        elif event["name"] in WAITS:
            waits.append(_interval(event))
    seconds, counted, covered = {}, [], 0.0
    for kind, intervals in busy.items():
        counted += intervals
        seconds[kind], covered = (union_length(counted) - covered) / 1e6, union_length(counted)
    *waits, last_wait = sorted(waits) or [(begin, begin)]
    # The step is over when the GPU has done its work and the host has nothing left to do but wait.
    finish = max([last_wait[0], *(until for _, until in counted)])
    seconds[IDLE] = (finish - begin - covered) / 1e6
    host_waits = sum(until - start for start, until in waits) / 1e6
    return StepProfile(seconds, union_length(busy[NCCL]) / 1e6, host_waits, len(counted))


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _kind(event: Mapping[str, Any]) -> str:
    if event["cat"] != "kernel":
        return COPY
    if event["name"].startswith("nccl"):
        return NCCL
    return MATMUL if MATMUL_NAMES.search(event["name"]) else OTHER


def union_length(intervals: Iterable[Interval]) -> float:
    """Measure what intervals cover; where they overlap it counts once.

    Args:
        intervals: (start, end) of each.

    Returns:
        The length, in the unit of the intervals.
    """
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def profile_table(profiles: Mapping[str, StepProfile | None]) -> Table:
    """Lay profiles out side by side: a row per kind in milliseconds, a column per step.

    Args:
        profiles: By name of the step; None reads "not available".

    Returns:
        The table.
    """

    def row(name: str, text: Callable[..., str]) -> list[str]:
        return [name, *("not available" if profile is None else text(profile) for profile in profiles.values())]

    rows = [
        *(row(kind, lambda profile, kind=kind: _ms(profile.seconds[kind])) for kind in KINDS),
        row("step", lambda profile: _ms(profile.step)),
        row("NCCL, hidden or not", lambda profile: _ms(profile.nccl)),
        row("host waits for the GPU", lambda profile: _ms(profile.host_waits)),
        row("kernels and copies, number", lambda profile: f"{profile.operations:,}"),
    ]
    return Table(["ms", *profiles], rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
