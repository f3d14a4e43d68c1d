"""Which GPUs a process sees: the rules of ``CUDA_VISIBLE_DEVICES``."""

import re
from collections.abc import Mapping, Sequence


def select_uuids(selection: str | None, physical: Mapping[str, Sequence[str]]) -> list[str]:
    """Apply ``CUDA_VISIBLE_DEVICES`` by CUDA's rules (CUDA Programming Guide, environment variables).

    Entries are indices or the start of a UUID; the first invalid one ends the list, a repeated one empties it. A GPU in
    MIG mode means its first instance. A process sees at most one MIG instance (MIG user guide), and none if it sees
    full GPUs.

    Args:
        selection: The variable's value; None if it is not set.
        physical: Each GPU's UUID, in NVML's order, with the UUIDs of its MIG instances (none if MIG is off).

    Returns:
        UUIDs of the visible devices, in torch's order.
    """

    def device_uuid(uuid: str) -> str:
        return physical[uuid][0] if physical[uuid] else uuid

    known = [uuid for gpu, instances in physical.items() for uuid in (gpu, *instances)]
    if selection is None:
        chosen = [device_uuid(uuid) for uuid in physical]
    else:
        chosen = []
        for entry in selection.split(","):
            number = re.match(r"\s*\+?(\d+)", entry)
            if number and int(number[1]) < len(physical):
                chosen.append(device_uuid(list(physical)[int(number[1])]))
                continue
            prefix = entry.strip()
            matches = [uuid for uuid in known if uuid.startswith(prefix)]
            if not prefix.startswith(("GPU-", "MIG-")) or len(matches) != 1:
                break
            chosen.append(device_uuid(matches[0]) if matches[0] in physical else matches[0])
        if len(set(chosen)) < len(chosen):
            return []
    gpus = [uuid for uuid in chosen if uuid in physical]
    return gpus or chosen[:1]
