"""Activation memory: recompute it, keep it on the host, or never make it (chapter 11)."""
