"""Wrong answers to the exercises of chapter 11: by judge, what the verdict says, and the answer."""

RECOMPUTES = """
class FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        ctx.save_for_backward(hidden, weight, targets)
        return F.cross_entropy(hidden @ weight.T, targets)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, targets = ctx.saved_tensors
        to_logits = (hidden @ weight.T).softmax(1)
        to_logits[torch.arange(len(targets)), targets] -= 1
        return gradient * to_logits @ weight / len(targets), None, None, None
"""

WRONG = {
    "layer_parts": {
        "what grows with the MLP's inner width is too little": ('        "product of both": e * i,\n', ""),
        "what grows with the hidden size is too little": ("2 * (4 * h + 4)", "2 * (e * h + 4)"),  # norms in fp32
        "what grows with the width of the keys is too little": ("2 * e * k", "2 * e * q"),  # as many as queries
        "what grows with the number of heads is too little": ('        "log-sum-exp": 4 * shape.heads,\n', ""),
        "what grows with nothing is too little": ("2 * (4 * h + 4)", "2 * 4 * h"),
        "what grows with the hidden size is too much": ("2 * (4 * h + 4)", "shape.layers * 2 * (4 * h + 4)"),
    },
    "same_randomness": {
        "does not get the numbers": (
            "    now = random_state()\n    set_randomness(state)\n",
            "    now = random_state()\n",
        ),
        "a block that ended": ("        set_randomness(now)", "        pass"),
        "a block that raised": (
            "    try:\n        yield\n    finally:\n        set_randomness(now)",
            "    yield\n    set_randomness(now)",
        ),
    },
    "recomputed": {
        "raised RuntimeError": ("torch.enable_grad(), ", ""),
        "with dropout in the function, the gradient of x": (", same_randomness(ctx.state)", ""),
        "leaves the random generator in another state": (
            "torch.enable_grad(), same_randomness(ctx.state):",
            "torch.enable_grad():\n            set_randomness(ctx.state)",
        ),
        "for x of shape [3, 5], the gradient of x": ("(x, *parameters), gradient)", "(x, *parameters), y)"),
        "a parameter gets no gradient": (
            "None, *torch.autograd.grad(y, (x, *parameters), gradient)",
            "None, *torch.autograd.grad(y, x, gradient), *(None for _ in parameters)",
        ),
        "times, recorded": (  # no recomputation: the graph is kept
            "        return function(x)",
            "        with torch.enable_grad():\n            ctx.y = function(x)\n        return ctx.y.detach()",
        ),
        "more than the input of each block": (
            "        return function(x)",
            "        ctx.more = x @ parameters[0]\n        return function(x)",
        ),
    },
    "loss_in_chunks": {
        "times the mean cross-entropy": ("loss / len(target_positions)", "loss / len(targets)"),
        "forward holds 2": ("            del logits\n", ""),
        "the loss is in bfloat16": (".float()", ""),
        "forward has 1.67 matmuls": (  # ignored tokens are multiplied as well
            "        for positions in target_positions.split(chunk):\n",
            "        hidden[targets == -100] @ weight.T\n        for positions in target_positions.split(chunk):\n",
        ),
        "a few numbers per token are enough": (
            "            log_sum_exp.append(logits.logsumexp(1))\n",
            "            log_sum_exp.append(logits.logsumexp(1))\n"
            "            ctx.logits = [*getattr(ctx, 'logits', []), logits]\n",
        ),
    },
    "in_chunks": {
        "the gradient of hidden": ("(logits * gradient / len", "(logits / len"),
        "the gradient of the head": ("to_weight += logits.T", "to_weight = logits.T"),
        "(line ": ("logits.T @ hidden[positions]", "logits @ hidden[positions]"),
        "backward has 4 matmuls": (  # the logits a third time
            "            del logits\n",
            "            logits = (hidden[positions] @ weight.T).float()\n            del logits\n",
        ),
    },
    "fillings": {
        "the fillings have": ("    if pieces:\n        yield pieces\n", ""),
        "is a copy": ("flat[:room], flat[room:]", "flat[:room].clone(), flat[room:]"),
        "the order of the gradients": ("for gradient in gradients)", "for gradient in reversed(gradients))"),
    },
    "average": {
        "from the mean over the ranks": ("        part /= dist.get_world_size()\n", ""),
        "with 2 ranks, rank 0: a gradient is off": ("            piece.copy_(mean)", "            piece = mean"),
        "fillings are enough": (
            "        dist.all_reduce(part)\n",
            "        for piece in part.split(lengths):\n            dist.all_reduce(piece)\n",
        ),
        "and the buffer has": (
            "        part = buffer[: sum(lengths)]\n        torch.cat(pieces, out=part)\n",
            "        part = torch.cat(pieces)\n",
        ),
    },
    "activation_gib": {
        "plainly, 46 GiB are too many": "plain_gib, checkpointed_gib = 46.0, 1.8",  # 10**9 bytes
        "checkpointed, 0.1 GiB are too few": "plain_gib, checkpointed_gib = 42.9, 0.1",  # one layer
    },
    "keep_wide_matmuls": {
        "128 wide; the hidden size is 64": ("] > TINY", "] < TINY"),  # keeps the narrow ones
        "it keeps a matmul's output that is 64 wide": ("] > TINY", "] >= TINY"),
        "it recomputes a matmul's output that is 128 wide": ("] > TINY.hidden", "] > 2 * TINY.hidden"),
        "which is not a matmul": (
            "operator in MATMULS and ",
            "isinstance(inputs[-1], torch.Tensor) and inputs[-1].dim() and ",
        ),
    },
    "weighted": {
        "times the right one": "def weighted(loss, labels):\n    return loss",
        "0.50 times the right one": (" * dist.get_world_size()", ""),
        "0.99 times the right one": (  # as if all ranks had as many tokens
            "mine = (labels != -100).sum()\n    everyone = mine.clone()\n    dist.all_reduce(everyone)\n",
            "mine = (labels != -100).float().mean()\n    everyone = mine.clone()\n    dist.all_reduce(everyone)\n",
        ),
        "that train (0, 5, 1) tokens": (  # assumes that every rank trains some
            "return loss * mine * dist.get_world_size() / everyone",
            "return loss * mine.clamp(min=2) * dist.get_world_size() / everyone",
        ),
        "one number is enough": (
            "everyone = mine.clone()\n    dist.all_reduce(everyone)",
            "every = [torch.empty_like(labels) for _ in range(dist.get_world_size())]\n"
            "    dist.all_gather(every, labels)\n"
            "    everyone = (torch.cat(every) != -100).sum()",
        ),
    },
    "frozen_head": {
        "the gradient of hidden": ("gradient * to_hidden", "to_hidden"),
        "times the mean cross-entropy": ("return loss / len(targets)", "return loss"),
        "backward has 2 matmuls": RECOMPUTES,
        "one chunk's logits, and 5 are enough": (".split(chunk):", ".split(len(targets)):"),
    },
}

RIGHT = {
    "weighted": (
        """
def weighted(loss, labels):
    mine = (labels != -100).sum()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return loss * mine * dist.get_world_size() / sum(everyone)
""",
    ),
}
