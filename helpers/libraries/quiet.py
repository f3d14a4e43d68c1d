"""Every library message that the course silences, and why: nobody who reads it here could act on it.

Imports no library until a function needs it, because ``helpers/__init__.py`` applies the list in every process.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# Parts of lines that libraries write to stderr from C++, where Python's filters do not see them.
SILENCED_LINES = (
    # The pipelines of torch and DeepSpeed also send outside of batches. NCCL then runs these messages one by one.
    "An unbatched P2P op (send/recv) was called on this ProcessGroup",
    # A barrier in a group that was not told its GPU. In ``run`` that is a group of one rank: the guess is right.
    "Guessing device ID based on global rank",
    # torch.profiler says when it starts and stops.
    "SyncActivityProfilerHandler.cpp",
)


def silence_warnings() -> None:
    """Silence the warnings of this list, in this process and in ranks forked from it."""
    # In a notebook without ipywidgets, tqdm warns on import that it draws its bars as text.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # Libraries that use each other's deprecated functions: only their authors can change that.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module="torch|transformers|peft|deepspeed|accelerate")
    # barrier() warns that it uses the current device, unless the group was told its GPU: one of a single rank is not,
    # nor is torchrun's. One process drives one GPU here, so the current device is the right one.
    warnings.filterwarnings("ignore", message=r"barrier\(\)", category=UserWarning)
    # bitsandbytes has a faster kernel for wider matrices; it warns about every matrix of the tiny model.
    warnings.filterwarnings("ignore", message=r"inner dimension .* is not aligned", category=UserWarning)
    # bitsandbytes, which PEFT imports, warns about some CPUs, and at 8 bits about each matrix in each forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # "dequantised to ...": the caller chose the type.
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed looks for CUDA's compiler even in a rank on the CPU, which has no use for it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers and datasets, which would fill a notebook or a log file."""
    import datasets
    import transformers

    name_deepspeed_accelerator()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def name_deepspeed_accelerator() -> None:
    """Set DeepSpeed's accelerator to "cpu" on machines without a GPU; otherwise it warns that it had to guess."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def ignore_import_warnings() -> Iterator[None]:
    """Ignore every warning of the imports in this block: they are about the libraries' own source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_jieba() -> ModuleType:
    """Import jieba without its warnings on escape sequences and pkg_resources, and without its start message."""
    with ignore_import_warnings():
        import jieba
    jieba.setLogLevel(logging.WARNING)
    return jieba
