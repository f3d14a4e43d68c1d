"""Read GPU memory from the NVIDIA driver: devices, and bytes in use.

NVML counts everything that occupies a GPU: CUDA contexts, NCCL buffers, the allocator's cache, other processes. It
needs no CUDA context of its own. Without a driver every function returns None or a line that explains it; no number is
made up.

    python -m helpers.memory.nvml      prints a table of the visible GPUs
"""

import atexit
import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml

from helpers.errors import UserError, exit_with_one_line
from helpers.memory.table import Table
from helpers.memory.units import GIB
from helpers.memory.visible import select_uuids


@dataclass(frozen=True)
class Device:
    """A GPU or MIG instance.

    Attributes:
        index: Its number in ``torch.device("cuda", index)``.
        name: Of the model.
        uuid: The driver's identifier, which begins with "GPU-" or "MIG-".
        capability: CUDA compute capability, (major, minor).
        handle: NVML's handle.
    """

    index: int
    name: str
    uuid: str
    capability: tuple[int, int]
    handle: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Memory:
    """One reading in bytes.

    Attributes:
        total: Memory of the GPU.
        used: Bytes in use by all processes.
        reserved: Bytes of driver and firmware, not part of ``used``. None for drivers before 510, which include them in
            ``used``.
    """

    total: int
    used: int
    reserved: int | None


