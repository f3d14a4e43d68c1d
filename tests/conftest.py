"""What several test files need: a small random checkpoint in the published layout, its tokenizer, a limit of time.

Markers divide the tests. `slow` is everything that starts ranks, a kernel or another Python (each imports torch and
more, for seconds) or computes for more than a second: what is left runs in a minute, while you edit (`make check`).
`campaign` is what repeats a test of the normal run many times to find a rare fault, for minutes (`make campaign`).
`gpu_memory` is what reads how much of a GPU is in use: where others run beside it, leave it for a run of its own.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Networks this small gain nothing from a second thread, and on busy cores threads wait for each other. Before numpy is
# imported, which starts a thread for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from rank_server import RankServer
from warm_kernels import NAME, WarmKernels

# Other imports are in the fixtures: pytest-xdist's first process needs none of them, and its workers wait for it.
if TYPE_CHECKING:
    from helpers.chatglm3 import ChatGLMTokenizer


# Seconds after which a process that a test waits for counts as hung. No test measures speed, so a slow or busy machine
# stretches it: TEST_TIME_FACTOR=10.
LIMIT = 300 * float(os.environ.get("TEST_TIME_FACTOR", 1))
GPUS = torch.cuda.device_count()
needs_no_gpu = pytest.mark.skipif(GPUS > 0, reason="there is a GPU here")
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare this process, and what it starts, for tests that run beside others."""
    executes = config.getoption("nbval_lax", False) and config.option.nbval_kernel_name is None
    if executes and GPUS == 0 and sys.platform == "linux":
        if not hasattr(config, "workerinput"):  # workers of pytest-xdist share it
            kernels = WarmKernels()
            config.add_cleanup(kernels.close)
            path = os.pathsep.join(filter(None, (kernels.jupyter_path, os.environ.get("JUPYTER_PATH"))))
            os.environ["JUPYTER_PATH"] = path
        config.option.nbval_kernel_name = NAME
        config.option.nbval_kernel_startup_timeout = LIMIT  # the first waits for the imports
    # Several tests send Ctrl-C. A shell lets what it runs in the background ignore it, children included.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: what a test starts must get its default back
        signal.signal(signal.SIGHUP, lambda *_: None)
    torch.set_num_threads(1)  # the launcher's tests change the variable
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # results of GPUs are compared in full fp32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put notebooks first, then files with slow tests: workers of pytest-xdist end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path not in slow))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> "ChatGLMTokenizer":
    """A tokenizer of about 400 pieces."""
    from small_chatglm import small_tokenizer

    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, tokenizer) -> Path:
    """Folder of a random checkpoint in the published layout, float32, with its tokenizer. Copy it to change it."""
    from small_chatglm import random_model, small_config

    folder = tmp_path_factory.mktemp("small_checkpoint")
    random_model(small_config(eos_token_id=tokenizer.stop_token_ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, small_checkpoint) -> Path:
    """Output folder of a run on ``small_checkpoint``: checkpoint-2 and checkpoint-10, and 20 that was not finished."""
    from small_chatglm import random_lora

    from helpers.finetune.checkpoints import describe_files, write_manifest

    output = tmp_path_factory.mktemp("small_run")
    for step in (2, 10):
        checkpoint = output / f"checkpoint-{step}"
        random_lora(small_checkpoint, seed=step).save_pretrained(checkpoint)
        write_manifest(checkpoint, describe_files(checkpoint, rank=0), {})
    (output / "checkpoint-20").mkdir()
    return output


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Forty rows to train on and six to answer."""
    from small_finetune import write_rows

    return write_rows(tmp_path_factory.mktemp("data"), train=40, dev=6)


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    """Starts ranks that need not import anything; see its docstring for what must start torchrun instead."""
    with RankServer(LIMIT) as server:
        yield server


@pytest.fixture
def on_the_cpu(monkeypatch) -> None:
    """Let code that chooses a device choose the CPU, also on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def deepspeed_on_the_cpu(monkeypatch, on_the_cpu) -> None:
    """Let DeepSpeed use the CPU in this process, also on a machine with a GPU."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(real_accelerator, "ds_accelerator", CPU_Accelerator())


@pytest.fixture
def progress_bars_afterwards() -> Iterator[None]:
    """Undo what a command that ran inside the test did for its own output."""
    import datasets
    import transformers

    yield
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
