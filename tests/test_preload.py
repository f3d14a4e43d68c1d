"""What ranks are forked from must not initialise CUDA, also where bitsandbytes looks for a GPU when it is imported."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys

import pynvml
import torch

asked = []
# Only bitsandbytes finds GPUs; torch's own parts would use them.
torch.cuda.is_available = lambda: sys._getframe(1).f_globals["__name__"].startswith("bitsandbytes")
torch.cuda.device_count = lambda: 2
torch.version.cuda = "13.0"
torch.cuda.get_device_capability = lambda *_: asked.append("torch") or (9, 0)
torch._C._cuda_getCurrentRawStream = None  # imported, not called
pynvml.nvmlInit = pynvml.nvmlShutdown = lambda: None
pynvml.nvmlDeviceGetCount = lambda: 2
pynvml.nvmlDeviceGetHandleByIndex = lambda index: index
pynvml.nvmlDeviceGetCudaComputeCapability = lambda handle: asked.append("NVML") or [8, 6 + handle]
import helpers.launch.preload
from bitsandbytes.cuda_specs import get_cuda_specs

assert set(asked) == {"NVML"}, asked
assert helpers.launch.preload.capability_from_nvml() == (8, 7)
get_cuda_specs()
assert asked[-1] == "torch"  # afterwards torch answers again
print("fine")
"""


@pytest.mark.slow
def test_bitsandbytes_asks_nvml_and_not_cuda():
    finished = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert finished.stdout.endswith("fine\n"), finished.stderr[-3000:]
