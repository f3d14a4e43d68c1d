"""Wrong answers to the exercises of chapter 00: by judge, what the verdict says, and the code."""

BY_HAND = "def my_all_reduce(x):\n    total, passing = {total}, x\n    for _ in range({rounds}):\n"
BY_HAND += "        passing = pass_on(passing)\n        total += passing\n    return total"
WRONG = {
    "reduce_scatter": {
        "sent": (
            "def reduce_scatter(x):\n    dist.all_reduce(x)\n    return x.chunk(dist.get_world_size())[dist.get_rank()]"
        ),
        "rank 0 of 2 gets 8 elements, not 4": "def reduce_scatter(x):\n    dist.all_reduce(x)\n    return x",
        "rank 0 of 2 gets the right number of elements, but others": (
            "def reduce_scatter(x):\n    return x.chunk(dist.get_world_size())[dist.get_rank()]"
        ),
    },
    "all_gather": {
        "rank 0 of 2 gets 4 elements, not 8": "def all_gather(part):\n    return part",
        "it has only one part": (
            "def all_gather(part):\n    rank, n = dist.get_rank(), dist.get_world_size()\n"
            "    whole = torch.zeros(n * len(part))\n    whole[rank * len(part) : (rank + 1) * len(part)] = part\n"
            "    dist.all_reduce(whole)\n    return whole"
        ),
    },
    "pass_on": {
        "rank 0 of 3 gets the right number of elements, but others": (  # the other way round
            "def pass_on(x):\n    rank, n = dist.get_rank(), dist.get_world_size()\n"
            "    received = torch.empty_like(x)\n"
            "    sending = dist.isend(x, (rank - 1) % n)\n    dist.recv(received, (rank + 1) % n)\n    sending.wait()\n"
            "    return received"
        ),
        "overwrote": ("return received", "return x.copy_(received)"),
        "to one neighbour only": (
            "def pass_on(x):\n    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]\n"
            "    dist.all_gather(parts, x)\n    return parts[dist.get_rank() - 1]"
        ),
    },
    "sent_gigabytes": {
        "are too little": "gigabytes = 12.4",
        "are too much": "gigabytes = 86.8",
    },
    "my_all_reduce": {
        "it calls all-reduce": "def my_all_reduce(x):\n    dist.all_reduce(x)\n    return x",
        "rank 0 of 3 gets the right number": BY_HAND.format(total="x.clone()", rounds=1),
        "changed the tensor that it got": (
            "def my_all_reduce(x):\n    passing = x.clone()\n    for _ in range(dist.get_world_size() - 1):\n"
            "        passing = pass_on(passing)\n        x += passing\n    return x"
        ),
    },
    "hang": {
        "with 5 ranks it ends: each has 2 rows": ("ranks_that_hang = 4", "ranks_that_hang = 5"),
        "it does not return: rank": ("range(rows // dist.get_world_size())", "range(dist.get_rank(), rows, 3)"),
        "raised NameError": ("rows // dist", "row // dist"),
        "call [1, 1] collectives": ("range(rows // dist.get_world_size())", "range(1)"),
    },
    "returned_mib": {
        "if every second tensor is deleted, 128 MiB are too much": "every_second, first_half = 128, 120",
        "if the first half is deleted, 128 MiB are too much": "every_second, first_half = 0, 128",
    },
}
