"""Frozen weights in 8 or 4 bits under a LoRA adapter: what chapter 12 derives.

formats.py holds the three formats as arithmetic, library.py what the job uses (bitsandbytes, through transformers and
PEFT), network.py the course's network with quantised matrices.
"""