class Nvml:
    """A session with NVML.

    ``unavailable`` is None, or one line that explains why NVML is missing; ``driver`` and ``cuda`` are its versions.
    ``notes`` has a line for each GPU that does not answer.

    Args:
        library: The ``pynvml`` module, or a stand-in.
    """

    def __init__(self, library: Any = pynvml) -> None:
        self._library = library
        self.errors: type[Exception] = library.NVMLError
        self.unavailable: str | None = None
        self.driver: str | None = None
        self.cuda: tuple[int, int] | None = None
        self.notes: list[str] = []
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            self.unavailable = f"NVML: not available, no NVIDIA driver answers here ({error})"
            return
        with contextlib.suppress(library.NVMLError):  # what is not known stays None
            self.driver = library.nvmlSystemGetDriverVersion()
            version = library.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is CUDA 13.0
            self.cuda = (version // 1000, version % 1000 // 10)

    def close(self) -> None:
        """End the session. NVML counts sessions: others in this process continue."""
        if self.unavailable is None:
            self._library.nvmlShutdown()
            self.unavailable = "NVML: not available, the session is closed"

    def installed_names(self) -> list[str]:
        """List the names of all GPUs of the machine, hidden ones included; empty without a driver."""
        names = []
        for index, handle in enumerate(self._physical_handles()):
            try:
                names.append("unknown GPU" if handle is None else self._library.nvmlDeviceGetName(handle))
            except self.errors as error:
                self._note(index, error)
                names.append("unknown GPU")
        return names

    def visible(self, environ: Mapping[str, str] | None = None) -> list[Device]:
        """List the devices that a process with this ``CUDA_VISIBLE_DEVICES`` sees, in torch's order.

        NVML numbers GPUs by PCI bus. CUDA does so if all are of one model, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.

        A GPU that does not answer is left out, with a line in ``notes``; the others keep their index.

        Args:
            environ: Environment of the process; None is this process's own.

        Returns:
            The devices; none without a driver.
        """
        handles: dict[str, Any] = {}
        physical: dict[str, list[str]] = {}
        for index, handle in enumerate(self._physical_handles()):
            try:
                uuid = "" if handle is None else self._library.nvmlDeviceGetUUID(handle)
                migs = [] if handle is None else self._mig_handles(handle)
                instances = {self._library.nvmlDeviceGetUUID(mig): mig for mig in migs}
            except self.errors as error:
                self._note(index, error)
                uuid, instances = "", {}
            if uuid:
                handles |= {uuid: handle} | instances
            # Even one that is silent has its number in CUDA_VISIBLE_DEVICES.
            physical[uuid or f"silent {index}"] = list(instances)
        # Not a default argument: datasets' map with several processes puts another object in os.environ's place.
        environ = os.environ if environ is None else environ
        selected = select_uuids(environ.get("CUDA_VISIBLE_DEVICES"), physical)
        devices = []
        for index, uuid in enumerate(selected):
            try:
                devices += [self._device(index, uuid, handles[uuid])] if uuid in handles else []
            except self.errors as error:
                gpus = [number for number, gpu in enumerate(physical) if uuid in (gpu, *physical[gpu])]
                self._note(gpus[0], error)
        return devices

    def memory(self, device: Device) -> Memory | None:
        """Read a device (about 10 µs); None if it shares the host's memory, for which NVML has no number.

        Raises NVML's error if the device does not answer.
        """
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

    def first_reading(self, device: Device) -> Memory | None:
        """Read a device; None if NVML has no number for it, for whatever reason."""
        try:
            return self.memory(device)
        except self.errors:
            return None

    def used_bytes(self, index: int) -> int | None:
        """Return the bytes in use on ``torch.device("cuda", index)`` by all processes; None if NVML has no number."""
        if self.unavailable is not None:
            return None
        devices = {device.index: device for device in self.visible()}
        if index not in devices:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            raise UserError(f"no GPU {index}: {len(devices)} GPU(s) visible here (CUDA_VISIBLE_DEVICES: {shown})")
        reading = self.first_reading(devices[index])
        return reading.used if reading else None

    def _physical_handles(self) -> list[Any]:
        """Return the handle of every GPU in NVML's order; None for one that does not answer."""
        if self.unavailable is not None:
            return []
        handles = []
        for index in range(self._library.nvmlDeviceGetCount()):
            try:
                handles.append(self._library.nvmlDeviceGetHandleByIndex(index))
            except self.errors as error:
                self._note(index, error)
                handles.append(None)
        return handles

    def _note(self, index: int, error: Exception) -> None:
        line = f"GPU {index} does not answer NVML and is left out ({error}); nvidia-smi shows its state"
        if line not in self.notes:
            self.notes.append(line)

    def _mig_handles(self, handle: Any) -> list[Any]:
        library = self._library
        try:
            if library.nvmlDeviceGetMigMode(handle)[0] != library.NVML_DEVICE_MIG_ENABLE:
                return []
        except library.NVMLError:  # a GPU without MIG answers "not supported", an old driver "not found"
            return []
        found = []
        for slot in range(library.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                found.append(library.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
            except library.NVMLError:  # "not found": slots may be empty
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
    """Open this process's NVML session, or return the one that is open.

    Returns:
        The session, which ends with the process.
    """
    session = Nvml()
    atexit.register(session.close)
    return session


def without_reserved(total: int, used: int, free: int, reserved: int) -> Memory:
    """Make a reading whose ``used`` does not include ``reserved``.

    According to NVIDIA's documentation some driver versions include it and others do not. The sum of the parts shows
    which: they make up the total.
    """
    if abs(total - used - free) < abs(total - used - free - reserved):
        used -= reserved
    return Memory(total, used, reserved)


def no_figures(readings: Mapping[Device, Memory | None]) -> str | None:
    """Explain in one line why some GPUs have no reading; None if all have one."""
    if not readings:
        return "NVML: no GPU is visible to this process (see CUDA_VISIBLE_DEVICES)"
    silent = [f"GPU {device.index} {device.name}" for device, memory in readings.items() if memory is None]
    return f"NVML: memory not available on {', '.join(silent)}" if silent else None


def gpu_table(nvml: Nvml) -> str:
    """List the visible GPUs with their memory in GiB, or explain in one line why none is visible."""
    readings = {device: nvml.first_reading(device) for device in nvml.visible()}
    if not readings:
        return nvml.unavailable or "\n".join(nvml.notes) or str(no_figures(readings))
    rows = []
    for device, memory in readings.items():
        figures = ["not available"] * 3
        if memory is not None:
            figures = [_gib(memory.used), _gib(memory.total), _gib(memory.reserved)]
        rows.append([str(device.index), device.name, *figures])
    table = Table(["GPU", "name", "used GiB", "total GiB", "reserved GiB"], rows, text_columns=2)
    return "\n".join([str(table), *nvml.notes])


def _gib(amount: int | None) -> str:
    return "within used" if amount is None else f"{amount / GIB:.2f}"


if __name__ == "__main__":
    exit_with_one_line(lambda: print(gpu_table(open_nvml())))
