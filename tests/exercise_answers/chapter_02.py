"""Wrong answers to the exercises of chapter 02: by judge, what the verdict says, and the code."""

WRONG = {
    "reduce_scatter": {
        "complete are []": "def reduce_scatter(parts):\n    pass",
        "should end with the sum of part": (  # one rank further
            "def reduce_scatter(parts):\n    rank, n = dist.get_rank(), dist.get_world_size()\n"
            "    for turn in range(n - 1):\n        parts[(rank - turn) % n] += pass_on(parts[(rank - turn + 1) % n])"
        ),
        "it called all-reduce": "def reduce_scatter(parts):\n    for part in parts:\n        dist.all_reduce(part)",
        "raised NameError: name 'pats' is not defined": (
            "def reduce_scatter(parts):\n    parts[0] += pass_on(pats[0])"
        ),
        "it does not return: rank 0": (
            "def reduce_scatter(parts):\n    if dist.get_rank() == 0:\n        pass_on(parts[0])"
        ),
    },
    "all_gather": {
        "still lacks the finished parts": (
            "def all_gather(parts):\n    rank, n = dist.get_rank(), dist.get_world_size()\n"
            "    for turn in range(n - 1):\n        parts[(rank - turn) % n] += pass_on(parts[(rank - turn + 1) % n])"
        ),
        "here a rank sent": (  # one round too many
            "def all_gather(parts):\n    rank, n = dist.get_rank(), dist.get_world_size()\n"
            "    for turn in range(n):\n        parts[(rank - turn) % n] = pass_on(parts[(rank - turn + 1) % n])"
        ),
    },
    "average_gradients": {
        "is off by": "def average_gradients(model):\n    for p in model.parameters():\n        dist.all_reduce(p.grad)",
        "sent": (  # twice
            "def average_gradients(model):\n    for p in model.parameters():\n        for _ in range(2):\n"
            "            p.grad /= dist.get_world_size()\n            dist.all_reduce(p.grad)"
        ),
    },
    "program": {
        "trained on 31 rows per epoch: its share of 31 is 16": ("sampler=sampler", "shuffle=True"),
        "no rank trained on 15 of 31 rows": ("DistributedSampler(data)", "DistributedSampler(data, rank=0)"),
        "in the same order in every epoch": ("sampler.set_epoch(epoch)", "pass"),
        "sent its gradients 2 times per step": ("nullcontext() if last else model.no_sync()", "nullcontext()"),
        "never averaged its gradients": ("nullcontext() if last else model.no_sync()", "model.no_sync()"),
        "the weights are off by": (" / micro_batches)", ")"),
        "rank 1 wrote the checkpoint as well": ("if dist.get_rank() == 0:", "if True:"),
        "the checkpoint has 'module.": ("model.module.state_dict()", "model.state_dict()"),
        "without leaving the process group": ("    dist.destroy_process_group()\n", ""),
        "raised KeyError: 'LOCAL_SIZE' (line 10 of start)": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        "is not Python": ("device = start()", "device = start("),
    },
    "lora_traffic": {
        "the adapter's megabytes are too many": "adapter_megabytes, full_megabytes = 30.3, 12487.2",
        "the full model's megabytes are too many": "adapter_megabytes, full_megabytes = 15.1, 24974.3",
    },
    "global_mean": {
        "is off by": "def global_mean(total, number):\n    return total / number",
        "it took 2 collectives": (
            "def global_mean(total, number):\n    number = torch.tensor(float(number))\n"
            "    dist.all_reduce(total)\n    dist.all_reduce(number)\n    return total / number"
        ),
        "rank 1 is off by": (
            "def global_mean(total, number):\n    both = torch.stack([total, torch.tensor(float(number))])\n"
            "    dist.reduce(both, 0)\n    return both[0] / both[1]"
        ),
    },
    "compressed_mean": {
        "rank 1's buffer is off": (
            "def compressed_mean(buffer):\n    small = (buffer / dist.get_world_size()).to(torch.bfloat16)\n"
            "    dist.all_reduce(small)\n    if dist.get_rank() == 0:\n        buffer.copy_(small)"
        ),
        "sent 100% of the bytes": (
            "def compressed_mean(buffer):\n    buffer /= dist.get_world_size()\n    dist.all_reduce(buffer)"
        ),
    },
    "two_level": {
        "use only the two groups": (
            "def two_level(x, inside, across):\n    dist.all_reduce(x)\n"
            "    dist.all_reduce(torch.zeros(4), group=across)"
        ),
        "to the other machine": (
            "def two_level(x, inside, across):\n    for g in (inside, across):\n        dist.all_reduce(x, group=g)"
        ),
        "does not have the sum": "def two_level(x, inside, across):\n    dist.all_reduce(x, group=inside)",
    },
}
