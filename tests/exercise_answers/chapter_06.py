"""Wrong answers to the exercises of chapter 06: by judge, what the verdict says, and the answer."""

WRONG = {
    "flatten_parameters": {
        "they must divide by the ranks": ("-(-elements // n) * n", "elements"),
        "as few as possible": ("-(-elements // n) * n", "(elements // n + 1) * n"),
        "one after another": ("flat[:elements].split", "flat[len(flat) - elements :].split"),  # zeros in front
        "they must be views of it": ("parameter.data = place", "place"),
        "has become": (".view_as(parameter)", ""),
        "of the parameters' type": ("dtype=parameters[0].dtype", "dtype=torch.float32"),
    },
    "zero_1": {
        "as its shard": ("[dist.get_rank()]", "[0]"),
        "rank 0: reduce_gradients is off": ("whole / dist.get_world_size()", "whole"),
        "reduce_gradients should return a tensor as long": ("        return mine\n", "        return whole\n"),
        "after step 1 a weight is off": ("        dist.all_gather_into_tensor(self.flat, self.shard)\n", ""),
        "raised RuntimeError": ("self.shard.float()", "self.shard.clone()"),  # no master in fp32
        "which copy adds them up": (
            "self.shard.copy_(self.master)",
            "self.shard.copy_(self.master)\n        self.master.copy_(self.shard)",
        ),
        "are enough": (
            "dist.reduce_scatter_tensor(mine, whole / dist.get_world_size())",
            "dist.all_reduce(whole)\n"
            "        mine = whole.chunk(dist.get_world_size())[dist.get_rank()] / dist.get_world_size()",
        ),
        "raised AttributeError": ("self.shard.copy_(self.master)", "self.part.copy_(self.master)"),
    },
    "states_by_hand": {
        "with 0 elements of padding": ("12 * part", "12 * parameters"),
        "with 1 elements of padding": ("2 * n * part + 2 * parameters", "4 * n * part"),
    },
    "six_billion": {
        "data parallelism's number is too small": "replicated_gb, zero_1_gb = 93.0, 34.3",  # GiB
        "ZeRO-1's number is too small": "replicated_gb, zero_1_gb = 99.9, 12.5",  # everything in parts
    },
    "clip": {
        "rank 0 returned a norm that is off": ("    dist.all_reduce(square)\n", ""),
        "wrongly scaled where the norm is below": (".clamp(max=1)", ""),
        "wrongly scaled where the norm is above": ("(limit / norm)", "(1 / norm)"),
        "rank 1 returned a norm": ("dist.all_reduce(square)", "dist.reduce(square, 0)"),
        "one number is enough": (
            "dist.all_reduce(square)",
            "dist.all_reduce(square.repeat(50) / 1)\n    dist.all_reduce(square)",
        ),
        "returned nothing": ("    return norm\n", ""),
    },
    "rejoined": {
        "they must be equally long": (
            "def rejoined(parts, elements, new_ranks):\n    return list(torch.cat(parts)[:elements].chunk(new_ranks))"
        ),
        "the lengths are right": (
            "[:elements] = torch.cat(parts)[:elements]",
            "[-elements:] = torch.cat(parts)[:elements]",
        ),
        "of another kind than was asked for": "def rejoined(parts, elements, new_ranks):\n    return None",
    },
}
