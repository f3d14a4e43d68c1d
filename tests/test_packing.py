"""Packs: which rows go where, what a batch of them holds, and that a row in a pack is the row alone."""

import inspect
import itertools
import json

import pytest
import torch
from conftest import needs_gpu
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small_chatglm import random_model, small_config

from helpers.activations.chunked_loss import IGNORE_INDEX
from helpers.config.finetune import SpeedOptions
from helpers.errors import UserError
from helpers.finetune import packed_attention
from helpers.finetune.collators import TrainingCollator
from helpers.finetune.model import TrainedChatGLM3ForCausalLM
from helpers.finetune.packing import PackCollator, best_fit_packing, packed_features
from helpers.finetune.speed import RIGHT_PADDED, SDPA, apply_speed_options, evaluation_mode

CAPACITY, PAD = 40, 0
LENGTHS = (11, 29, 7, 18, 5, 23, 13)


def rows(lengths=LENGTHS, vocabulary=400):
    generator = torch.Generator().manual_seed(sum(lengths))
    features = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = IGNORE_INDEX
        features.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(features)


def packed_batch(features, capacity=CAPACITY):
    packs = packed_features(features, capacity, seed=0)
    return PackCollator.of(packs, capacity, PAD)(list(packs))


def lora_model(targets=("q_proj", "k_proj", "v_proj"), **options):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(random_model(small_config(**options), network=TrainedChatGLM3ForCausalLM), adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins with zeros, and would then pass no gradient to lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model, batch, counted):
    inputs = {key: value for key, value in batch.items() if key not in ("tokens", "rows")}
    loss = model(**inputs, num_items_in_batch=torch.tensor(counted)).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss, torch.autograd.grad(loss, trained)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    spare=st.integers(0, 200),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_every_row_is_in_one_pack_and_no_two_packs_would_fit_into_one(lengths, spare, seed):
    capacity = max(lengths) + spare
    packs = best_fit_packing(lengths, capacity, seed)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    filled = sorted(sum(lengths[row] for row in rows) for rows in packs)
    assert filled[0] > 0 and filled[-1] <= capacity
    assert len(filled) == 1 or filled[0] + filled[1] > capacity
    assert packs == best_fit_packing(lengths, capacity, seed)


