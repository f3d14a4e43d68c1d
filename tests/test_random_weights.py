"""The checkpoint for measurements: the 6B model's shape, in the published layout, whole or not there."""

import shutil
from collections import namedtuple

import pytest
import torch

from helpers.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, random_weights
from helpers.chatglm3.checkpoint import disk_bytes, tensor_shapes
from helpers.chatglm3.random_weights import PARAMETERS, SHAPE, write_random_checkpoint
from helpers.errors import UserError


def test_the_shape_is_the_6b_models():
    with torch.device("meta"):
        assert ChatGLM3ForCausalLM(ChatGLM3Config(**SHAPE)).num_parameters() == PARAMETERS
    assert 0 < disk_bytes(ChatGLM3Config(**SHAPE), torch.float16) - 2 * PARAMETERS < 2**24


@pytest.fixture
def small_shape(monkeypatch) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    monkeypatch.setattr(random_weights, "SHAPE", shape)
    with torch.device("meta"):
        count = ChatGLM3ForCausalLM(ChatGLM3Config(**shape)).num_parameters()
    monkeypatch.setattr(random_weights, "PARAMETERS", count)


@pytest.mark.filterwarnings("ignore:.*not the tokenizer published")
def test_it_is_read_through_the_ordinary_path(tmp_path, small_shape):
    write_random_checkpoint(tmp_path / "model")
    assert "transformer.encoder.layers.27.self_attention.query_key_value.weight" in tensor_shapes(tmp_path / "model")
    model = ChatGLM3ForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.float16 and len(set(model.lm_head.weight[0].tolist())) > 1
    with pytest.raises(UserError, match="model is not empty; name a new folder"):
        write_random_checkpoint(tmp_path / "model")


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**30))
    monkeypatch.setattr(random_weights, "ChatGLM3ForCausalLM", None)
    with pytest.raises(UserError, match=r"model needs 11\.64 GiB, and .* has 1\.00 GiB left"):
        write_random_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
