"""Bytes that the ranks of this machine send one another, as the system counted them."""

from pathlib import Path

INTERFACES = Path("/proc/net/dev")


def loopback_bytes() -> int | None:
    """Bytes sent over the loopback interface since the machine started, by all processes; None where nothing says so.

    gloo sends through it. NCCL does not: between GPUs of one machine it uses NVLink, PCIe or shared memory.
    """
    if not INTERFACES.is_file():
        return None
    for line in INTERFACES.read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])  # eight counters of what was received come first
    return None
