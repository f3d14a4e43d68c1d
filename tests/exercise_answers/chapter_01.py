"""Wrong answers to the exercises of chapter 01: by judge, what the verdict says, and the code."""

WRONG = {
    "training_seconds": {
        "it is 0.75 times what it should be": ("8 * tokens", "6 * tokens"),
        "on 1024 GPUs, it is 1.02e+03 times": ("parameters / (gpus * rate)", "parameters / rate"),
    },
    "mixed_precision_step": {
        "the parameters take 4.00 bytes": ("dtype=torch.bfloat16", "dtype=torch.float32"),
        "with momentum, the gradients take 6.00": ("    optimizer.zero_grad()", "    masters[0].grad"),
        "raised RuntimeError": ("p.detach().float()", "p.detach().clone()"),
    },
    "budgets": {
        "the sum of maxima is not": ("largest |= parts", "largest += parts"),
        "the largest phase is not": (
            "max(sum(parts.values()) for parts in phases.values())",
            "sum(list(phases.values())[0].values())",
        ),
    },
    "gpus_needed": {
        "with 2, the states do not fit": "gpus_needed = 2",
        "with 4, fewer are enough": "gpus_needed = 4",
    },
    "with_momentum": {
        "but SGD was asked for": (
            "bytes_per_parameter = 16\n\n\ndef make_optimizer(masters):\n    return torch.optim.AdamW(masters)"
        ),
        "where is the momentum": (
            "bytes_per_parameter = 8\n\n\ndef make_optimizer(masters):\n    return torch.optim.SGD(masters, lr=1e-3)"
        ),
        "16 bytes are too many": ("bytes_per_parameter = 12", "bytes_per_parameter = 16"),
    },
    "most_sequences": {
        "one more does as well": "def most_sequences():\n    return 1",
        "1000 sequences do not fit": "def most_sequences():\n    return 1000",
        "None is not a number": "def most_sequences():\n    pass",
    },
    "evaluate": {
        "are still kept": ("@torch.no_grad()\n", ""),
        "on the way": (
            "def evaluate(network, batches):\n    return [network(input_ids=i, labels=i).loss.item() for i in batches]"
        ),
        "no longer the same": "def evaluate(network, batches):\n    return [0, 0, 0]",
    },
}
