"""Frozen weights in 8 or 4 bits under a LoRA adapter, as chapter 12 derives them.

``formats`` implements three number formats as tensor arithmetic, ``library`` configures bitsandbytes as the fine-tune
uses it (through transformers and PEFT), ``network`` builds the course's network with quantised matrices. ``fp8``
multiplies in 8 bits, and ``fp8_loading`` rounds a checkpoint to them.
"""
