"""Imported once, by the process that all ranks are forked from: what takes seconds to import, and nothing that is ours.

Nothing here may create a CUDA context, or no rank could use a GPU: CUDA does not survive a fork.
"""

import gc
import os
import warnings

# torch and DeepSpeed ask whether there is a GPU while they are imported; through NVML this creates no context.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise warns that it had to guess

import accelerate  # noqa: E402, F401
import datasets  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch._dynamo  # noqa: E402  (the first optimizer step imports it)
import torch.distributed.fsdp  # noqa: E402
import torch.distributed.tensor  # noqa: E402
import transformers  # noqa: E402
import transformers.models.glm.modeling_glm  # noqa: E402
import transformers.trainer  # noqa: E402, F401

warnings.resetwarnings()
# What is here stays for good: a collection in a rank would only make it copy pages that it shares with the others.
gc.collect()
gc.freeze()
