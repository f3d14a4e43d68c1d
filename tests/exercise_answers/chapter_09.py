"""Wrong answers to the exercises of chapter 09: by judge, what the verdict says, and the answer."""

UP = """        host.staging[i].copy_(host.masters[i].detach())  # what Adam had finished: the values of one step before
        copy_to_device(host, i)
    wait()
    return pool.submit(adam_on, host, gradients)
"""
UP_AFTER_SUBMIT = """        pass
    new = pool.submit(adam_on, host, gradients)
    for i in indices:
        host.staging[i].copy_(host.masters[i].detach())
        copy_to_device(host, i)
    wait()
    return new
"""
REDUCE_SCATTER = "    dist.reduce_scatter_tensor(part.grad, F.pad(gradient, (0, len(flat) - len(gradient))))\n"
ALL_REDUCE = """    dist.all_reduce(gradient)
    part.grad = F.pad(gradient, (0, len(flat) - len(gradient))).chunk(n)[dist.get_rank()].clone()
"""

WRONG = {
    "copy_to_host": {
        "the device has the gradients of the parameters [0, 1, 2]": ("    host.parameters[i].grad = None\n", ""),
        "bytes have gone down, but host.moved is": ('    host.moved["down"] += host.staging[i].nbytes\n', ""),
        "only that is pinned": (
            "host.staging[i].copy_(host.parameters[i].grad, non_blocking=True)",
            "host.staging[i] = host.parameters[i].grad.cpu()",
        ),
        "the call waits": (", non_blocking=True", ""),
    },
    "update_and_return": {
        "of parameter 2 is off by": (  # gradients of all steps so far
            "host.masters[i].grad.copy_(host.staging[i])",
            "host.masters[i].grad.add_(host.staging[i])",
        ),
        "after step 2, in bfloat16": (
            "    host.adams[i].step()\n",
            "    host.masters[i].detach().copy_(host.parameters[i])\n    host.adams[i].step()\n",
        ),
        "belongs to the master's graph": (
            "host.staging[i].copy_(host.masters[i].detach())",
            "host.staging[i].copy_(host.masters[i])",
        ),
        "should hold the new value": ("    host.staging[i].copy_(host.masters[i].detach())\n", ""),
        "raised RuntimeError: a leaf Variable": ("host.parameters[i].detach().copy_", "host.parameters[i].copy_"),
    },
    "step_on_host": {
        "it does not wait": ("    wait()\n", ""),
        "copy_to_device(host, 0) should be called once": ("        copy_to_device(host, i)\n", ""),
        "the order should be down, update, up": (
            "        update(host, i)\n        copy_to_device(host, i)\n",
            "        copy_to_device(host, i)\n        update(host, i)\n",
        ),
    },
    "send_in_backward": {
        "raised TypeError: copy_()": ("lambda _, i=i: on_gradient(i)", "lambda _: on_gradient(i)"),
        "recorded on the stream": ("                gradient.record_stream(stream)", "                pass"),
        "outside of side_stream": ("        with side_stream(stream):", "        if True:"),
        "each should leave at once": (
            "            gradient = host",
            "            if i:\n                return\n            gradient = host",
        ),
        "handle of each hook": ("    return [p.register", "    [p.register"),
    },
    "late_step": {
        "with a fast thread, after step 1": (UP, UP_AFTER_SUBMIT),
        "wait for it": ("        running.result()", "        pass"),
        "before the copy is complete": ("    wait()\n    gradients", "    gradients"),
        "with a slow thread, after step 2": (", copy=True", ""),  # the values go through the gradients' memory
        "it has just begun": (
            "    return pool.submit(adam_on, host, gradients)",
            "    new = pool.submit(adam_on, host, gradients)\n    new.result()\n    return new",
        ),
        "the pool has got 0 jobs": ("return pool.submit(adam_on, host, gradients)", "adam_on(host, gradients)"),
    },
    "step_on_hosts": {
        "from AdamW on one process": ("for p in parameters]) / n", "for p in parameters]) * 1"),
        "are enough": (REDUCE_SCATTER, ALL_REDUCE),
        "rank 0: parameter": ("    dist.all_gather_into_tensor(flat, part)\n", ""),
        "still has its gradient": ("        parameter.grad = None\n", "        pass\n"),
    },
    "how_many_tokens": {
        "too many": "tokens_per_step = 120_000",
        "too few": "tokens_per_step = 24_000",
    },
    "which_cut": {
        "too few": "bytes_crossing = 8",
        "too many": "bytes_crossing = 24",
    },
    "norm": {
        "too small": "def norm(shares):\n    return torch.stack([share.norm() for share in shares]).norm().item()",
        "too large": (  # norms add up only as squares
            "total.sqrt().item()",
            "total.item()",
        ),
        "it took collectives of": (
            "    total = torch.stack([share.pow(2).sum() for share in shares]).sum().to(device())\n"
            "    dist.all_reduce(total)\n",
            "    dist.all_reduce(squares := torch.cat(shares).new_zeros(99).index_fill_(0, torch.tensor([0]), "
            "float(torch.cat(shares).pow(2).sum())))\n    total = squares.sum()\n",
        ),
        "rank 1: the norm": ("dist.all_reduce(total)", "dist.reduce(total, dst=0)"),
    },
    "fold": {
        "after micro-batch 2 of step 1": (
            "gradient.copy_(host.staging[i]) if first else gradient.add_(host.staging[i])",
            "gradient.copy_(host.staging[i])",
        ),
        "after micro-batch 1 of step 2": (  # it never begins anew
            "gradient.copy_(host.staging[i]) if first else gradient.add_(host.staging[i])",
            "gradient.add_(host.staging[i])",
        ),
        "in bfloat16, the gradient": (
            "gradient.add_(host.staging[i])",
            "gradient.copy_(gradient.to(host.staging[i].dtype) + host.staging[i])",
        ),
    },
}
