"""What a step takes: each instant of a trace counts once, the kinds add up to the step, speed is per GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.parallel.clock import host_bandwidth, tokens_per_second
from helpers.parallel.step_profile import (
    COPY,
    IDLE,
    KINDS,
    MATMUL,
    NCCL,
    OTHER,
    StepProfile,
    profile_step,
    profile_table,
    summarise,
    union_length,
)


def event(category, name, start, end):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start}


def marked(events, begin, end):
    """Between the two kernels that mark the ends of a step, with what a profiler does before and after."""
    ends = (begin - 2, begin), (end, end + 2)
    marks = [event("kernel", "at::cuda::(anonymous namespace)::spin_kernel(long)", *at) for at in ends]
    outside = [event("kernel", "ncclDevKernel_Barrier", begin - 90, begin - 50)]
    return [*outside, *marks, *events, event("cuda_runtime", "cudaDeviceSynchronize", end + 5, end + 50)]


# Times in microseconds: two streams overlap, the GPU pauses while the host waits, and the trace has other events.
STEP = [
    {"ph": "M", "name": "process_name"},
    {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 5},
    event("cuda_runtime", "cudaLaunchKernel", 0, 5),
    event("kernel", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", 10, 110),
    event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 60, 260),
    event("gpu_user_annotation", "nccl:all_reduce", 60, 260),
    event("kernel", "void at::native::vectorized_elementwise_kernel<4>()", 110, 130),
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 120, 160),
    event("cuda_runtime", "cudaStreamSynchronize", 200, 300),
    event("kernel", "pytorch_flash::flash_bwd_kernel<Flash_bwd_kernel_traits>", 400, 450),
    event("gpu_memset", "Memset (Device)", 450, 460),
    event("cuda_runtime", "cudaDeviceSynchronize", 310, 465),
]
TRACE = marked(STEP, 0, 500)


def test_each_instant_counts_once_for_the_first_kind_that_runs():
    found = summarise(TRACE)
    in_us = {kind: round(1e6 * seconds) for kind, seconds in found.seconds.items()}
    assert in_us == {MATMUL: 150, OTHER: 20, COPY: 40, NCCL: 100, IDLE: 150}
    assert list(in_us) == list(KINDS) and found.step == pytest.approx(460e-6)


def test_nccl_in_all_the_waits_before_the_last_one_and_the_number_of_operations():
    found = summarise(TRACE)
    assert found.nccl == pytest.approx(200e-6)
    assert found.host_waits == pytest.approx(100e-6)
    assert found.operations == 6


def test_what_the_host_does_after_the_last_kernel_belongs_to_the_step():
    late = [event("kernel", "nvjet_x", 0, 100), event("cuda_runtime", "cudaDeviceSynchronize", 180, 190)]
    found = summarise(marked(late, 0, 500))
    assert found.step == pytest.approx(180e-6) and found.seconds[IDLE] == pytest.approx(80e-6)
    assert found.host_waits == 0


def test_the_length_of_a_union_counts_overlaps_once():
    assert union_length([(3, 5), (0, 2), (1, 4), (7, 8), (7.25, 7.5)]) == 6
    assert union_length([]) == 0


def test_a_trace_without_its_two_ends_makes_no_numbers_up():
    assert summarise(marked([], 0, 1)).step == 0
    assert summarise(STEP) is None


NAMES = st.sampled_from(["nvjet_x", "ncclDevKernel", "elementwise", "flash_fwd"])
KERNELS = st.lists(st.tuples(NAMES, st.integers(0, 1000), st.integers(0, 300)), min_size=1)


@given(KERNELS)
def test_the_kinds_add_up_to_the_step(kernels):
    step = [event("kernel", name, start, start + length) for name, start, length in kernels]
    found = summarise(marked(step, 0, 2000))
    assert found.step == pytest.approx(max(start + length for _, start, length in kernels) / 1e6)
    assert min(found.seconds.values()) >= -1e-12 and found.nccl >= found.seconds[NCCL] - 1e-12


def test_the_table_has_a_column_per_step_and_makes_no_number_up():
    header, *rows = str(profile_table({"by hand": summarise(TRACE), "on a CPU": None})).splitlines()
    assert header.split("  ")[0] == "ms" and header.endswith("by hand       on a CPU")
    assert len(rows) == len(KINDS) + 4 and all(row.endswith("not available") for row in rows)


def test_without_a_gpu_nothing_is_run():
    assert profile_step(lambda: pytest.fail("it ran"), torch.device("cpu")) is None


def test_speed_is_that_of_one_rank():
    assert tokens_per_second(4, 1024, seconds=0.5) == 8192


def test_the_link_to_host_memory_has_a_rate():
    assert host_bandwidth(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 2**20) > 0


def test_the_kind_that_changed_most_is_found_with_its_sign():
    steps = (5, 2, 1, 4, 0), (4, 2, 3, 1, 1)
    slow, fast = (StepProfile(dict(zip(KINDS, seconds, strict=True)), 0, 0, 0) for seconds in steps)
    assert slow.largest_change(fast) == (NCCL, 3) and fast.largest_change(slow) == (NCCL, -3)
