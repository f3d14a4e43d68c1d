"""Optimizer offload: Adam, its moments and fp32 master weights are in host memory; the device keeps the parameters.

Backward copies gradients to the host bucket by bucket, Adam runs there, and updated values are copied back
(ZeRO-Offload, Ren et al. 2021). Chapter 09 derives it.
"""

from helpers.parallel.offload.optimizer import OffloadedAdamW

__all__ = ["OffloadedAdamW"]
