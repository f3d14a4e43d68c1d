"""Activation memory: recompute it, keep it on the host, or never make it (chapter 11).

This file imports nothing, so that the memory prediction can read the limit below without torch.
"""

# Bytes of checkpointed layer inputs that may be on their way to host memory, or back, besides the one in use
# (``max_in_flight_bytes`` of OffloadedActivations in a job). A choice: those of 4 layers with 2,048 tokens of the 6B
# model.
CHECKPOINT_BYTES_IN_FLIGHT = 2**26
