"""Wrong answers to the exercises of chapter 08: by judge, what the verdict says, and the answer."""

UNSHARD = """    dist.all_gather_into_tensor(sharded.flat, sharded.shard)
"""
BY_REDUCE = """    sharded.flat.zero_().chunk(dist.get_world_size())[dist.get_rank()].copy_(sharded.shard)
    dist.all_reduce(sharded.flat)
"""
LAYERS = """    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
"""

WRONG = {
    "shards": {
        "lies in flat's memory": ("[rank].clone()", "[rank]"),
        "shard is not part 1 of 2": ("self.flat.chunk(n)[rank]", "self.flat.chunk(n)[0]"),
        "padding is 2": ("-len(flat) % n", "n - len(flat) % n"),
        "places in flat, not copies": ("piece.view(parameter.shape) for", "piece.view(parameter.shape).clone() for"),
        "the parameters' shapes": ("piece.view(parameter.shape)", "piece"),
        "an optimizer takes leaves only": ("parameter.detach().view(-1)", "parameter.view(-1)"),
    },
    "unshard_and_reshard": {
        "bytes behind flat": ("    sharded.flat.untyped_storage().resize_(0)\n", ""),
        "parameters still have": (
            "    for parameter in sharded.parameters:\n        parameter.data = sharded.flat[:0]\n",
            "",
        ),
        "should keep the tensor object": (
            "sharded.flat.untyped_storage().resize_(0)",
            "sharded.flat = sharded.flat[:0].clone()",
        ),
        "does not have the values of all ranks": (UNSHARD, ""),
        "are enough": (UNSHARD, BY_REDUCE),
        "a parameter is a copy": ("parameter.data = view", "parameter.data = view.clone()"),
    },
    "forward": {
        "when layer 1 begins its forward, the complete layers are [0, 1]": (
            "lambda *_: reshard(sharded)",
            "lambda *_: None",
        ),
        "when layer 0 begins its forward, the complete layers are [0, 1, 2]": (
            "    module.register_forward_pre_hook(lambda *_: unshard(sharded))\n",
            "    unshard(sharded)\n",
        ),
        "rank 0: when layer 1 begins its forward, the complete layers are [0, 1]": (  # as a backward will come
            "lambda *_: reshard(sharded)",
            "lambda *_: None if torch.is_grad_enabled() else reshard(sharded)",
        ),
    },
    "backward": {
        "begins without its weights": "def hook_backward(module, sharded):\n    pass",
        "raised RuntimeError: cannot register a hook": ("        if output.requires_grad:\n    ", ""),
        "are complete at once": ("output.register_hook(lambda gradient: unshard(sharded))", "unshard(sharded)"),
    },
    "gradients": {
        "after reduce shard.grad is off": (" / dist.get_world_size()", ""),
        "a whole gradient is still there": ("        parameter.grad = None\n", "        pass\n"),
        "is still complete": ("            reshard(sharded)\n", ""),
        "raised AttributeError: 'NoneType'": (
            "        if all(other.grad is not None for other in sharded.parameters):\n",
            "        if True:\n",
        ),
        "'NoneType' object has no attribute 'view'": (  # its weight's gradient is not always the last
            "all(other.grad is not None for other in sharded.parameters)",
            "parameter is sharded.parameters[0]",
        ),
        "after the next backward": (  # counts, and does not begin anew
            "    def arrived(parameter):\n        if all(other.grad is not None for other in sharded.parameters):\n",
            "    seen = []\n\n    def arrived(parameter):\n        seen.append(parameter)\n"
            "        if len(seen) == len(sharded.parameters):\n",
        ),
    },
    "zero_3": {
        "still complete after backward": ("        hook_gradients(sharded)\n", ""),
        "not every parameter is freed": ("        reshard(sharded)\n", ""),
    },
    "how_large": {
        "ZeRO-2's number is too large": "replicated_billions, zero_2_billions, zero_3_billions = 3.75, 30.0, 30.0",
        "data parallelism's number is too large": (
            "replicated_billions, zero_2_billions, zero_3_billions = 30.0, 16.0, 30.0"
        ),
    },
    "accumulation": {
        "ZeRO-2's number is too small": "replicated_bytes, zero_2_bytes, zero_3_bytes = 2, 2, 12",
        "ZeRO-3's number is too small": "replicated_bytes, zero_2_bytes, zero_3_bytes = 2, 5, 3",
        "DDP's number is too large": "replicated_bytes, zero_2_bytes, zero_3_bytes = 8, 5, 12",
    },
    "keep_last": {
        "the complete layers between forward and backward are []": (
            "def hooks(module, sharded, keep):\n    hook_forward(module, sharded)\n    hook_backward(module, sharded)"
        ),
        "between forward and backward are [0]": (  # the first one, of whatever is asked for
            "def hooks(module, sharded, keep, seen=[]):\n    seen.append(module)\n"
            "    if len(seen) == 1:\n        module.register_forward_pre_hook(lambda *_: unshard(sharded))\n"
            "    else:\n        hook_forward(module, sharded)\n        hook_backward(module, sharded)"
        ),
        "is gathered once": (
            "        module.register_forward_pre_hook(lambda *_: unshard(sharded))\n",
            "        module.register_forward_pre_hook(lambda *_: unshard(sharded))\n"
            "        hook_backward(module, sharded)\n",
        ),
    },
    "prefetch": {
        "begin waits for its message": (", async_op=True", ""),
        "the layers [0] have memory": ("number + 2", "number + 1"),
        "the layers [0, 1, 2] have memory": ("number + 2", "number + 3"),
        "when layer 1 begins, the layers [0, 1, 2]": (
            "lambda *_, number=number: reshard(kept[number])",
            "lambda *_: None",
        ),
        "the hooks have not waited for its weights": ("begun.pop(number).wait()", "begun.pop(number)"),
        "it needs only its own weights by now": (
            "begun[ahead] = begin(kept[ahead])",
            "begun[ahead] = begin(kept[ahead])\n                begun[ahead].wait()",
        ),
    },
    "ddp_to_fsdp": {
        "gathers 1 times": (LAYERS, ""),
        "is not sharded": ("    return fully_shard(model, mesh=mesh)", "    return model"),
        "the model is not returned": ("return fully_shard(model", "fully_shard(model"),
        "gathers each layer once": ("(layer, mesh=mesh)", "(layer, mesh=mesh, reshard_after_forward=False)"),
        "is not complete: it is of type DTensor": ("weight.full_tensor().cpu()", "weight"),
        "it does not return: rank 0": (
            "model.state_dict().items()}",
            "model.state_dict().items()} if dist.get_rank() == 0 else {}",
        ),
    },
}

RIGHT = {
    "gradients": (
        (  # adds up, as optimizers expect it
            "    sharded.shard.grad = torch.empty_like(sharded.shard)\n"
            "    dist.reduce_scatter_tensor(sharded.shard.grad, whole)\n",
            "    part = torch.empty_like(sharded.shard)\n"
            "    dist.reduce_scatter_tensor(part, whole)\n"
            "    sharded.shard.grad = part if sharded.shard.grad is None else sharded.shard.grad + part\n",
        ),
    ),
}
