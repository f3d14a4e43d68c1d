"""Moments on the device of a rank: when the work that was asked for before them is done."""

import time

import torch


class Moment:
    """Now on the CPU; on a GPU, when its current stream has done what it was given so far."""

    def __init__(self, device: torch.device | str) -> None:
        self._event = None
        if torch.device(device).type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._seconds = time.perf_counter()

    def since(self, earlier: "Moment") -> float:
        """Seconds from ``earlier``, a moment on the same device, to this one; waits until both have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3
