"""Record one step of a rank with torch.profiler: what each thread or stream did when, and a file for Perfetto.

    trace = record_step(step, device(), "trace.json")
    trace.lanes, trace.hidden_share

On a GPU a lane is a CUDA stream, on a CPU a thread. Open the file at https://ui.perfetto.dev to see every call.
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

from helpers.parallel.step_profile import COPY, MATMUL, MATMUL_NAMES, OTHER, Interval, union_length

SENDING = "communication"
STEP = "one step"  # the annotation around it
# Of torch's operators on a CPU; linear, matmul and attention contain these.
CPU_MATMULS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|_scaled_dot_product_\w+)$")
CPU_SENDS = re.compile(r"(gloo|mpi):")
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# Spans of one kind with a smaller gap become one: a step has thousands of kernels, and a figure as many pixels.
SMALLEST_GAP = 1 / 1000

Spans = list[tuple[str, float, float]]


@dataclass(frozen=True)
class StepTrace:
    """What one rank did in one step.

    Attributes:
        lanes: By stream or thread: kind of work, begin and end, in seconds from the beginning of the step.
        seconds: Of the step.
    """

    lanes: Mapping[str, Spans]
    seconds: float

    def _union(self, *kinds: str) -> float:
        spans = [span for lane in self.lanes.values() for span in lane]
        return union_length((begin, end) for kind, begin, end in spans if kind in kinds)

    @property
    def computing(self) -> float:
        """Seconds in which something was computed."""
        return self._union(MATMUL, OTHER)

    @property
    def sending(self) -> float:
        """Seconds in which a collective or a message was under way."""
        return self._union(SENDING)

    @property
    def hidden_share(self) -> float | None:
        """Share of the communication during which this rank also computed; None without communication."""
        if not self.sending:
            return None
        hidden = self.sending + self.computing - self._union(MATMUL, OTHER, SENDING)
        return max(0.0, hidden) / self.sending  # not -0.0 by rounding


def record_step(step: Callable[[], object], device: torch.device, path: str | Path | None = None) -> StepTrace:
    """Run a step three times, the last time under torch.profiler.

    All ranks must call this together if there are several. Recording slows the host down.

    Args:
        step: Runs one step.
        device: This rank's device.
        path: Where to keep the trace of this rank, as JSON; None keeps no file.

    Returns:
        What this rank did.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # else torch 2.11 warns
        if dist.is_initialized():
            dist.barrier()  # else the first collective would wait for the rank whose recording starts last
        with torch.profiler.record_function(STEP):
            step()
            if on_gpu:
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(path or Path(folder) / "trace.json")
        profiler.export_chrome_trace(str(written))
        return read_step(json.loads(written.read_text(encoding="utf-8"))["traceEvents"])


def read_step(events: Iterable[Mapping[str, Any]]) -> StepTrace:
    """Read the lanes of a step from a trace.

    Args:
        events: ``traceEvents`` of torch.profiler's Chrome trace; times are in microseconds. The step is inside of the
            annotation ``STEP``.

    Returns:
        Its lanes: streams that computed or copied, and those that sent; threads without a GPU.
    """
    events = [event for event in events if event.get("ph") == "X"]
    step = next(event for event in events if event["name"] == STEP and event["cat"] == "user_annotation")
    start, stop = step["ts"], step["ts"] + step["dur"]
    on_gpu = any(event["cat"] in GPU_WORK for event in events)
    found: dict[Any, Spans] = {}
    for event in events:
        begin, end = max(event["ts"], start), min(event["ts"] + event["dur"], stop)
        kind = (_gpu_kind if on_gpu else _cpu_kind)(event)
        if kind and begin < end:
            lane = event["args"].get("stream") if on_gpu else event["tid"]
            found.setdefault(lane, []).append((kind, (begin - start) / 1e6, (end - start) / 1e6))
    seconds = (stop - start) / 1e6
    lanes: dict[str, Spans] = {}
    for spans in sorted(found.values(), key=lambda spans: min(begin for _, begin, _ in spans)):
        sent = union_length((begin, end) for kind, begin, end in spans if kind == SENDING)
        name = "sends" if 2 * sent > union_length((begin, end) for _, begin, end in spans) else "computes"
        number = sum(key.startswith(name) for key in lanes) + 1
        lanes[name if number == 1 else f"{name}, {number}"] = _merged(spans, SMALLEST_GAP * seconds)
    return StepTrace(lanes, seconds)


def _gpu_kind(event: Mapping[str, Any]) -> str | None:
    if event["cat"] not in GPU_WORK:
        return None
    if event["cat"] != "kernel":
        return COPY
    if event["name"].startswith("nccl"):
        return SENDING
    return MATMUL if MATMUL_NAMES.search(event["name"]) else OTHER


def _cpu_kind(event: Mapping[str, Any]) -> str | None:
    if CPU_SENDS.match(event["name"]):
        return SENDING
    if event["cat"] != "cpu_op" or not event["name"].startswith("aten::"):
        return None
    return MATMUL if CPU_MATMULS.match(event["name"]) else OTHER


def _merged(spans: Spans, gap: float) -> Spans:
    """Join what follows each other, and cut out of "other" the matmuls inside of it: operators contain operators."""
    by_kind = {
        kind: _joined([(begin, end) for other, begin, end in spans if other == kind], gap)
        for kind in dict.fromkeys(kind for kind, _, _ in spans)
    }
    if OTHER in by_kind:
        by_kind[OTHER] = _subtract(by_kind[OTHER], by_kind.get(MATMUL, []))
    merged = [(kind, begin, end) for kind, pieces in by_kind.items() for begin, end in pieces]
    return sorted(merged, key=lambda span: span[1])


def _joined(spans: list[Interval], gap: float) -> list[Interval]:
    joined: list[Interval] = []
    for begin, end in sorted(spans):
        if joined and begin - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _subtract(spans: list[Interval], holes: list[Interval]) -> list[Interval]:
    """Cut ``holes`` out of ``spans``; both are sorted, and neither overlaps itself."""
    left, first = [], 0
    for begin, end in spans:
        while first < len(holes) and holes[first][1] <= begin:
            first += 1
        reached = begin
        for hole_begin, hole_end in holes[first:]:
            if hole_begin >= end:
                break
            if hole_begin > reached:
                left.append((reached, hole_begin))
            reached = max(reached, hole_end)
        if reached < end:
            left.append((reached, end))
    return left
