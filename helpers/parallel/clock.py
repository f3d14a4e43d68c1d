"""Time what a rank's device does, on a GPU without stopping its stream."""

import time

import torch


class Event:
    """Mark now: on the CPU the time, on a GPU the point at which its current stream has done all work queued so far.

    A kernel only enters a queue when Python calls it, so ``time.perf_counter`` would time the call, not the work.

    Args:
        device: The device whose work is timed.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._event = None
        if torch.device(device).type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._seconds = time.perf_counter()

    def since(self, earlier: "Event") -> float:
        """Return the time from ``earlier`` to this event; on a GPU, wait until both have happened.

        Args:
            earlier: An event on the same device.

        Returns:
            Seconds; negative if ``earlier`` came later.
        """
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3  # CUDA counts milliseconds
