"""Say when DeepSpeed is about to compile an extension, and find the lock of a compilation that was killed."""

import os
import time
from pathlib import Path
from typing import Any

from helpers.errors import UserError

PATIENCE_SECONDS = 180.0  # no step of a compilation leaves its folder unchanged for longer


def needed_extensions(deepspeed: dict[str, Any] | None) -> list[str]:
    """Name the extensions that DeepSpeed compiles for this configuration when it is first used."""
    zero = (deepspeed or {}).get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    blocks = [zero.get("offload_optimizer"), zero.get("offload_param")]
    devices = [block.get("device") if isinstance(block, dict) else None for block in blocks]
    adam = ["cpu_adam"] if devices[0] in ("cpu", "nvme") else []
    return adam + (["async_io"] if "nvme" in devices else [])


def check_extensions(deepspeed: dict[str, Any] | None, patience: float = PATIENCE_SECONDS) -> list[str]:
    """Wait for another job that compiles the same extension, but not for one that was killed.

    Args:
        deepspeed: The DeepSpeed configuration; None without DeepSpeed.
        patience: Seconds after which a locked folder that nobody changes is taken for abandoned.

    Returns:
        A line for each extension that will be compiled.

    Raises:
        UserError: A lock is left over. Torch would wait for its end for ever.
    """
    from torch.utils.cpp_extension import get_default_build_root

    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(own or get_default_build_root())
    notes = []
    for name in needed_extensions(deepspeed):
        folders = [folder for folder in root.glob(name if own else f"*/{name}") if folder.is_dir()]
        for folder in folders:
            if (folder / "lock").exists() and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"waiting for {folder / 'lock'}: another job seems to compile {name}", flush=True)
            while (folder / "lock").exists():
                if time.time() - _last_change(folder) > patience:
                    raise UserError(
                        f"{folder / 'lock'} is left over from a compilation that was killed (unchanged for "
                        f"{patience:.0f} s), and DeepSpeed would wait for it without end; delete it"
                    )
                time.sleep(min(1.0, patience))
        if not any((folder / f"{name}.so").exists() for folder in folders):
            notes.append(f"compiling DeepSpeed's {name} before the first step, which takes up to a few minutes")
    return notes


def _last_change(folder: Path) -> float:
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # the other job goes on
            continue
    return max(times)
