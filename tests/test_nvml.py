"""helpers.memory.nvml, .timeline and .phases: readings, devices, sampling, and what is kept of it."""

import json
import subprocess
import sys
import threading
from itertools import pairwise

import pynvml
import pytest
import torch
from conftest import needs_gpu
from fake_nvml import GIB, FakeGpu, FakeNvml, h100s
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import UserError
from helpers.hardware import describe_machine
from helpers.memory.nvml import Memory, Nvml, gpu_table, open_nvml, without_reserved
from helpers.memory.phases import Phase, PhaseLog, across_ranks, read_phases
from helpers.memory.sampler import Sampler
from helpers.memory.timeline import CurveRecorder, GpuCurve, Timeline, downsample
from helpers.memory.visible import select_uuids

NO_DRIVER = "NVML: not available, no NVIDIA driver answers here (NVML Shared Library Not Found)"


@pytest.fixture(autouse=True)
def every_gpu_is_visible(monkeypatch):
    """What a machine hides from its users is no matter of these tests; some set the variable themselves."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# --- readings


def test_without_a_driver_one_line_and_no_numbers():
    nvml = Nvml(FakeNvml(no_driver=True))
    assert nvml.unavailable == NO_DRIVER
    assert (nvml.visible(), nvml.installed_names(), nvml.used_bytes(0), nvml.driver) == ([], [], None, None)
    assert gpu_table(nvml) == NO_DRIVER
    nvml.close()


def test_session_is_opened_once_and_closed_once():
    library = FakeNvml(h100s(2))
    nvml = Nvml(library)
    assert (library.sessions, nvml.driver, nvml.cuda) == (1, "580.65.06", (13, 0))
    nvml.close()
    nvml.close()
    assert library.sessions == 0
    assert nvml.used_bytes(0) is None


@pytest.mark.parametrize("includes", [False, True])
def test_reserved_is_never_part_of_used(includes):
    nvml = Nvml(FakeNvml([FakeGpu("GPU-a", used=[3 * GIB], used_includes_reserved=includes)]))
    assert nvml.memory(nvml.visible({})[0]) == Memory(80 * GIB, 3 * GIB, GIB // 2)


def test_an_old_driver_does_not_tell_reserved_apart():
    nvml = Nvml(FakeNvml([FakeGpu("GPU-a", used=[3 * GIB])], has_version_2=False))
    assert nvml.memory(nvml.visible({})[0]) == Memory(80 * GIB, 3 * GIB + GIB // 2, None)
    assert "within used" in gpu_table(nvml)


def test_a_gpu_without_memory_of_its_own_has_no_figure():
    gpu = FakeGpu("GPU-a", name="NVIDIA GB10", failure=pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
    nvml = Nvml(FakeNvml([gpu]))
    assert nvml.used_bytes(0) is None
    assert "not available" in gpu_table(nvml)
    with Sampler(nvml) as sampler:
        pass
    assert sampler.timeline().gpus == []
    assert sampler.timeline().note == "NVML: memory not available on GPU 0 NVIDIA GB10"


@pytest.mark.parametrize("call", ["handle", "uuid", "name", "capability"])
def test_a_gpu_that_does_not_answer_is_left_out_with_a_note(call):
    gpus = h100s(3)
    gpus[1].lost_at = call
    nvml = Nvml(FakeNvml(gpus))
    assert [device.index for device in nvml.visible({"CUDA_VISIBLE_DEVICES": "0"})] == [0]
    assert [device.index for device in nvml.visible({})] == [0, 2]
    assert [device.uuid for device in nvml.visible({"CUDA_VISIBLE_DEVICES": "2,1"})] == [gpus[2].uuid]
    (note,) = nvml.notes
    assert note.startswith("GPU 1 does not answer NVML and is left out (") and "lost" in note
    assert gpu_table(nvml).splitlines()[-1] == note
    assert len(nvml.installed_names()) == 3 and nvml.used_bytes(2) == GIB
    machine = describe_machine(nvml)
    assert note in machine.notes
    with Sampler(nvml) as sampler:
        pass
    assert sampler.timeline().note == note and len(sampler.timeline().gpus) == 2


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NO_PERMISSION])
def test_any_error_of_a_first_reading_is_no_figure(code):
    nvml = Nvml(FakeNvml([FakeGpu("GPU-a", failure=pynvml.NVMLError(code))]))
    assert nvml.used_bytes(0) is None and "not available" in gpu_table(nvml)
    with Sampler(nvml) as sampler:
        pass
    assert sampler.timeline().note == "NVML: memory not available on GPU 0 NVIDIA H100 80GB HBM3"


@given(total=st.integers(1, 2**40), used=st.integers(0), free=st.integers(0), includes=st.booleans())
def test_the_parts_of_a_reading_make_up_the_total(total, used, free, includes):
    used %= total
    free %= total - used
    reserved = total - used - free
    reading = without_reserved(total, used + reserved if includes else used, free, reserved)
    assert reading == Memory(total, used, reserved)


def test_table_has_one_line_per_visible_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    header, row = gpu_table(Nvml(FakeNvml(h100s(2)))).splitlines()
    assert header.split() == ["GPU", "name", "used", "GiB", "total", "GiB", "reserved", "GiB"]
    assert row.split() == ["0", "NVIDIA", "H100", "80GB", "HBM3", "1.00", "80.00", "0.50"]


def test_table_says_when_all_gpus_are_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in gpu_table(Nvml(FakeNvml(h100s(2))))


@pytest.mark.slow
def test_the_command_prints_a_table_or_the_one_line():
    done = subprocess.run([sys.executable, "-m", "helpers.memory.nvml"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (done.stdout.startswith("NVML: ") and done.stdout.count("\n") == 1) or "total GiB" in done.stdout


# --- which device is torch's device i

WHOLE = {"GPU-aaaa-1": [], "GPU-aabb-2": [], "GPU-cccc-3": []}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"]),
        ("", []),
        ("2,0", ["GPU-cccc-3", "GPU-aaaa-1"]),
        (" 1 ", ["GPU-aabb-2"]),
        ("0,-1,1", ["GPU-aaaa-1"]),
        ("1,7,0", ["GPU-aabb-2"]),
        ("NoDevFiles", []),
        ("1,1", []),
        ("GPU-cccc-3,GPU-aabb-2", ["GPU-cccc-3", "GPU-aabb-2"]),
        ("GPU-c", ["GPU-cccc-3"]),
        ("GPU-aa", []),  # ambiguous
        ("GPU-c,GPU-ffff,GPU-aaaa-1", ["GPU-cccc-3"]),
    ],
)
def test_cuda_visible_devices(selection, expected):
    assert select_uuids(selection, WHOLE) == expected


SPLIT = {"GPU-a": ["MIG-1", "MIG-2"], "GPU-b": ["MIG-3"]}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, ["MIG-1"]),
        ("1", ["MIG-3"]),
        ("MIG-2", ["MIG-2"]),
        ("MIG-2,MIG-1", ["MIG-2"]),  # a process sees one instance at most
        ("GPU-b", ["MIG-3"]),
        ("MIG-9", []),
    ],
)
def test_cuda_visible_devices_with_mig(selection, expected):
    assert select_uuids(selection, SPLIT) == expected


def test_whole_gpus_hide_mig_instances():
    assert select_uuids(None, {"GPU-a": ["MIG-1"], "GPU-b": []}) == ["GPU-b"]


@given(st.permutations(range(6)), st.integers(0, 6))
def test_indices_and_uuids_select_the_same(order, count):
    gpus = {f"GPU-{letter}": [] for letter in "abcdef"}
    chosen = list(order)[:count]
    expected = [list(gpus)[index] for index in chosen]
    assert select_uuids(",".join(map(str, chosen)), gpus) == expected
    assert select_uuids(",".join(expected), gpus) == expected


def test_used_bytes_follows_cuda_visible_devices(monkeypatch):
    gpus = [FakeGpu("GPU-a", used=[1 * GIB]), FakeGpu("GPU-b", used=[2 * GIB]), FakeGpu("GPU-c", used=[3 * GIB])]
    nvml = Nvml(FakeNvml(gpus))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-c,GPU-a")
    assert [nvml.used_bytes(0), nvml.used_bytes(1)] == [3 * GIB, 1 * GIB]
    with pytest.raises(UserError, match=r"no GPU 2: 2 GPU\(s\) visible here \(CUDA_VISIBLE_DEVICES: GPU-c,GPU-a\)"):
        nvml.used_bytes(2)


def test_a_mig_instance_has_its_own_memory_and_its_gpus_capability():
    instance = FakeGpu("MIG-1", name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", used=[GIB], total=10 * GIB)
    gpu = FakeGpu("GPU-a", mig=[None, instance, None])
    nvml = Nvml(FakeNvml([gpu]))
    [device] = nvml.visible({"CUDA_VISIBLE_DEVICES": "0"})
    assert (device.index, device.name, device.capability) == (0, instance.name, (9, 0))
    assert nvml.memory(device).total == 10 * GIB


def test_gpus_that_know_no_mig_are_visible():
    nvml = Nvml(FakeNvml([FakeGpu("GPU-a", name="Tesla T4", capability=(7, 5))]))
    assert [device.capability for device in nvml.visible({})] == [(7, 5)]


# --- the sampler


def test_sampler_sees_baseline_peak_and_end():
    gpus = h100s(2)
    gpus[0].used = [GIB, GIB, 5 * GIB, 9 * GIB, 2 * GIB]
    nvml = Nvml(FakeNvml(gpus))
    enough = threading.Event()
    read = nvml.memory

    def memory(device):
        if gpus[1].readings > 20:
            enough.set()
        return read(device)

    nvml.memory = memory
    with Sampler(nvml, hz=1000) as sampler:
        assert enough.wait(10)
        assert sampler.timeline().gpus[0].baseline == GIB
    timeline = sampler.timeline()
    first, second = timeline.gpus
    assert (first.baseline, first.peak, first.delta, first.last) == (GIB, 9 * GIB, 8 * GIB, 2 * GIB)
    assert (second.baseline, second.peak, second.delta) == (GIB, GIB, 0)
    assert (first.index, second.index, first.total_bytes) == (0, 1, 80 * GIB)
    assert timeline.note is None
    assert first.seconds[0] <= first.seconds[-1] <= timeline.duration
    assert timeline.summary().splitlines()[0] == (
        "GPU 0: 1.00 GiB before, 9.00 GiB at the peak (+8.00), 2.00 GiB after, of 80.0 GiB"
    )


def test_sampler_leaves_no_thread_even_when_the_block_raises():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), Sampler(Nvml(FakeNvml(h100s(1)))) as sampler:
        raise ZeroDivisionError
    assert threading.active_count() == before
    assert len(sampler.timeline().gpus[0].used) == 2  # one sample before the block and one after it


def test_sampler_without_a_driver_has_only_the_note():
    with Sampler(Nvml(FakeNvml(no_driver=True))) as sampler:
        pass
    timeline = sampler.timeline()
    assert (timeline.gpus, timeline.note, timeline.summary()) == ([], NO_DRIVER, NO_DRIVER)
    assert timeline.duration >= 0


def test_sampler_keeps_what_it_has_when_a_gpu_is_lost():
    [gpu] = gpus = h100s(1)
    nvml = Nvml(FakeNvml(gpus))
    stopped = threading.Event()
    read = nvml.memory

    def memory(device):
        if gpu.failure:
            stopped.set()
        return read(device)

    nvml.memory = memory
    with Sampler(nvml, hz=1000) as sampler:
        gpu.failure = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        assert stopped.wait(10)
    timeline = sampler.timeline()
    assert timeline.gpus[0].baseline == GIB
    assert "stopped answering" in timeline.note and "GPU is lost" in timeline.note


def test_a_gpu_that_is_lost_before_the_first_sample_has_no_curve():
    [gpu] = gpus = h100s(1)
    nvml = Nvml(FakeNvml(gpus))
    first, read = threading.Event(), nvml.memory

    def memory(device):
        if first.is_set():
            gpu.failure = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        first.set()
        return read(device)

    nvml.memory = memory
    with Sampler(nvml) as sampler:
        pass
    assert sampler.timeline().gpus == []
    assert "GPU is lost" in sampler.timeline().summary()


# --- what is kept of a curve

CURVES = st.lists(st.integers(0, 100), min_size=1, max_size=300)


@given(CURVES, st.integers(4, 60))
def test_thinning_keeps_every_peak(used, limit):
    seconds = [float(number) for number in range(len(used))]
    kept_seconds, kept_used = downsample(seconds, used, limit)
    assert len(kept_used) == len(kept_seconds) <= max(limit, 4)
    assert all(earlier < later for earlier, later in pairwise(kept_seconds))
    assert {(second, value) for second, value in zip(kept_seconds, kept_used, strict=True)} <= set(
        zip(seconds, used, strict=True)
    )
    assert (kept_seconds[0], kept_seconds[-1]) == (seconds[0], seconds[-1])
    width = (seconds[-1] - seconds[0]) / (limit // 4)
    kept = list(zip(kept_seconds, kept_used, strict=True))
    for second, value in zip(seconds, used, strict=True):
        near = [near_value for near_second, near_value in kept if abs(near_second - second) <= width]
        assert min(near) <= value <= max(near)


@given(CURVES)
def test_recording_flat_stretches_as_their_ends_loses_nothing(used):
    curve = CurveRecorder()
    for second, value in enumerate(used):
        curve.add(float(second), value)
    assert not any(a == b == c for a, b, c in zip(curve.used, curve.used[1:], curve.used[2:], strict=False))
    kept = dict(zip(curve.seconds, curve.used, strict=True))
    shown = 0
    for second, value in enumerate(used):  # a left-out sample equals the kept one before it
        shown = kept.get(float(second), shown)
        assert shown == value


def test_recording_needs_bounded_memory():
    curve = CurveRecorder(limit=100)
    for second in range(5000):
        curve.add(float(second), 7 if second == 1234 else second % 2)
    assert len(curve.used) <= 100
    assert (max(curve.used), curve.seconds[curve.used.index(7)]) == (7, 1234.0)
    assert (curve.seconds[0], curve.seconds[-1]) == (0.0, 4999.0)


def test_a_long_restless_run_is_saved_small_with_its_peaks(tmp_path):
    curves = []
    for index in range(8):
        curve = CurveRecorder()
        for tick in range(30_000):
            curve.add(90_000 + tick / 100, 70 * GIB + 2**21 * (tick * 7919 % 997) + index)
        curves.append(GpuCurve(index, "NVIDIA H100 80GB HBM3", 80 * GIB, curve.seconds, curve.used))
    timeline = Timeline(1.7e9, 90_300.0, curves, None)
    timeline.save(tmp_path / "timeline.json")
    assert (tmp_path / "timeline.json").stat().st_size < 200_000
    loaded = Timeline.load(tmp_path / "timeline.json")
    for before, after in zip(curves, loaded.gpus, strict=True):
        assert (before.baseline, before.peak, before.last) == (after.baseline, after.peak, after.last)
        assert after.peak_seconds == pytest.approx(before.peak_seconds, abs=0.001)


def test_save_and_load_give_the_same_short_timeline(tmp_path):
    timeline = Timeline(1.7e9, 2.5, [GpuCurve(0, "NVIDIA A100", 40 * GIB, [0.0, 1.25], [1, 2])], "a note")
    timeline.save(tmp_path / "new folder" / "timeline.json")
    assert Timeline.load(tmp_path / "new folder" / "timeline.json") == timeline
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["timeline.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"start": 1}', '{"start":1,"duration":1,"gpus":[{}],"note":null}'])
def test_load_names_a_file_that_is_no_timeline(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match=r"other\.json is not a saved memory timeline"):
        Timeline.load(tmp_path / "other.json")


# --- phases


def test_phases_nest_and_end_when_the_block_raises(tmp_path):
    log = PhaseLog(tmp_path / "run" / "phases-3.jsonl", rank=3)
    with pytest.raises(KeyError), log.phase("train"):
        with log.phase("evaluate"):
            pass
        with log.phase("evaluate"):
            raise KeyError
    train, first, second = read_phases([log.path])
    assert [phase.name for phase in (train, first, second)] == ["train", "evaluate", "evaluate"]
    assert {phase.rank for phase in (train, first, second)} == {3}
    assert train.start <= first.start <= first.end <= second.start <= second.end <= train.end


@pytest.mark.slow
def test_a_rank_that_was_killed_leaves_an_open_phase_until_the_file_is_used_again(tmp_path):
    script = (
        "import os, sys; from helpers.memory.phases import PhaseLog\n"
        "with PhaseLog(sys.argv[1]).phase('train'): os._exit(1)"
    )
    path = tmp_path / "phases-0.jsonl"
    subprocess.run([sys.executable, "-c", script, str(path)])
    [killed] = read_phases([path])
    assert (killed.name, killed.end) == ("train", None)
    with PhaseLog(path).phase("train"):
        pass
    killed, resumed = read_phases([path])
    assert killed.end == resumed.start < resumed.end


def test_ranks_write_whole_lines_into_files_of_their_own(tmp_path):
    logs = [PhaseLog(tmp_path / f"phases-{rank}.jsonl", rank) for rank in range(4)]

    def work(log):
        for number in range(50):
            with log.phase(f"微调 {number}"):
                pass

    threads = [threading.Thread(target=work, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    phases = read_phases(log.path for log in logs)
    assert len(phases) == 200 and all(phase.end is not None for phase in phases)
    assert len(across_ranks(phases)) == 50


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"event": "pause", "name": "a", "rank": 0, "time": 1, "pid": 1}', '{"event": "begin"}',
     '{"event": "end", "name": "never begun", "rank": 0, "time": 2, "pid": 1}'],
)  # fmt: skip
def test_a_line_that_is_no_mark_is_named(tmp_path, line):
    path = tmp_path / "phases-0.jsonl"
    path.write_text(json.dumps({"event": "begin", "name": "a", "rank": 0, "time": 1, "pid": 1}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"phases-0\.jsonl line 2 is not a phase mark"):
        read_phases([path])


def test_a_missing_phase_log_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the phase log .*missing\.jsonl: No such file"):
        read_phases([tmp_path / "missing.jsonl"])


def test_across_ranks_joins_the_same_occurrence_of_a_phase():
    phases = [
        Phase("load", 0, 1.0, 4.0),
        Phase("load", 1, 2.0, 5.0),
        Phase("evaluate", 0, 6.0, 7.0),
        Phase("evaluate", 0, 9.0, 9.5),
        Phase("evaluate", 1, 6.5, 8.0),
        Phase("evaluate", 1, 9.0, None),
    ]
    assert across_ranks(phases) == [
        Phase("load", 0, 1.0, 5.0),
        Phase("evaluate", 0, 6.0, 8.0),
        Phase("evaluate", 0, 9.0, None),
    ]


# --- a real driver


@pytest.mark.gpu_memory
@needs_gpu
def test_a_real_gpu_shows_what_torch_allocates():
    nvml = open_nvml()
    reading = nvml.memory(nvml.visible()[0])
    assert 0 < reading.used < reading.total
    torch.zeros(1, device="cuda:0")  # the CUDA context comes before the sampler's baseline
    with Sampler() as sampler:
        block = torch.empty(GIB, dtype=torch.uint8, device="cuda:0")
        del block
    curve = sampler.timeline().gpus[0]
    assert curve.delta == pytest.approx(GIB, rel=0.01)
    assert curve.name == torch.cuda.get_device_name(0)
    assert nvml.visible()[0].uuid.endswith(str(torch.cuda.get_device_properties(0).uuid))
