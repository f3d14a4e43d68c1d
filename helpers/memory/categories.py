"""The names under which the course counts and predicts bytes; the same ones in every table and figure."""

# What the ledger tells apart.
CATEGORIES = ("parameters", "gradients", "optimizer states", "buffers", "activations", "communication buffers")
# What lies outside of the memory that torch allocates.
OUTSIDE_TORCH = ("CUDA context", "NCCL")
# What a prediction tells apart.
ITEMS = (*CATEGORIES[:5], "logits and loss", CATEGORIES[5], *OUTSIDE_TORCH, "allocator rounding")
