"""Hold the measured constants: everything in a prediction that is not a formula, with the run that gave it.

Calibrate here only. In bytes, unless stated otherwise.
"""

from helpers.memory.units import GIB, MIB

# One H100, torch 2.11: NVML less torch's reserved bytes of a process without NCCL. 527 MiB when CUDA has started; each
# library and kernel that is loaded adds to it. After training: 0.73 to 0.75 GiB in nine configurations
# (notebooks/results/prediction.json).
CUDA_CONTEXT = int(0.74 * GIB)
# The same process before and after its first all-reduce in a group of one rank: 911 and 1473 MiB.
NCCL_ONE_RANK = 562 * MIB
# Two H100s over NVLink: NVML before and after the first all-reduce, 1.08 and 1.90 GiB. In
# finetune_6b.json, one communicator serves DDP, ZeRO-2 and ZeRO-3: 1.56 to 1.58 GiB outside torch with the context.
NCCL_SEVERAL_RANKS = int(0.82 * GIB)
# The same with 4 channels and buffers of 1 MiB: "least memory" in offload_6b.json, 1.25 GiB outside torch.
NCCL_SMALL_BUFFERS = int(0.51 * GIB)
# torch's default on Hopper, aten/src/ATen/cuda/CublasHandlePool.cpp: 4096 KiB x 8. Counted in torch's allocated bytes.
CUBLAS_WORKSPACE = 32 * MIB
# A workspace belongs to a handle and a handle to a thread: the caller's, and autograd's (the same file).
CUBLAS_THREADS = 2

# What a layer keeps of a pack, per token, beyond what the formulas explain: lora_fast.yaml and lora_24gb.yaml in
# finetune_6b.json, 50 to 90 if compiled, 300 to 430 if not; two packs a step in speed_6b.json, 300.
PACKED_BYTES_PER_TOKEN = 300

# With the default allocator, sequences of different lengths in each batch leave holes that the next batch's tensors do
# not fit. The 6B job on one H100 (DDP, ZeRO-2 with small and published buckets, ZeRO-3): reserved less allocated was
# 1.60, 1.60, 1.46 and 1.50 GiB, with 3.53, 3.53, 3.46 and 5.00 GiB of activations: the mean. It depends on which
# lengths follow each other: prediction.json has shares from 0.1 to 0.8. Growing segments leave hardly any.
FRAGMENTED_SHARE_OF_ACTIVATIONS = 0.40

# A choice, not a measurement: the share that a job that "fits" leaves free, because predictions are good to 5 %.
SAFETY_MARGIN_SHARE = 0.05

# The largest errors of the committed runs on one H100 (prediction.json, prediction_validation.json), as shares of the
# prediction: how much more a run needed, and how much less. tests/test_predict.py computes them again.
ERRORS_EXPANDABLE = (0.06, 0.03)
ERRORS_DEFAULT_ALLOCATOR = (0.13, 0.05)
# The same for predictions with a simulated allocator (prediction_traced.json).
ERRORS_TRACED = (0.005, 0.027)
# ZeRO-3's prefetch leaves holes that nothing here derives. The 6B job with checkpointing on two H100s, limits of 2e8,
# a prefetch of 5e7: NVML 9.43 GiB, predicted 8.52. Without a prefetch 8.61, predicted 8.50.
PREFETCHED_TOO_LOW = 0.11
# In prediction_validation.json, one H100: ZeRO-2 with an offloaded optimizer needed up to 18 % more than predicted.
# These are free blocks, which nothing here derives.
OFFLOADED_TOO_LOW = 0.18
# ZeRO-1 with all parameters trained: of the drawn configurations, traced.py finds up to 6.5 % more than the formulas.
ZERO_1_FULL_TOO_LOW = 0.07
# ZeRO-2 with all parameters trained: traced.py finds up to 12.8 % less (the 6B model, two GPUs, 40 x 64 tokens).
ZERO_2_FULL_TOO_HIGH = 0.13
# ZeRO-3 with the default allocator: traced.py finds up to 24.6 % more (two GPUs, LoRA, checkpointing, rows differ).
ZERO_3_DEFAULT_ALLOCATOR_TOO_LOW = 0.25
