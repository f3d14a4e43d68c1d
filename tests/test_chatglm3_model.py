"""The network itself: logits against the hand-written reference, generation, and what must not change silently."""

import json

import pytest
import torch
from reference_chatglm3 import forward
from safetensors.torch import load_file
from small_chatglm import random_model, small_config
from transformers import AutoModelForCausalLM

from helpers.chatglm3 import ChatGLM3ForCausalLM

SHAPES = {
    "two groups of two heads": {},
    "one group for all heads": {"num_key_value_heads": 1},
    "a group for each head": {"num_key_value_heads": 4},
    "heads wider than the hidden size": {"head_dim": 32, "num_hidden_layers": 3},
    "no bias": {"attention_bias": False},
    "one layer, ffn narrower than hidden": {"num_hidden_layers": 1, "intermediate_size": 24},
    "rope_ratio 50": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
}


def batch(lengths: list[int], vocab_size: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, padded on the left with 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, vocab_size, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


def reference_logits(folder, ids, mask):
    return forward(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), ids, mask)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_the_reference(tmp_path, changes):
    random_model(small_config(**changes), seed=3).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = batch([40, 17, 1])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    expected = reference_logits(tmp_path, ids, mask)
    real = mask.bool()
    assert expected[real].abs().max() > 0.5  # there is something to compare
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_change_a_row(small_checkpoint, attention):
    model = AutoModelForCausalLM.from_pretrained(small_checkpoint, attn_implementation=attention)
    ids, mask = batch([30, 11])
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[1, -11:]
        alone = model(input_ids=ids[1:, -11:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_generation_with_a_cache_follows_the_reference(small_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(small_checkpoint)
    ids, mask = batch([12, 7], vocab_size=400)
    with torch.no_grad():
        generated = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=511
        )
    for _ in range(6):
        following = reference_logits(small_checkpoint, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(generated, ids)


def test_the_reference_tells_the_usual_mistakes(small_checkpoint, tmp_path):
    # The comparison bites: the default epsilon of Glm, another rope base or swapped gate and up are far above 1e-5.
    ids, mask = batch([40])
    weights = load_file(small_checkpoint / "model.safetensors")
    config = json.loads((small_checkpoint / "config.json").read_text())
    right = forward(config, weights, ids, mask)
    swapped = {
        name: torch.cat(tensor.chunk(2)[::-1]) if "dense_h_to_4h" in name else tensor
        for name, tensor in weights.items()
    }
    wrong = [
        forward(config | {"layernorm_epsilon": 1.5625e-07}, weights, ids, mask),
        forward(config | {"rope_ratio": 50}, weights, ids, mask),
        forward(config, swapped, ids, mask),
    ]
    assert all((logits - right).abs().max() > 3e-5 for logits in wrong)


def test_a_configuration_that_rotates_whole_heads_is_refused():
    whole = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    with pytest.raises(AssertionError, match="rotary frequencies"):
        ChatGLM3ForCausalLM(small_config(rope_parameters=whole))


def test_generation_stops_at_every_stop_token_of_the_configuration():
    model = ChatGLM3ForCausalLM(small_config(eos_token_id=[2, 406, 408]))
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([2, 406, 408], 0, 1)
