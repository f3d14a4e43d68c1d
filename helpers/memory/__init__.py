"""Where the bytes go: what NVML sees of a GPU."""
