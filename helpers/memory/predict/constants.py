"""Measured constants: everything in a prediction that is not a formula, with the run that it was read from.

Calibrate here and nowhere else. Bytes unless it says otherwise.
"""

from helpers.memory.timeline import GIB

MIB = 2**20

# notebooks/results/finetune_6b.json, one H100, torch 2.11: NVML's peak less torch's reserved bytes is 1.306 GiB under
# DDP and ZeRO-2 (one communicator) and 1.802 GiB under ZeRO-3 (two: transformers' and DeepSpeed's). The difference is
# a communicator, the rest the context with the kernels that training loads.
NCCL_ONE_RANK = int(0.496 * GIB)
CUDA_CONTEXT = int(0.810 * GIB)
# Two H100s over NVLink: NVML before and after the first all-reduce, 1.08 and 1.90 GiB.
NCCL_SEVERAL_RANKS = int(0.82 * GIB)
# transformers sets DeepSpeed's ZeRO-3 up before torch's group is shared (the same runs).
ZERO_3_COMMUNICATORS = 2

# torch's default on Hopper, aten/src/ATen/cuda/CublasHandlePool.cpp: 4096 KiB x 8. Counted in torch's allocated bytes.
CUBLAS_WORKSPACE = 32 * MIB

# c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize, kSmallSize, kMinLargeAlloc, kLargeBuffer, kRoundLarge.
BLOCK = 512
SMALL = MIB
LARGE = 10 * MIB
LARGE_BUFFER = 20 * MIB
ROUND_LARGE = 2 * MIB

# Rows of different lengths in each batch leave holes that the next batch's tensors do not fit. finetune_6b.json:
# reserved less allocated is 1.60, 1.60, 1.46 and 1.50 GiB, with 3.53, 3.53, 3.46 and 5.00 GiB of activations: the mean.
FRAGMENTED_SHARE_OF_ACTIVATIONS = 0.40

# A choice, not a measurement: what a job that "fits" leaves free, for predictions are good to 5 %.
SAFETY_MARGIN_SHARE = 0.05
