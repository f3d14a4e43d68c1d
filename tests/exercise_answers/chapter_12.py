"""Wrong answers to the exercises of chapter 12: by judge, what the verdict says, and the answer."""

WRONG = {
    "int8_rows": {
        "a row's scale is": (
            "weight.abs().amax(dim=1, keepdim=True) / 127",
            "weight.abs().max().expand(len(weight), 1) / 127",
        ),
        "the one that maps its largest weight to 127": ("/ 127", "/ 128"),
        "the nearest is half a step": (".round()", ""),
        "which is not an integer of 8 bits": (".to(torch.int8)", ""),
        "the shape of scales": (
            "scales = weight.abs().amax(dim=1, keepdim=True) / 127\n    return (weight / scales).",
            "scales = weight.abs().amax(dim=1) / 127\n    return (weight / scales[:, None]).",
        ),
    },
    "nf4_codebook": {
        "does not return a tensor of 16 levels": ("torch.zeros(1, dtype=torch.float64), ", ""),
        "zero is not the eighth level": (  # one half for the other
            "return (codebook / codebook.abs().max()).float()",
            "return -(codebook / codebook.abs().max()).float().flip(0)",
        ),
        "levels should rise from -1 to 1": ("(codebook / codebook.abs().max())", "codebook"),
        "with the default, level": (
            "torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double())",
            (
                "torch.linspace(1.848, 0, 9)[:-1].double()"  # even levels
            ),
        ),
        "with the outermost quantile 0.95, level": (
            "above = torch.special.ndtri(torch.linspace(outermost, ",
            "outermost = 0.9677083\n    above = torch.special.ndtri(torch.linspace(outermost, ",
        ),
    },
    "blocks": {
        "codes are not the nearest level's": ("(codebook[1:] + codebook[:-1]) / 2", "codebook[1:]"),
        "is not what maps the largest": ("blocks.abs().amax(dim=1)", "blocks.amax(dim=1)"),
        "the shape of codes is": ("    return codes, scales", "    return codes.view_as(weight), scales"),
        "dequantising does not return": ("codebook[codes] * scales[:, None]", "codebook[codes]"),
        "the shape of the dequantised matrix": (".view(shape)", ""),
        "(line ": ("blocks / scales[:, None]", "blocks / scales"),
    },
    "double_quantisation": {
        "for 256 scales, an outer scale is": ("centred.abs().amax(dim=1)", "centred.amax(dim=1)"),
        "is not the mean of all scales": (
            "    mean = scales.mean()\n",
            "    mean = scales.view(-1, 256).mean(1)\n    scales = scales.view(-1, 256) - mean[:, None]\n",
        ),
        "centred scale to 1 or -1": ("centred.abs().amax(dim=1)", "scales.view(-1, 256).amax(dim=1)"),
        "codes are not the nearest level's": ("(table[1:] + table[:-1]) / 2", "table[:-1]"),
        "the way back": (".flatten() + mean", ".flatten()"),
    },
    "quantised_product": {
        "the output is not x times": ("NF4, shape).T", "NF4, shape).abs().T"),
        "the gradient of x is not": (
            "return gradient @ dequantise_blocks(codes, scales, NF4, ctx.shape)",
            "return gradient @ (dequantise_blocks(codes, scales, NF4, ctx.shape) > 0).float()",
        ),
        "raised RuntimeError": ("NF4, shape).T", "NF4, shape)"),
        "besides codes and scales": ("ctx.shape = shape", "ctx.shape, ctx.x = shape, x"),
        "160 bytes are kept": (  # the dense matrix, instead of making it again
            "        ctx.shape = shape\n",
            "        ctx.shape, ctx.dense = shape, dequantise_blocks(codes, scales, NF4, shape)\n",
        ),
    },
    "bits_per_weight": {
        "4.253 is too few": "bits_per_weight = 4.253",
        "5 is too many": "bits_per_weight = 5.0",  # a scale in 32 bits for each block
    },
    "saved_by_both": {
        "0.37 GiB are too few": "saved_gib = 0.37",  # one matrix
        "0.79 GiB are too many": "saved_gib = 0.79",  # 10**9 bytes
    },
    "int4_blocks": {
        "where such levels and blocks have": ("weight.reshape(-1, 64)", "weight.reshape(-1, 32)"),
        "for a matrix of shape [3, 128], the error": ("weight.reshape(-1, 64)", "weight"),
        "for a matrix of shape [4, 48]": (
            "def int4_blocks(weight):\n    halves = [int4_rows(part) for part in weight.split(64, dim=1)]\n"
            "    return torch.cat([codes * scales for codes, scales in halves], dim=1)"
        ),
        "the error is 9": (
            "def int4_blocks(weight):\n"
            "    return dequantise_blocks(*quantise_blocks(weight, NF4, 64), NF4, weight.shape)"
        ),
        "the shape of the result": (".view_as(weight)", ""),
    },
    "share": {
        "rank 1: quant_state.absmax is not": (
            "(weight.data, state.absmax, state.state2.absmax, state.offset)",
            "(weight.data,)",
        ),
        "quant_state.offset is not": (", state.offset)", ")"),
        "rank 0: weight.data is not": ("src=0", "src=1"),
        "weight.data is not what rank 0 had": (  # zero everywhere is the same everywhere
            "dist.broadcast(tensor, src=0)",
            "dist.broadcast(tensor.zero_(), src=0)",
        ),
        "bytes, and": (
            "dist.broadcast(tensor, src=0)",
            "every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]\n"
            "        dist.all_gather(every, tensor)\n"
            "        tensor.copy_(every[0])",
        ),
    },
}

RIGHT = {
    "int8_rows": (
        (
            "return (weight / scales).round().to(torch.int8), scales",
            "return [(weight / scales).round().to(torch.int8), scales]",
        ),
    ),
    "int4_blocks": (("weight.reshape(-1, 64)", "weight.double().reshape(-1, 64)"),),
}
