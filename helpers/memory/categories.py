"""Name the categories of memory, the same in every table and figure."""

# Categories of the ledger.
CATEGORIES = ("parameters", "gradients", "optimizer states", "buffers", "activations", "communication buffers")
# Memory that torch does not allocate.
OUTSIDE_TORCH = ("CUDA context", "NCCL")
# Items of a prediction.
ITEMS = (*CATEGORIES[:5], "logits and loss", CATEGORIES[5], *OUTSIDE_TORCH, "allocator allowance")
