"""ChatGLM3's forward written out by hand on plain tensors with the published names: what the loaded model must equal.

Nothing here is shared with the code under test: no transformers, no configuration class, no weight map.
"""

import math

import torch
from torch import Tensor

ROPE_BASE = 10000.0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) · weight over the last dimension."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def rotate_half_of_head(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary embedding of ``x`` [batch, length, heads, head_dim] at ``positions`` [batch, length].

    Only the first half of a head is rotated. Neighbours (2i, 2i + 1) are one pair; the pair turns by
    position · base^(−2i / (head_dim / 2)).
    """
    rotary = x.shape[-1] // 2
    speeds = base ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = (positions[..., None].double() * speeds)[:, :, None, :]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0:rotary:2], x[..., 1:rotary:2]
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., rotary:]), dim=-1)


def forward(config: dict, weights: dict[str, Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits [batch, length, padded_vocab_size] for ``input_ids`` [batch, length], padded where the mask is 0.

    ``config`` is a published config.json. Rows of padding hold no meaningful logits.
    """
    batch, length = input_ids.shape
    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    epsilon, base = config["layernorm_epsilon"], ROPE_BASE * config.get("rope_ratio", 1)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (causal & attention_mask.bool()[:, None, :]) | torch.eye(length, dtype=torch.bool)

    x = weights["transformer.embedding.word_embeddings.weight"][input_ids]
    for n in range(config["num_layers"]):
        layer = {
            name.removeprefix(f"transformer.encoder.layers.{n}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"transformer.encoder.layers.{n}.")
        }
        h = rms_norm(x, layer["input_layernorm.weight"], epsilon)
        fused = h @ layer["self_attention.query_key_value.weight"].T
        if config["add_qkv_bias"]:
            fused = fused + layer["self_attention.query_key_value.bias"]
        q, k, v = fused.split([heads * width, groups * width, groups * width], dim=-1)
        q = rotate_half_of_head(q.view(batch, length, heads, width), positions, base)
        k = rotate_half_of_head(k.view(batch, length, groups, width), positions, base)
        v = v.view(batch, length, groups, width)
        attended = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(width)
            scores = scores.masked_fill(~visible, -math.inf)
            attended.append(scores.softmax(-1) @ v[:, :, group])
        x = x + torch.cat(attended, dim=-1) @ layer["self_attention.dense.weight"].T
        h = rms_norm(x, layer["post_attention_layernorm.weight"], epsilon)
        gate, up = (h @ layer["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], epsilon)
    return x @ weights["transformer.output_layer.weight"].T
