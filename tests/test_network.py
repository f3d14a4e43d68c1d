"""The network of the chapters: the same everywhere, ChatGLM3's build, and what calls two sets of weights equal."""

import dataclasses
import math

import pytest
import torch
from fake_nvml import GIB
from one_process import LENGTH, ROWS, TWO_LAYERS
from one_process import train_alone as expected

from helpers.hardware import Gpu, describe_machine
from helpers.parallel.network import GLM_1_5B, TINY, batch, build, largest_difference, shape_for, train_alone, weights


def test_a_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = build(TINY), build(TINY), build(TINY, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert largest_difference(weights(first), weights(second)) == 0
    assert largest_difference(weights(first), weights(other)) > 0


def test_it_has_chatglm3s_layers():
    model = build(TINY)
    assert sum(p.numel() for p in model.parameters()) == TINY.parameters
    assert model.config.num_key_value_heads == 2 and model.config.rms_norm_eps == 1e-5
    assert not model.config.tie_word_embeddings
    assert 1e9 < GLM_1_5B.parameters < 3e9


def test_a_batch_depends_on_its_step_only():
    first, again, next_one = (batch(TINY, 4, 16, step)["input_ids"] for step in (0, 0, 1))
    assert first.shape == (4, 16) and torch.equal(first, again) and not torch.equal(first, next_one)


@pytest.mark.parametrize(
    ("gibibytes", "gpus", "expected"), [(80, 2, GLM_1_5B), (80, 1, TINY), (16, 2, TINY), (0, 0, TINY)]
)
def test_the_large_one_needs_a_gpu_for_each_rank(gibibytes, gpus, expected):
    cards = tuple(Gpu("card", gibibytes * GIB, (9, 0)) for _ in range(gpus))
    machine = dataclasses.replace(describe_machine(), gpus=cards)
    assert shape_for(machine, 2, micro_batch_size=2, sequence_length=512) == expected


def test_one_process_trains_as_what_the_tests_compare_with():
    trained = train_alone(TWO_LAYERS, ROWS, LENGTH, steps=2)
    assert largest_difference(trained, expected(TWO_LAYERS, 1, steps=2).weights) <= 1e-7


def test_differences():
    one, two = {"a": torch.zeros(3)}, {"a": torch.tensor([0.0, -2.0, 1.0])}
    assert largest_difference(one, two) == 2
    assert math.isnan(
        largest_difference(
            {"a": torch.ones(2), "b": torch.tensor([math.nan])}, {"a": torch.ones(2), "b": torch.ones(1)}
        )
    )
    with pytest.raises(ValueError, match="b is only expected"):
        largest_difference(one, one | {"b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"a is \(3,\), expected \(2,\)"):
        largest_difference(one, {"a": torch.ones(2)})
