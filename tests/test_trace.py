"""The lanes of a recorded step: streams on a GPU, threads on a CPU."""

import json

import pytest
import torch

from helpers.parallel.step_profile import COPY, MATMUL, OTHER
from helpers.parallel.trace import SENDING, STEP, StepTrace, read_step, record_step
from helpers.plots import trace_lanes


def event(name, ts, dur, cat="kernel", tid=1, stream=7):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid, "args": {"stream": stream}}


def rounded(trace):
    return {
        lane: [(kind, round(1e3 * begin, 6), round(1e3 * end, 6)) for kind, begin, end in spans]
        for lane, spans in trace.lanes.items()
    }


def test_streams_of_a_gpu_are_lanes_and_only_the_step_counts():
    events = [
        event(STEP, 1_000_000, 10_000, "user_annotation"),
        event("nvjet_gemm", 990_000, 5_000),  # before the step
        event("nvjet_gemm", 1_000_000, 4_000),
        event("vectorized_elementwise", 1_004_000, 1_000),
        event("Memcpy HtoD", 1_006_000, 500, "gpu_memcpy"),
        event("ncclDevKernel_AllReduce", 1_003_000, 4_000, stream=20),
        event("ncclDevKernel_AllReduce", 1_009_000, 3_000, stream=20),  # ends after it
        event("aten::mm", 1_000_000, 9_000, "cpu_op"),  # the host's call
        {"ph": "M", "name": "thread_name"},
    ]
    trace = read_step(events)
    assert rounded(trace) == {
        "computes": [(MATMUL, 0, 4), (OTHER, 4, 5), (COPY, 6, 6.5)],
        "sends": [(SENDING, 3, 7), (SENDING, 9, 10)],
    }
    assert (trace.seconds, trace.computing, trace.sending) == pytest.approx((0.010, 0.005, 0.005))
    assert trace.hidden_share == pytest.approx(2 / 5)


def test_threads_of_a_cpu_are_lanes_and_operators_inside_of_operators_count_once():
    events = [
        event(STEP, 0, 10_000, "user_annotation"),
        event("aten::linear", 0, 4_000, "cpu_op"),
        event("aten::addmm", 1_000, 2_000, "cpu_op"),
        event("aten::add_", 4_000, 1_000, "cpu_op"),
        event("c10d::allreduce_", 5_000, 10, "cpu_op"),
        event("gloo:all_reduce", 3_000, 4_000, "user_annotation", tid=2),
    ]
    trace = read_step(events)
    assert rounded(trace) == {
        "computes": [(OTHER, 0, 1), (MATMUL, 1, 3), (OTHER, 3, 5)],
        "sends": [(SENDING, 3, 7)],
    }
    assert trace.hidden_share == pytest.approx(2 / 4)


def test_nothing_sent_is_nothing_hidden():
    assert StepTrace({"computes": [(MATMUL, 0.0, 1.0)]}, 1.0).hidden_share is None


def test_a_real_step_is_recorded_and_its_file_opens_elsewhere(tmp_path):
    weight = torch.randn(64, 64, requires_grad=True)
    trace = record_step(lambda: (weight @ weight).relu().sum().backward(), torch.device("cpu"), tmp_path / "t.json")
    kinds = {kind for spans in trace.lanes.values() for kind, _, _ in spans}
    assert kinds == {MATMUL, OTHER} and 0 < trace.computing <= trace.seconds
    assert "traceEvents" in json.loads((tmp_path / "t.json").read_text())
    figure = trace_lanes({"a": trace.lanes, "b": trace.lanes}, "two steps")
    assert len(figure.axes[0].get_yticklabels()) == 2 * len(trace.lanes)
    again = record_step(lambda: weight @ weight, torch.device("cpu"))
    assert again.computing > 0 and [path.name for path in tmp_path.iterdir()] == ["t.json"]
