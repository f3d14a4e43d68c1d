"""Wrong answers to the exercises of chapter 05: by judge, what the verdict says, and the answer."""

WRONG = {
    "rank_of": {
        "on a mesh of (2, 3, 4)": (  # right for a cube
            "return (pipeline * sizes[1] + data) * sizes[2] + tensor",
            "return (pipeline * 2 + data) * 2 + tensor",
        ),
        "tensor runs fastest": (
            "return (pipeline * sizes[1] + data) * sizes[2] + tensor",
            "return (tensor * sizes[1] + data) * sizes[0] + pipeline",
        ),
    },
    "groups": {
        "every group should have": (
            "def groups(axis, sizes):\n    return [(rank,) for rank in range(sizes[0] * sizes[1] * sizes[2])]"
        ),
        "in exactly one group": ("range, sizes)", "range, (2, 2, 2))"),
        "in their place on this axis only": (  # neighbours in number, on every axis
            "def groups(axis, sizes):\n    n = sizes[('pipeline', 'data', 'tensor').index(axis)]\n"
            "    ranks = range(sizes[0] * sizes[1] * sizes[2])\n"
            "    return [tuple(ranks[i : i + n]) for i in range(0, len(ranks), n)]"
        ),
    },
    "my_part": {
        "times its equal part of the parameters": ("    parallelize(model, tensor)\n", ""),
        "rank 1 has the stages [0] but": ("[dist.get_rank(pipeline)]", "[0]"),
        "a weight is off": ("build(TINY, device())", "build(TINY, device(), seed=1)"),
    },
    "step_in_3d": {
        "its share of": ("ids.chunk(dist.get_world_size(data))[dist.get_rank(data)]", "ids"),
        "after step 1 a weight is off": ("    average_gradients(stage.parameters(), data)\n", ""),
        "after step 2 a weight is off": ("    optimizer.zero_grad()\n", ""),
        "average each gradient once": (
            "    average_gradients(stage.parameters(), data)\n",
            "    average_gradients(stage.parameters(), data)\n    average_gradients(stage.parameters(), data)\n",
        ),
    },
    "ring_seconds": {
        "for 0 bytes on 4 ranks": ("2 * (n - 1)", "(n - 1)"),
        "for 8e+09 bytes on 2 ranks": ("nbytes / n / bandwidth", "nbytes / bandwidth"),
    },
    "neighbours": {
        "the same place on the two others": "data_group_of_13, crossing_groups = (5, 13), 8",
        "crossing groups are too few": "data_group_of_13, crossing_groups = [13, 9], 4",
        "2 in all": "data_group_of_13, crossing_groups = (12, 13, 14, 15), 8",
    },
    "layouts": {
        "with 24 GB, data 1 x pipeline 8 x tensor 2 is place": (
            "best_with_24_gb, best_with_80_gb = Layout(1, 8, 2), Layout(8, 2, 1)"
        ),
        "with 80 GB, data 2 x pipeline 4 x tensor 2 is place": (
            "best_with_24_gb, best_with_80_gb = Layout(2, 4, 2), Layout(2, 4, 2)"
        ),
        "none that fits": "best_with_24_gb, best_with_80_gb = Layout(2, 2, 2), Layout(8, 2, 1)",
    },
    "global_norm": {
        "the norm is off by -": ("    dist.all_reduce(divided, group=tensor)\n", ""),
        "the norm is off by +": (
            "total = divided + whole\n",
            "dist.all_reduce(whole, group=tensor)\n    total = divided + whole\n",
        ),
        "with 3 ranks, rank 1: the norm is off": (
            "dist.all_reduce(total, group=pipeline)",
            "dist.reduce(total, dist.get_process_group_ranks(pipeline)[0], group=pipeline)",
        ),
    },
}
