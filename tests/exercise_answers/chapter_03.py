"""Wrong answers to the exercises of chapter 03: by judge, what the verdict says, and the code."""

WRONG = {
    "partition_layers": {
        "a better cut exists": (' += costs["head"]', ' += costs["embedding"]'),
        "on the wrong side of a tie": ("(work[stage], -stage)", "(work[stage], stage)"),
        "hold each layer once": ("range(end - count, end)", "range(end - count, end - 1)"),
    },
    "needs": {
        "for B0 of stage 0 of 1 stages, it names F0 of stage 0, B0 of stage 1": (
            '([Action("B", stage + 1, number)] if stage < last else [])',
            '[Action("B", stage + 1, number)]',
        ),
        "it names nothing": ('[Action("F", stage - 1, number)] if stage > 0 else []', "[]"),
        "it names None": "def needs(action, last):\n    pass",
    },
    "simulate": {
        "that is too early": ("*(span.end for span in done[-1:]), ", ""),
        "that is too late": ("*(ended[n] for n in needs(action, last))", "*ended.values()"),
        "must raise ValueError": ('raise ValueError(f"all ranks wait, after {before} actions")', "return spans"),
        "it does not return: rank 0": (
            "        if len(ended) == before:\n"
            '            raise ValueError(f"all ranks wait, after {before} actions")\n',
            "",
        ),
    },
    "passes": {
        "a tensor without this rank's graph": ("y.detach()", "y"),
        "times as long as the batch's": (" / len(part.labels)", ""),
        "did not return the gradient": ("return x.grad", "return None"),
        "are still kept": ("part.kept.pop((action.stage, action.micro_batch))", "part.kept[action[1:]]"),
        "raised RuntimeError": ("y.backward(gradient)", "y.backward()"),
    },
    "execute": {
        "does not run and return each action": ("schedule[dist.get_rank()]", "schedule[dist.get_rank()][:-1]"),
        "an input that is not the result": (
            "[action.kind](part, action, received)",
            "[action.kind](part, action, None)",
        ),
        "shorter than its pace": ("time.sleep(max(0, pace", "(max(0, pace"),
        "with 2 ranks, rank 0 raised TypeError": (
            "        if output is not None:\n            mailbox.start_until(action, output.contiguous())\n",
            "",
        ),
    },
    "one_f_one_b_schedule": {
        "more than need be": ("warm_up=world_size - 1 - rank", "warm_up=world_size"),
        "more than they should": ("warm_up=world_size - 1 - rank", "warm_up=0"),
        "does not have one F and one B": ("backward[max(0, len(forward) - warm_up) :]", "backward[-warm_up:]"),
    },
    "micro_batches": {
        "1 the ranks idle 87.5%": "micro_batches_needed = 1",
        "with 132 the ranks idle": "micro_batches_needed = 132",
        "not the smallest": "micro_batches_needed = 140",
        "0 is not a number of micro-batches": "micro_batches_needed = 0",
    },
    "sent_gib": {
        "1F1B: 0.75 GiB is too little": "gib_1f1b, gib_interleaved = 0.75, 6.75",
        "interleaved: 14 GiB is too much": "gib_1f1b, gib_interleaved = 1.5, 14",
    },
    "gpipe_in_rounds": {
        "a rank does not do rounds of 4": (  # warm-up of 3 on every rank, no rounds at all
            "def gpipe_in_rounds(world_size, micro_batches, rounds):\n"
            "    every = [[[Action(k, r, n) for n in range(micro_batches)] for k in 'FB'] for r in range(world_size)]\n"
            "    return [f[:3] + [a for p in zip(f[3:], b) for a in p] + b[-3:] for f, b in every]\n"
            "predicted_idle = 0.652"
        ),
        "one F and one B": ("range(0, micro_batches, size)", "range(0, micro_batches, 2 * size)"),
        "it idles more than the 0.273 that you predicted": ("predicted_idle = 3 / 7", "predicted_idle = 0.273"),
    },
    "global_norm": {
        "rank 0's norm is": ("    dist.all_reduce(square)\n", ""),
        "rank 1's norm is": ("dist.all_reduce(square)", "dist.reduce(square, 0)"),
        "times the norm of all": (  # norms do not add up
            "def global_norm(parameters):\n    norm = sum(p.grad.square().sum() for p in parameters).sqrt()\n"
            "    dist.all_reduce(norm)\n    return norm"
        ),
    },
}
