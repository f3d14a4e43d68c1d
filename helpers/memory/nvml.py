"""What the NVIDIA driver says about GPU memory: devices, used bytes, and a sampler for a curve over time.

NVML counts everything that occupies a GPU: CUDA contexts, NCCL buffers, the allocator's cache, other processes. It
needs no CUDA context of its own. Without a driver every function says so and gives ``None``; no number is made up.

    python -m helpers.memory.nvml      prints a table of the visible GPUs
"""

import atexit
import functools
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pynvml

from helpers.errors import UserError, exit_with_one_line
from helpers.memory.timeline import CurveRecorder, GpuCurve, Timeline
from helpers.memory.units import GIB


@dataclass(frozen=True)
class Device:
    """A GPU or MIG instance; ``index`` is the one that ``torch.device("cuda", index)`` means."""

    index: int
    name: str
    uuid: str
    capability: tuple[int, int]
    handle: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Memory:
    """One reading in bytes. ``reserved`` (driver and firmware) is not part of ``used``.

    A driver before 510 does not tell the two without_reserved: there ``reserved`` is None, and ``used`` includes it.
    """

    total: int
    used: int
    reserved: int | None


class Nvml:
    """A session with NVML through ``library`` (the ``pynvml`` module, or one that answers like it).

    ``unavailable`` is None, or the one line that says why there is no NVML.
    """

    def __init__(self, library: Any = pynvml) -> None:
        self._library = library
        self.errors: type[Exception] = library.NVMLError
        self.unavailable: str | None = None
        self.driver: str | None = None
        self.cuda: tuple[int, int] | None = None
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            self.unavailable = f"NVML: not available, no NVIDIA driver answers here ({error})"
            return
        self.driver = library.nvmlSystemGetDriverVersion()
        version = library.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is CUDA 13.0
        self.cuda = (version // 1000, version % 1000 // 10)

    def close(self) -> None:
        """End the session; NVML counts sessions, so others in this process go on."""
        if self.unavailable is None:
            self._library.nvmlShutdown()
            self.unavailable = "NVML: not available, the session is closed"

    def installed_names(self) -> list[str]:
        """Names of all GPUs of the machine, hidden ones included; empty without a driver."""
        return [self._library.nvmlDeviceGetName(handle) for handle in self._physical_handles()]

    def visible(self, environ: Mapping[str, str] | None = None) -> list[Device]:
        """The devices that a process with this ``CUDA_VISIBLE_DEVICES`` sees, in torch's order; empty without a driver.

        NVML numbers GPUs by PCI bus. CUDA does so when all are of one model, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
        """
        handles: dict[str, Any] = {}
        physical: dict[str, list[str]] = {}
        for handle in self._physical_handles():
            uuid = self._library.nvmlDeviceGetUUID(handle)
            instances = {self._library.nvmlDeviceGetUUID(mig): mig for mig in self._mig_handles(handle)}
            handles |= {uuid: handle} | instances
            physical[uuid] = list(instances)
        # Not a default argument: datasets' map with several processes puts another object in os.environ's place.
        environ = os.environ if environ is None else environ
        selected = select_uuids(environ.get("CUDA_VISIBLE_DEVICES"), physical)
        return [self._device(index, uuid, handles[uuid]) for index, uuid in enumerate(selected)]

    def memory(self, device: Device) -> Memory | None:
        """One reading (about 10 µs); None where the GPU shares the host's memory and NVML has no figure for it."""
        library = self._library
        try:
            try:
                info = library.nvmlDeviceGetMemoryInfo(device.handle, version=library.nvmlMemory_v2)
            except library.NVMLError_FunctionNotFound:
                info = library.nvmlDeviceGetMemoryInfo(device.handle)
                return Memory(info.total, info.used, None)
        except library.NVMLError_NotSupported:
            return None
        return without_reserved(info.total, info.used, info.free, info.reserved)

    def used_bytes(self, index: int) -> int | None:
        """Bytes in use on ``torch.device("cuda", index)`` by all processes; None where NVML has no figure."""
        if self.unavailable is not None:
            return None
        devices = self.visible()
        if not 0 <= index < len(devices):
            shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            raise UserError(f"no GPU {index}: {len(devices)} GPU(s) visible here (CUDA_VISIBLE_DEVICES: {shown})")
        reading = self.memory(devices[index])
        return reading.used if reading else None

    def _physical_handles(self) -> list[Any]:
        if self.unavailable is not None:
            return []
        return [self._library.nvmlDeviceGetHandleByIndex(i) for i in range(self._library.nvmlDeviceGetCount())]

    def _mig_handles(self, handle: Any) -> list[Any]:
        library = self._library
        try:
            if library.nvmlDeviceGetMigMode(handle)[0] != library.NVML_DEVICE_MIG_ENABLE:
                return []
        except library.NVMLError:  # a GPU that knows no MIG answers "not supported", an old driver "not found"
            return []
        found = []
        for slot in range(library.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                found.append(library.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
            except library.NVMLError_NotFound:  # slots may be empty
                continue
        return found

    def _device(self, index: int, uuid: str, handle: Any) -> Device:
        library = self._library
        # The capability belongs to the GPU, not to a slice of it.
        gpu = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if uuid.startswith("MIG-") else handle
        capability = tuple(library.nvmlDeviceGetCudaComputeCapability(gpu))
        return Device(index, library.nvmlDeviceGetName(handle), uuid, capability, handle)


@functools.cache
def open_nvml() -> Nvml:
    """This process's NVML session: opened by the first caller, ended when the process ends."""
    session = Nvml()
    atexit.register(session.close)
    return session


def select_uuids(selection: str | None, physical: Mapping[str, Sequence[str]]) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` selects, by CUDA's rules (CUDA Programming Guide, environment variables).

    ``physical`` maps each GPU's UUID, in NVML's order, to the UUIDs of its MIG instances (none when MIG is off).
    Entries are indices or beginnings of a UUID; the first invalid one ends the list, a repeated one empties it. A GPU
    in MIG mode stands for its first instance. A process sees one MIG instance at most (MIG user guide), and none
    beside whole GPUs that it sees.
    """

    def whole(uuid: str) -> str:
        return physical[uuid][0] if physical[uuid] else uuid

    known = [uuid for gpu, instances in physical.items() for uuid in (gpu, *instances)]
    if selection is None:
        chosen = [whole(uuid) for uuid in physical]
    else:
        chosen = []
        for entry in selection.split(","):
            number = re.match(r"\s*\+?(\d+)", entry)
            if number and int(number[1]) < len(physical):
                chosen.append(whole(list(physical)[int(number[1])]))
                continue
            prefix = entry.strip()
            matches = [uuid for uuid in known if uuid.startswith(prefix)]
            if not prefix.startswith(("GPU-", "MIG-")) or len(matches) != 1:
                break
            chosen.append(whole(matches[0]) if matches[0] in physical else matches[0])
        if len(set(chosen)) < len(chosen):
            return []
    gpus = [uuid for uuid in chosen if uuid in physical]
    return gpus or chosen[:1]


def without_reserved(total: int, used: int, free: int, reserved: int) -> Memory:
    """A version-2 reading with ``reserved`` outside ``used``.

    NVIDIA's documentation says of some driver versions that ``used`` includes ``reserved`` and of others that it does
    not; the sum tells which: the parts make up the total.
    """
    if abs(total - used - free) < abs(total - used - free - reserved):
        used -= reserved
    return Memory(total, used, reserved)


class Sampler:
    """Samples all visible GPUs from a thread of this process while a block runs.

        with Sampler() as sampler:
            subprocess.run(job)
        print(sampler.timeline().summary())

    ``hz`` samples a second, the first taken before the block begins and the last after it ended. A tick costs about
    10 µs per GPU; processes are never queried, which would stall the driver for milliseconds.
    """

    def __init__(self, nvml: Nvml | None = None, hz: float = 100.0) -> None:
        self._nvml = nvml or open_nvml()
        self._period = 1.0 / hz

    def __enter__(self) -> "Sampler":
        readings = {device: self._nvml.memory(device) for device in self._nvml.visible()}
        self._curves = [(device, memory.total, CurveRecorder()) for device, memory in readings.items() if memory]
        self._note = self._nvml.unavailable or _why_no_curve(readings)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="nvml-sampler", daemon=True)
        self._end: float | None = None
        self._start = time.time()
        self._clock = time.perf_counter()
        if self._curves:
            self._sample()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._curves:
            interrupted = self._stop.is_set()
            self._stop.set()
            self._thread.join()
            if not interrupted:
                self._sample()
        self._end = self._elapsed()

    def timeline(self) -> Timeline:
        """The curves so far, or of the whole block once it has ended."""
        with self._lock:
            gpus = [
                GpuCurve(device.index, device.name, total, list(curve.seconds), list(curve.used))
                for device, total, curve in self._curves
                if curve.used
            ]
        return Timeline(self._start, self._elapsed() if self._end is None else self._end, gpus, self._note)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._clock

    def _run(self) -> None:
        due = time.perf_counter()
        while True:
            # Ticks that were missed are left out, not made up for.
            due = max(due + self._period, time.perf_counter())
            if self._stop.wait(due - time.perf_counter()):
                return
            self._sample()

    def _sample(self) -> None:
        now = self._elapsed()
        try:
            readings = [self._nvml.memory(device) for device, _, _ in self._curves]
        except self._nvml.errors as error:
            self._note = f"NVML: stopped answering after {now:.1f} s ({error}); the curves end there"
            self._stop.set()
            return
        with self._lock:
            for (_, _, curve), reading in zip(self._curves, readings, strict=True):
                if reading:
                    curve.add(now, reading.used)


def _why_no_curve(readings: Mapping[Device, Memory | None]) -> str | None:
    if not readings:
        return "NVML: no GPU is visible to this process (see CUDA_VISIBLE_DEVICES)"
    silent = [f"GPU {device.index} {device.name}" for device, memory in readings.items() if memory is None]
    return f"NVML: memory not available on {', '.join(silent)}" if silent else None


def gpu_table(nvml: Nvml) -> str:
    """The visible GPUs with their memory in GiB, one line each, or the one line that says why there is none."""
    readings = {device: nvml.memory(device) for device in nvml.visible()}
    if not readings:
        return nvml.unavailable or str(_why_no_curve(readings))
    rows = [("GPU", "name", "used GiB", "total GiB", "reserved GiB")]
    for device, memory in readings.items():
        figures = (
            ("not available",) * 3 if memory is None else (_gib(memory.used), _gib(memory.total), _gib(memory.reserved))
        )
        rows.append((str(device.index), device.name, *figures))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _gib(amount: int | None) -> str:
    return "within used" if amount is None else f"{amount / GIB:.2f}"


if __name__ == "__main__":
    exit_with_one_line(lambda: print(gpu_table(open_nvml())))
