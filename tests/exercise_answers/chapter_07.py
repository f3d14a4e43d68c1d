"""Wrong answers to the exercises of chapter 07: by judge, what the verdict says, and the answer."""

SKIPS_ORDER = """        collect(bucket, parameter)
        if not bucket.missing:
            reduce(bucket)
"""
WAITS = """        collect(bucket, parameter)
        if not any(other.missing for other in self.buckets):
            for other in self.buckets:
                reduce(other)
"""
ON_GRADIENT = """        collect(bucket, parameter)
        while self.next < len(self.buckets) and not self.buckets[self.next].missing:
            reduce(self.buckets[self.next])
            self.next += 1
        self.next %= len(self.buckets)  # after the last one comes the next backward's first
"""

WRONG = {
    "bucket": {
        "it is a copy": ("piece.view(p.shape)", "piece.clone().view(p.shape)"),
        "should begin at element 0": ("flat[: sum(self.sizes)]", "flat[-sum(self.sizes) :]"),  # padding in front
        "raised RuntimeError": ("flat[: sum(self.sizes)].split", "flat.split"),  # the padding is too much
    },
    "collect_and_reduce": {
        "should free the parameter's own gradient": ("    parameter.grad = None\n", ""),
        "but bucket.missing has": ("    bucket.missing.discard(parameter)\n", ""),
        "divided by N": (" / dist.get_world_size()", ""),
        "as long as bucket.flat": ("torch.zeros_like(bucket.flat)", "torch.zeros(sum(bucket.sizes))"),
        "(micro-batch 2)": ("mine if bucket.gradient is None else bucket.gradient + mine", "mine"),
        "should free bucket.unreduced": ("bucket.unreduced, bucket.missing = None,", "bucket.missing ="),
        "all gradients of the next backward": (
            "bucket.unreduced, bucket.missing = None, set(bucket.parameters)",
            "bucket.unreduced = None",
        ),
        "are enough": (
            "dist.reduce_scatter_tensor(mine, bucket.unreduced)",
            "dist.all_reduce(bucket.unreduced)\n"
            "    mine = bucket.unreduced.chunk(dist.get_world_size())[dist.get_rank()].clone()",
        ),
    },
    "zero_2": {
        "a weight is off": (ON_GRADIENT, SKIPS_ORDER),
        "no bucket was reduced before": (ON_GRADIENT, WAITS),
        "a master still has its gradient": ("        self.optimizer.zero_grad()\n", ""),
        "there were 0 collectives, after backward 1 of step 2": (
            "        self.next %= len(self.buckets)",
            "        pass",
        ),
        "bytes of gradients are still there": (
            "bucket.gradient.float(), None",
            "bucket.gradient.float(), bucket.gradient",
        ),
        "rank 0: a weight is off": ("            dist.all_gather_into_tensor(bucket.flat, bucket.shard)\n", ""),
    },
    "six_billion_again": {
        "the model states are too many": "states_gb, sent_gb = 34.3, 185.7",  # ZeRO-1's
        "the bytes sent are too few": "states_gb, sent_gb = 23.4, 21.9",  # as if it were accumulated
    },
    "largest_bucket": {
        "is too large": ("2 * parameters // ranks", "parameters // ranks"),
        "for 90 bytes of room, 100 parameters, 2 ranks the answer is too small": (
            "max(0, (room - 2 * parameters // ranks) // 3)",
            "(room - 2 * parameters // ranks) // 3",
        ),
        "no whole number": ("// 3", "/ 3"),
    },
    "to_owners": {
        "are enough": "def to_owners(gradients):\n    for g in gradients:\n        dist.all_reduce(g)",
        "does not have the sums": (  # a number that fits one example
            "def to_owners(gradients):\n    for g in gradients:\n        g *= dist.get_world_size()"
        ),
        "rank 1 does not have the sums of its gradients": (
            "def to_owners(gradients):\n    for g in gradients:\n        dist.reduce(g, dst=0)"
        ),
    },
}
