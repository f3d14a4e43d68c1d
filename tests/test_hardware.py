"""helpers.hardware: what is described, and what follows from it."""

import dataclasses
import json
import os

import pynvml
import pytest
import torch
from accelerate.utils import environment as accelerate_environment
from fake_nvml import GIB, FakeGpu, FakeNvml, h100s

from helpers import hardware
from helpers.errors import UserError
from helpers.hardware import (
    Gpu,
    Machine,
    apply_nccl_environment,
    backend_for,
    cuda_mismatch,
    default_nprocs,
    describe_machine,
    mixed_precision,
    nccl_environment,
)
from helpers.memory.nvml import Nvml

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0))
T4 = Gpu("Tesla T4", 15 * GIB, (7, 5))


def machine(*gpus):
    return Machine(gpus, "580.65.06" if gpus else None, 16, 128 * GIB, "Linux x86_64", {"python": "3.12.3"}, ())


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# --- decisions


@pytest.mark.parametrize(
    ("gpus", "nprocs", "backend"), [(0, 1, "gloo"), (0, 8, "gloo"), (1, 1, "nccl"), (1, 2, "gloo"), (2, 2, "nccl")]
)
def test_nccl_only_where_every_rank_has_its_own_gpu(gpus, nprocs, backend):
    assert backend_for(nprocs, machine(*[H100] * gpus)) == backend


def test_a_job_of_no_ranks_is_refused():
    with pytest.raises(UserError, match="nprocs is 0"):
        backend_for(0, machine())


@pytest.mark.parametrize(("gpus", "nprocs"), [(0, 2), (1, 1), (8, 8)])
def test_default_nprocs(gpus, nprocs):
    assert default_nprocs(machine(*[H100] * gpus)) == nprocs


@pytest.mark.parametrize(
    ("gpus", "precision"), [([], "no"), ([H100, H100], "bf16"), ([T4], "fp16"), ([H100, T4], "fp16")]
)
def test_mixed_precision_is_what_every_gpu_has(gpus, precision):
    assert mixed_precision(machine(*gpus)) == precision


def test_summary_says_what_is_there_and_what_follows():
    lines = machine(H100, H100).summary().splitlines()
    assert lines[0] == ("GPU       2 x NVIDIA H100 80GB HBM3, 80.0 GiB, compute capability 9.0, driver 580.65.06")
    assert lines[1] == "CPU       16 cores, 128.0 GiB of memory, Linux x86_64"
    assert lines[-1] == "so        2 ranks over nccl, bf16"
    assert machine().summary().splitlines()[0] == "GPU       none"
    assert machine(T4).summary().endswith("1 rank over nccl, fp16 with loss scaling")


# --- description


