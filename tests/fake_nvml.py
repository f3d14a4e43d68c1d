"""A stand-in for the pynvml module: the calls that helpers.memory.nvml makes, on GPUs that a test describes."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

GIB = 2**30


@dataclass
class FakeGpu:
    """``used`` are the bytes of successive readings, the last of them for ever; ``mig`` are instances (MIG mode on)."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    used: list[int] = field(default_factory=lambda: [GIB])
    total: int = 80 * GIB
    reserved: int = GIB // 2
    capability: tuple[int, int] = (9, 0)
    mig: list["FakeGpu | None"] | None = None
    used_includes_reserved: bool = False
    parent: "FakeGpu | None" = None
    failure: Exception | None = None  # of memory readings
    lost_at: str | None = None  # the first call that fails: "handle", "uuid", "name" or "capability"
    readings: int = 0

    def __post_init__(self):
        for instance in self.mig or []:
            if instance:
                instance.parent = self


class FakeNvml:
    """Handles are the FakeGpu objects themselves; real error classes, so that ``except`` clauses are the real ones."""

    NVMLError = pynvml.NVMLError
    NVMLError_FunctionNotFound = pynvml.NVMLError_FunctionNotFound
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVMLError_NotFound = pynvml.NVMLError_NotFound
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE
    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def __init__(self, gpus=(), driver="580.65.06", cuda=13000, has_version_2=True, no_driver=False):
        self.gpus = list(gpus)
        self.driver, self.cuda, self.has_version_2, self.no_driver = driver, cuda, has_version_2, no_driver
        self.sessions = 0

    def nvmlInit(self):
        if self.no_driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.sessions += 1

    def nvmlShutdown(self):
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self.cuda

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def _answer(self, gpu, call):
        if gpu.lost_at == call:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def nvmlDeviceGetHandleByIndex(self, index):
        self._answer(self.gpus[index], "handle")
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu):
        self._answer(gpu, "uuid")
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu):
        self._answer(gpu, "name")
        return gpu.name

    def nvmlDeviceGetCudaComputeCapability(self, gpu):
        self._answer(gpu, "capability")
        if gpu.parent:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return gpu.capability

    def nvmlDeviceGetMigMode(self, gpu):
        if gpu.capability < (8, 0):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [0 if gpu.mig is None else 1, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return len(gpu.mig)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, slot):
        if gpu.mig[slot] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return gpu.mig[slot]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance):
        return instance.parent

    def nvmlDeviceGetMemoryInfo(self, gpu, version=None):
        if version and not self.has_version_2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        if gpu.failure:
            raise gpu.failure
        used = gpu.used[min(gpu.readings, len(gpu.used) - 1)]
        gpu.readings += 1
        free = gpu.total - gpu.reserved - used
        if version is None:
            return SimpleNamespace(total=gpu.total, used=used + gpu.reserved, free=free)
        shown = used + gpu.reserved if gpu.used_includes_reserved else used
        return SimpleNamespace(total=gpu.total, used=shown, free=free, reserved=gpu.reserved)


def h100s(count):
    return [FakeGpu(f"GPU-{index}{index}{index}{index}-h100") for index in range(count)]
