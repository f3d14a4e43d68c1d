"""Import the slow third-party libraries once, in the server, so that each rank forked from it starts quickly.

Apart from ``helpers.launch`` and its imports, no module of ours is preloaded: an edited one takes effect at the next
launch. Nothing here may create a CUDA context. CUDA does not survive a fork, so no rank could use a GPU.
"""

import contextlib
import gc
import os

from helpers.libraries.quiet import ignore_import_warnings, name_deepspeed_accelerator

# While they are imported, torch and DeepSpeed check whether there is a GPU. Through NVML this creates no context.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def capability_from_nvml(device: object = None) -> tuple[int, int]:
    """Return the highest compute capability of this machine's GPUs; torch's own function would initialise CUDA."""
    import pynvml

    pynvml.nvmlInit()
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):  # a GPU that does not answer is left out everywhere
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                found.append(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
        return max(found)
    finally:
        pynvml.nvmlShutdown()


with ignore_import_warnings():
    import torch

    name_deepspeed_accelerator()

    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401

    # PEFT imports bitsandbytes, which chooses its CUDA library by the compute capability.
    get_device_capability, torch.cuda.get_device_capability = torch.cuda.get_device_capability, capability_from_nvml
    import peft  # noqa: F401

    torch.cuda.get_device_capability = get_device_capability
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import transformers
    import transformers.models.glm.modeling_glm
    import transformers.trainer  # noqa: F401

if torch.cuda.is_initialized():
    raise RuntimeError("a library that helpers/launch/preload.py imports initialises CUDA, so no rank could use a GPU")
# Forked processes share memory pages until one writes to them, and the garbage collector writes to every object it
# inspects. Freezing exempts the objects that exist now, so that ranks keep sharing them.
gc.collect()
gc.freeze()
