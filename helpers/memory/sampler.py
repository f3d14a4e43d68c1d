"""Sample the memory of all visible GPUs from a thread, for a curve over time."""

import threading
import time
from types import TracebackType

from helpers.memory.nvml import Nvml, no_figures, open_nvml
from helpers.memory.timeline import CurveRecorder, GpuCurve, Timeline


class Sampler:
    """Sample all visible GPUs from a thread of this process while a block runs.

        with Sampler() as sampler:
            subprocess.run(job)
        print(sampler.timeline().summary())

    The first sample is taken before the block begins and the last after it ended. A sample costs about 10 µs per GPU;
    processes are never queried, which would stall the driver for milliseconds.

    Args:
        nvml: The session to read from; None opens this process's own.
        hz: Samples per second.
    """

    def __init__(self, nvml: Nvml | None = None, hz: float = 100.0) -> None:
        self._nvml = nvml or open_nvml()
        self._period = 1.0 / hz

    def __enter__(self) -> "Sampler":
        readings = {device: self._nvml.first_reading(device) for device in self._nvml.visible()}
        self._curves = [(device, memory.total, CurveRecorder()) for device, memory in readings.items() if memory]
        self._note = self._nvml.unavailable or "; ".join(self._nvml.notes) or no_figures(readings)
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
        """Return the curves.

        Returns:
            The samples so far; once the block has ended, those of the whole block.
        """
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
            # Missed samples are skipped, not caught up.
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