def test_describe_reads_the_visible_gpus_from_nvml(cuda_build, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    gpus = [FakeGpu("GPU-a", "Tesla T4", capability=(7, 5), total=15 * GIB), *h100s(1), FakeGpu("GPU-c")]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    found = describe_machine(Nvml(FakeNvml(gpus)))
    assert found.gpus == (H100, T4)
    assert (found.driver, found.notes) == ("580.65.06", ())
    # The package may leave out the build that torch itself names (2.11.0 and 2.11.0+cu130).
    assert torch.__version__.startswith(found.versions["torch"])
    assert set(found.versions) == {"python", *hardware.PACKAGES}
    assert 1 <= found.cpu_cores and GIB // 4 < found.ram_bytes
    assert json.loads(json.dumps(dataclasses.asdict(found)))["gpus"][1]["name"] == "Tesla T4"


def test_describe_without_a_driver():
    found = describe_machine(Nvml(FakeNvml(no_driver=True)))
    if not torch.cuda.is_available():
        assert found.gpus == ()
    assert found.driver is None
    assert found.notes[0].startswith("NVML: not available")
    assert "note      NVML: not available" in found.summary()


def test_describe_asks_torch_where_nvml_is_absent(monkeypatch):
    properties = type(
        "Properties", (), {"name": "AMD Instinct MI300X", "total_memory": 192 * GIB, "major": 9, "minor": 4}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = describe_machine(Nvml(FakeNvml(no_driver=True)))
    assert found.gpus == (Gpu("AMD Instinct MI300X", 192 * GIB, (9, 4)),) * 2


def test_gpus_that_torch_cannot_use_are_named_but_not_used(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = describe_machine(Nvml(FakeNvml(h100s(2))))
    assert found.gpus == ()
    assert found.notes == (
        "2 GPU(s) stay unused (NVIDIA H100 80GB HBM3): the installed torch is built without CUDA; "
        "install the CUDA build of torch",
    )
    assert backend_for(2, found) == "gloo"


def test_hidden_gpus_are_mentioned(cuda_build, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = describe_machine(Nvml(FakeNvml(h100s(2))))
    assert (found.gpus, found.notes) == (
        (),
        ("2 GPU(s) installed, none visible: CUDA_VISIBLE_DEVICES hides them",),
    )


def test_several_models_need_a_fixed_order(cuda_build, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    nvml = Nvml(FakeNvml([*h100s(1), FakeGpu("GPU-t4", "Tesla T4", capability=(7, 5))]))
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in describe_machine(nvml).notes[0]


def test_a_gpu_without_memory_of_its_own_is_still_a_gpu(cuda_build):
    gpu = FakeGpu("GPU-a", name="NVIDIA GB10", failure=pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
    found = describe_machine(Nvml(FakeNvml([gpu])))
    assert found.gpus[0].total_bytes is None
    assert "memory not reported by NVML" in found.summary()


@pytest.mark.parametrize(
    ("torch_cuda", "driver_cuda", "says"),
    [
        ("13.0", (13, 0), None),
        ("12.6", (13, 0), None),
        ("12.8", (12, 2), None),  # newer minor version of the same major one
        ("13.0", (12, 8), "torch is built for CUDA 13.0, the driver supports CUDA 12.8; update the NVIDIA driver"),
        (None, (13, 0), "the installed torch is built without CUDA; install the CUDA build of torch"),
    ],
)
def test_cuda_mismatch(torch_cuda, driver_cuda, says):
    assert cuda_mismatch(torch_cuda, driver_cuda) == says


def test_limits_of_a_container_count(monkeypatch):
    limits = {"cpu.max": "150000 100000", "memory.max": str(GIB)}
    monkeypatch.setattr(hardware, "_cgroup", limits.__getitem__)
    found = describe_machine(Nvml(FakeNvml(no_driver=True)))
    assert (found.cpu_cores, found.ram_bytes) == (1, GIB)
    limits |= {"cpu.max": "max 100000", "memory.max": "max"}
    unlimited = describe_machine(Nvml(FakeNvml(no_driver=True)))
    assert unlimited.cpu_cores >= 1 and unlimited.ram_bytes >= GIB


# --- NCCL on consumer cards

BOTH = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["NVIDIA GeForce RTX 4090"] * 2, BOTH),
        (["NVIDIA GeForce RTX 3090"] * 4, BOTH),
        (["NVIDIA GeForce RTX 3080 Ti", "NVIDIA A100-SXM4-80GB"], BOTH),
        (["NVIDIA RTX 4000 Ada Generation"] * 2, BOTH),  # accelerate refuses these under an old driver
        (["NVIDIA GeForce RTX 4090"], {}),
        (["NVIDIA H100 80GB HBM3"] * 8, {}),
        (["NVIDIA RTX A6000"] * 2, {}),
        (["NVIDIA GeForce RTX 2080 Ti"] * 2, {}),
        ([], {}),
    ],
)
def test_nccl_environment(names, settings):
    assert nccl_environment(names) == settings


def rtx4090s(count):
    return Nvml(FakeNvml([FakeGpu(f"GPU-{index}", "NVIDIA GeForce RTX 4090") for index in range(count)]))


def test_nccl_settings_are_made_and_said():
    environ = {"PATH": "/bin"}
    line = apply_nccl_environment(rtx4090s(2), environ)
    assert environ == {"PATH": "/bin"} | BOTH
    assert line.startswith("NVIDIA GeForce RTX 4090: set NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1, ")
    assert "\n" not in line


def test_nccl_settings_reach_an_environment_that_was_exchanged(monkeypatch):
    # As datasets' map with several processes leaves it; accelerate looks into the new one.
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    apply_nccl_environment(rtx4090s(2))
    assert os.environ == {"PATH": "/bin"} | BOTH


def test_nccl_settings_count_hidden_gpus_since_accelerate_does():
    environ = {"CUDA_VISIBLE_DEVICES": "0"}
    assert apply_nccl_environment(rtx4090s(2), environ) is not None


def test_the_users_nccl_settings_stay():
    environ = {"NCCL_P2P_DISABLE": "0"}
    line = apply_nccl_environment(rtx4090s(2), environ)
    assert environ == {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "1"}
    assert "set NCCL_IB_DISABLE=1," in line
    assert apply_nccl_environment(rtx4090s(2), environ) is None


def test_other_machines_need_no_nccl_settings():
    environ = {}
    assert apply_nccl_environment(Nvml(FakeNvml(h100s(2))), environ) is None
    assert apply_nccl_environment(Nvml(FakeNvml(no_driver=True)), environ) is None
    assert environ == {}


@pytest.mark.parametrize("series", ["RTX 20", "RTX 30", "RTX 40", "RTX 50", "RTX 60"])
def test_what_accelerate_refuses_is_covered(monkeypatch, series):
    names = [f"NVIDIA GeForce {series}90"] * 2
    monkeypatch.setattr(accelerate_environment, "get_gpu_info", lambda: (names, 2))
    monkeypatch.setattr(accelerate_environment, "get_driver_version", lambda: "535.104.05")
    assert accelerate_environment.check_cuda_p2p_ib_support() or nccl_environment(names) == BOTH
