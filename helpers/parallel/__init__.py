"""Parallelism and ZeRO as chapters 02 to 09 derive them, one module per technique, and the network that they train."""
