"""Wrong answers to the exercises of chapter 13: by judge, what the verdict says, and the answer."""

OBJECTS = """
def sum_together(metrics):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, metrics)
    return {name: sum(other[name] for other in everyone) for name in metrics}
"""

WRONG = {
    "mean_everywhere": {
        "rank 1 gets nothing": (  # the hang is mended, and the number is still on one rank
            "    return total.item() / dist.get_world_size()",
            "    if dist.get_rank() == 0:\n        return total.item() / dist.get_world_size()",
        ),
        "rank 0 gets 6.5, which is not the mean": ("total.item() / dist.get_world_size()", "total.item()"),
        "[1.0, 0.5, 6.0], rank 0 gets 3.75": ("dist.get_world_size()", "2"),
        "it overwrites the loss": ("loss.detach().clone()", "loss"),
        "rank 1 gets 2, which": ("all_reduce(total)", "reduce(total, 0)"),
    },
    "sum_together": {
        "which is not that metric's sum": ("sorted(metrics)", "list(metrics)"),
        "took 2 collectives": (
            "    dist.all_reduce(summed)\n",
            "    for one in summed.split(1):\n        dist.all_reduce(one)\n",
        ),
        "took 2 collectives, and one is": OBJECTS,
        "it overwrites the metrics": (
            "    return dict(zip(names, summed.tolist()))",
            "    metrics.update(zip(names, summed.tolist()))\n    return metrics",
        ),
        "rank 0 gets a list": ("dict(zip(names, summed.tolist()))", "summed.tolist()"),
    },
    "suspect": {
        "a rank that waits is a victim": "your_suspect = 0",
        "not one of the four ranks": "your_suspect = 4",
    },
    "first_bad_rank": {
        "it does not return: rank 0 had returned, rank 1 waits in all_reduce": (
            "    dist.all_reduce(mine, op=dist.ReduceOp.MIN)\n",
            "    if not loss.isfinite():\n        dist.all_reduce(mine, op=dist.ReduceOp.MIN)\n",
        ),
        "with the losses [3.0, nan], rank 0 gets -1": ("    dist.all_reduce(mine, op=dist.ReduceOp.MIN)\n", ""),
        "[-inf, 1.0, nan], rank 0 gets 2": ("loss.isfinite()", "not loss.isnan()"),
        "with the losses [2.0, 1.5], rank 0 gets 2": ("-1 if mine.item() == size else mine.item()", "mine.item()"),
        "collectives, and one is enough": (
            "    dist.all_reduce(mine, op",
            "    dist.all_reduce(mine, op=dist.ReduceOp.MIN)\n    dist.all_reduce(mine, op",
        ),
        "with the losses [-inf, 1.0, nan], rank 0 gets 2": (
            "    size = dist.get_world_size()\n"
            "    mine = torch.tensor(size if loss.isfinite() else dist.get_rank(), device=device())\n"
            "    dist.all_reduce(mine, op=dist.ReduceOp.MIN)\n"
            "    return -1 if mine.item() == size else mine.item()",
            "    mine = torch.tensor(-1 if loss.isfinite() else dist.get_rank(), device=device())\n"
            "    dist.all_reduce(mine, op=dist.ReduceOp.MAX)\n"
            "    return mine.item()",
        ),
        "it overwrites the loss": ("    return -1", "    loss.nan_to_num_()\n    return -1"),
    },
    "common_steps": {
        "another rank cannot keep up": ("MIN", "MAX"),
        "rank 0 would make 7 steps": "def common_steps(mine):\n    return mine",
        "all of them can make more": ("return steps.item()", "return steps.item() - 1"),
        "range needs a whole number": ("torch.tensor(mine,", "torch.tensor(float(mine),"),
        "[6, 9, 0] batches, rank 0 would make 6 steps": (  # the first rank's number, which is not always the least
            "    dist.all_reduce(steps, op=dist.ReduceOp.MIN)\n",
            "    pair = [torch.empty_like(steps) for _ in range(dist.get_world_size())]\n"
            "    dist.all_gather(pair, steps)\n"
            "    steps = torch.minimum(pair[0], pair[1])\n",
        ),
    },
    "hidden_share": {
        "[(2, 4)], a share of 0.2 is too small": (  # of compute
            "sum(end - begin for begin, end in sends)",
            "sum(end - begin for begin, end in computes)",
        ),
        "a share is between 0 and 1": ("max(0, min(e1, e2) - max(b1, b2))", "min(e1, e2) - max(b1, b2)"),
        "it returns 100": ("return hidden /", "return 100 * hidden /"),
        "a share of 0.333 is too small": (  # each message beside one block of compute only
            "for b1, e1 in computes for b2, e2 in sends",
            "for (b1, e1), (b2, e2) in zip(computes, sends)",
        ),
    },
}
