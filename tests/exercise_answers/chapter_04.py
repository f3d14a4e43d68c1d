"""Wrong answers to the exercises of chapter 04: by judge, what the verdict says, and the code."""

GATHER_OUTPUT = """
class GatherOutput(Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim={dim})

    @staticmethod
    def backward(ctx, gradient):
        return {gradient}
"""
WRONG = {
    "copy_and_reduce": {
        "the gradient that Copy returns backward": (
            "    def backward(ctx, gradient):\n        return summed(gradient)",
            "    def backward(ctx, gradient):\n        return gradient",
        ),
        "the gradient that Reduce returns backward": (
            "    def backward(ctx, gradient):\n        return gradient",
            "    def backward(ctx, gradient):\n        return summed(gradient)",
        ),
        "Reduce changes the tensor that it gets": (
            "        return summed(x)",
            "        x = x.contiguous()\n        dist.all_reduce(x)\n        return x",
        ),
    },
    "local_shard": {
        "the part of gate_up_proj has the right shape": (
            "torch.cat([half.chunk(n)[rank] for half in full.chunk(2)])",
            "full.chunk(n)[rank].clone()",
        ),
        "with 2 groups of keys and values, the part of k_proj [24, 48] is [6, 48], not [12, 48]": (
            "and n > groups",
            "and n < 0",
        ),
        "the part of down_proj [24, 48] is [12, 48], not [24, 24]": ('("o_proj", "down_proj")', '("o_proj",)'),
        "the part of q_proj is a view": ("full.chunk(n, dim)[rank].clone()", "full.chunk(n, dim)[rank]"),
    },
    "embedding": {
        "not those of the full matrix": ("self.leave(found.masked_fill(~is_local[..., None], 0))", "self.leave(found)"),
        "on rank 0 of 2, the embeddings are not": (
            "self.leave(found.masked_fill(~is_local[..., None], 0))",
            "found.masked_fill(~is_local[..., None], 0)",
        ),
    },
    "cross_entropy": {
        "what CrossEntropy returns forward": ("        dist.all_reduce(max_logit, dist.ReduceOp.MAX)\n", ""),
        "the gradient that CrossEntropy returns": (
            "-is_local[:, None].float()",
            "-torch.ones_like(column[:, None]).float()",
        ),
        "bytes forward": ("column = targets -", "summed(logits)\n        column = targets -"),
        "raised": ("column = torch.where(is_local, column, 0)", "pass"),
    },
    "gather_and_scatter": {
        "on rank 0 of 2, the gradient that Gather returns backward": (
            "return Scatter.forward(ctx, gradient)",
            "return gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()]",
        ),
        "raised RuntimeError": (
            "return torch.cat(parts, dim=1)",
            "return torch.cat(parts)",
        ),
        "Gather is right but sends 144 bytes backward": (
            "        local = torch.empty_like(parts[: len(x)])\n        dist.reduce_scatter_tensor(local, parts)\n",
            "        local = summed(parts).chunk(dist.get_world_size())[dist.get_rank()]\n",
        ),
    },
    "layer_megabytes": {
        "are too little": "megabytes = 100.7",
        "are too much": "megabytes = 268",
    },
    "possible_ranks": {
        "into 64 parts something does not divide": "possible = {1, 2, 4, 8, 16, 32, 64, 128}",
        "but 4 more numbers do": "possible = {1, 2}",
        "as a set": "possible = 32",
    },
    "gather_output": {
        "returns the shape [8, 3], not [4, 6]": GATHER_OUTPUT.format(dim=0, gradient="gradient"),
        "raised RuntimeError": GATHER_OUTPUT.format(dim=-1, gradient="gradient"),
        "on rank 1 of 2, the gradient": GATHER_OUTPUT.format(
            dim=-1, gradient="gradient.chunk(dist.get_world_size(), dim=-1)[0].contiguous()"
        ),
        "on rank 0 of 2, the gradient": GATHER_OUTPUT.format(
            dim=-1, gradient="summed(gradient).chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous()"
        ),
    },
    "finish": {
        "on rank 1 of 2, the gradient of": (
            "total = summed(torch.cat([gradient.flatten() for gradient in gradients]))",
            "total = torch.cat([gradient.flatten() for gradient in gradients])\n    dist.reduce(total, 0)",
        ),
        "it took 3 collectives": (
            "def finish(model):\n    for name, parameter in model.named_parameters():\n"
            "        if 'norm' in name:\n            dist.all_reduce(parameter.grad)"
        ),
        "on rank 0 of 2, the gradient of q_proj.weight": (' if "norm" in name', ""),
    },
}
