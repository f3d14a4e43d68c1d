"""Imported once, by the process that all ranks are forked from: what takes seconds to import, and nothing that is ours.

Nothing here may create a CUDA context, or no rank could use a GPU: CUDA does not survive a fork.
"""

import gc
import os

from helpers.libraries.quiet import ignore_import_warnings, name_deepspeed_accelerator

# torch and DeepSpeed ask whether there is a GPU while they are imported; through NVML this creates no context.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def capability_from_nvml(device: object = None) -> tuple[int, int]:
    """The highest compute capability of this machine's GPUs; torch's own answer would initialise CUDA."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return max(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


with ignore_import_warnings():
    import torch

    name_deepspeed_accelerator()

    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401

    # PEFT imports bitsandbytes, which chooses its CUDA library by this.
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
# What is here stays for good: a collection in a rank would only make it copy pages that it shares with the others.
gc.collect()
gc.freeze()