def test_a_row_longer_than_a_pack_is_named():
    with pytest.raises(UserError, match="packing 20 is shorter than the longest row of 29 tokens; give at least that"):
        packed_features(rows(), 20, seed=0)


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40), spare=st.integers(0, 70))
@settings(deadline=None, max_examples=60)
def test_a_batch_of_packs_holds_the_rows_and_says_where_they_are(lengths, spare):
    features, capacity = rows(tuple(lengths)), max(lengths) + spare
    packs = packed_features(features, capacity, seed=1)
    collator = PackCollator.of(packs, capacity, PAD)
    batch = collator(list(packs))
    ids, positions, cu_seqlens = batch["input_ids"].flatten(), batch["position_ids"].flatten(), batch["cu_seqlens"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (len(packs), capacity)
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == ids.numel() and cu_seqlens.dtype == torch.int32
    pieces = [(int(a), int(b)) for a, b in itertools.pairwise(cu_seqlens) if b > a]
    assert all(b - a <= batch["max_seqlen"] for a, b in pieces)
    assert all(positions[a:b].tolist() == list(range(b - a)) for a, b in pieces)
    found = sorted(ids[a:b].tolist() for a, b in pieces if ids[a] != PAD)
    assert found == sorted(features["input_ids"][:])
    assert batch["rows"] == len(lengths) and batch["tokens"] == sum(lengths)
    # A token is predicted by the one before it in its own row, so a row's first label never counts.
    trained = sum(label != IGNORE_INDEX for row in features["labels"][:] for label in row[1:])
    assert batch["target_positions"].numel() == trained
    assert (batch["labels"].flatten()[batch["target_positions"] + 1] != IGNORE_INDEX).all()
    shifted = batch["shift_labels"]
    assert (shifted[:, :-1] == batch["labels"][:, 1:]).all() and (shifted[:, -1] == IGNORE_INDEX).all()
    ends = cu_seqlens[1:].long() - 1
    assert (shifted.flatten()[ends] == IGNORE_INDEX).all()  # no row's last token predicts the next row
    again = collator(list(packs)[:1])["cu_seqlens"]
    assert len(packs) * (again.numel() - 1) == cu_seqlens.numel() - 1  # shapes depend on the number of packs alone


@pytest.mark.parametrize("chunk", [None, 7])
def test_packed_rows_train_as_padded_ones(chunk):
    features = rows()
    packed, padded = packed_batch(features), TrainingCollator(PAD)(list(features))
    counted = padded["target_positions"].numel()
    assert packed["target_positions"].numel() == counted
    model = lora_model()
    expected, right = loss_and_gradients(model, padded, counted)
    apply_speed_options(model, SpeedOptions(packing=CAPACITY, loss_chunk=chunk))
    found, ours = loss_and_gradients(model, packed, counted)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_rows_padded_on_the_right_train_without_a_mask_as_with_one():
    padded = TrainingCollator(PAD)(list(rows()))
    counted = padded["target_positions"].numel()
    model = lora_model()
    apply_speed_options(model, SpeedOptions())
    assert model.get_base_model().config._attn_implementation == SDPA  # no FlashAttention in 32 bit
    expected, right = loss_and_gradients(model, padded, counted)
    model.get_base_model().set_attn_implementation(RIGHT_PADDED)
    found, ours = loss_and_gradients(model, padded, counted)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    # Padding in front of a row, as in evaluation, would be seen without a mask.
    ids = torch.randint(3, 400, (1, 9))
    front = torch.cat([torch.full((1, 5), PAD), ids], dim=1)
    mask = (front != PAD).long()
    with torch.no_grad():
        alone, seen = model(ids).logits[:, -1], model(front, attention_mask=mask).logits[:, -1]
        with evaluation_mode(model):
            hidden = model(front, attention_mask=mask).logits[:, -1]
    assert torch.allclose(alone, hidden, atol=1e-4) and not torch.allclose(alone, seen, atol=1e-2)


def test_an_adapter_on_the_output_layer_counts_in_a_chunked_loss():
    padded = TrainingCollator(PAD)(list(rows()))
    counted = padded["target_positions"].numel()
    model = lora_model(["q_proj", "lm_head"])
    found = []
    for chunk in (None, 7):
        apply_speed_options(model, SpeedOptions(loss_chunk=chunk))
        found.append(loss_and_gradients(model, padded, counted))
    assert found[0][0].item() == found[1][0].item()
    assert all(gradient.abs().max() > 0 for gradient in found[1][1])


def test_labels_alone_get_transformers_loss_and_the_saved_model_is_the_published_one(tmp_path):
    batch = TrainingCollator(PAD)(list(rows()))
    model = random_model(small_config(), network=TrainedChatGLM3ForCausalLM)
    model.loss_chunk = 7
    chunked = model(batch["input_ids"], shift_labels=batch["shift_labels"])
    plain = model(batch["input_ids"], labels=batch["labels"])
    assert chunked.logits is None and plain.logits is not None
    assert chunked.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ChatGLMModel"]
    assert "position_ids" in inspect.signature(model.forward).parameters  # generation asks whether it may pass them


def test_the_loss_of_every_token_is_the_one_it_has_alone():
    features = rows()
    model = lora_model().eval()
    apply_speed_options(model, SpeedOptions(packing=CAPACITY))
    batch = packed_batch(features)
    with torch.no_grad():
        logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits.flatten(0, 1)
        pieces = [(int(a), int(b)) for a, b in itertools.pairwise(batch["cu_seqlens"]) if b > a]
        compared = 0
        for a, b in pieces:
            ids = batch["input_ids"].flatten()[a:b]
            if ids[0] == PAD:
                continue
            alone = model(ids[None]).logits[0]
            wanted = ids[1:]
            losses = [
                torch.nn.functional.cross_entropy(found[:-1], wanted, reduction="none")
                for found in (logits[a:b], alone)
            ]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == len(features)


def test_another_rows_tokens_change_nothing():
    batch = packed_batch(rows())
    model = lora_model().eval()
    apply_speed_options(model, SpeedOptions(packing=CAPACITY))
    first, second = (int(boundary) for boundary in batch["cu_seqlens"][1:3])
    changed = batch["input_ids"].clone()
    changed.view(-1)[:first] = 5
    with torch.no_grad():
        before, after = (
            model(ids, position_ids=batch["position_ids"]).logits.flatten(0, 1) for ids in (batch["input_ids"], changed)
        )
    assert not torch.allclose(before[:first], after[:first])
    torch.testing.assert_close(before[first:second], after[first:second], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_layers_compute_the_same_and_evaluation_does_without_them():
    features = rows()
    packed = packed_batch(features)
    counted = packed["target_positions"].numel()
    model = lora_model()
    apply_speed_options(model, SpeedOptions(packing=CAPACITY))
    expected, right = loss_and_gradients(model, packed, counted)
    apply_speed_options(model, SpeedOptions(packing=CAPACITY, compile_layers=True, loss_chunk=16))
    compiled = torch._dynamo.utils.counters["stats"]
    compiled.clear()
    found, ours = loss_and_gradients(model, packed, counted)
    assert compiled["unique_graphs"] >= 1
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    compiled.clear()
    with evaluation_mode(model), torch.no_grad():
        model(input_ids=packed["input_ids"][:, :9])
    assert not compiled["unique_graphs"]


@needs_gpu
class TestGpu:
    @pytest.mark.parametrize("masked", [False, True])
    def test_padded_rows_get_a_mask_only_where_it_is_asked_for(self, masked):
        model = lora_model(head_dim=64).to("cuda", torch.bfloat16)
        apply_speed_options(model, SpeedOptions(padding_mask=masked))
        assert model.get_base_model().config._attn_implementation == (SDPA if masked else RIGHT_PADDED)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_the_kernel_computes_what_the_whole_mask_does(self, compiled):
        batch = packed_batch(rows((90, 140, 33, 70, 201, 15)), 256)
        batch = {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch.items()}
        model = lora_model(head_dim=64).to("cuda", torch.bfloat16)
        counted = batch["target_positions"].numel()
        model.config.use_cache = False
        expected, right = loss_and_gradients(model, batch, counted)
        apply_speed_options(model, SpeedOptions(packing=256, compile_layers=compiled, loss_chunk=64))
        assert model.get_base_model().config._attn_implementation == packed_attention.IMPLEMENTATION
        found, ours = loss_and_gradients(model, batch, counted)
        assert found.item() == pytest.approx(expected.item(), rel=2e-3)
        for mine, theirs in zip(ours, right, strict=True):
            assert (mine - theirs).norm() <= 0.03 * theirs.norm()
