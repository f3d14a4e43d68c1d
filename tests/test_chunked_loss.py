"""helpers.activations.chunked_loss against F.cross_entropy on all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.activations.chunked_loss import chunked_cross_entropy
from helpers.errors import UserError
from helpers.memory.peak_bytes import PeakBytes
from helpers.memory.saved_tensors import SavedTensors
from helpers.parallel.network import EQUALITY_EPSILON, TINY, batch, build, largest_difference, weights

WIDTH, VOCABULARY = 8, 37


def inputs(tokens, masked=(), dtype=torch.float32, vocabulary=VOCABULARY, frozen=False):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(vocabulary, WIDTH, generator=generator)).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[list(masked)] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, [tensor for tensor in (hidden, weight) if tensor.requires_grad])


@given(tokens=st.integers(1, 40), chunk=st.integers(1, 50), data=st.data(), frozen=st.booleans(), told=st.booleans())
@settings(deadline=None, max_examples=80)
def test_loss_and_gradients_are_those_of_all_logits(tokens, chunk, data, frozen, told):
    masked = data.draw(st.sets(st.integers(0, tokens - 1), max_size=tokens - 1))
    hidden, weight, labels = inputs(tokens, masked, frozen=frozen)
    target_positions = torch.tensor(sorted(set(range(tokens)) - masked)) if told else None
    expected, found = (
        plain(hidden, weight, labels),
        chunked_cross_entropy(hidden, weight, labels, chunk, target_positions),
    )
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    for mine, theirs in zip(gradients(3 * found, hidden, weight), gradients(3 * expected, hidden, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_differences():
    hidden, weight, labels = (tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs(3, {1}))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    chunked_cross_entropy(hidden, weight, labels, 1).backward()
    for tensor, place in ((hidden, (2, 5)), (weight, (int(labels[0]), 3)), (hidden, (1, 0))):
        step = torch.zeros_like(tensor)
        step[place] = 1e-2
        moved = [[t + sign * step if t is tensor else t for t in (hidden, weight)] for sign in (1, -1)]
        above, below = (plain(*pair, labels).item() for pair in moved)
        assert float(tensor.grad[place]) == pytest.approx((above - below) / 2e-2, abs=2e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_16_bit_differs_by_16_bit_rounding_only(autocast, frozen):
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, labels = inputs(60, range(0, 60, 3), dtype, frozen=frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = plain(hidden, weight, labels), chunked_cross_entropy(hidden, weight, labels, 7)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs, of in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), (hidden, weight), strict=False
    ):
        assert mine.dtype == of.dtype
        assert (mine - theirs).abs().max() <= 2**-7 * theirs.abs().max()


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_trained_token_everything_is_zero(frozen):
    hidden, weight, labels = inputs(5, range(5), frozen=frozen)
    loss = chunked_cross_entropy(hidden, weight, labels, 2)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, weight))


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs(6)
    found = chunked_cross_entropy(1e4 * hidden, weight, labels, 4)
    assert found.isfinite() and found.item() == pytest.approx(plain(1e4 * hidden, weight, labels).item(), rel=1e-6)


def test_backward_twice_gives_the_same_gradient_twice():
    hidden, weight, labels = inputs(9)
    loss = chunked_cross_entropy(hidden, weight, labels, 4)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_of_one_chunk_exist_at_a_time(frozen):
    tokens, chunk, vocabulary = 256, 16, 5000
    hidden, weight, labels = inputs(tokens, vocabulary=vocabulary, frozen=frozen)
    with PeakBytes("cpu") as memory:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk)
        forward, kept = memory.peak, memory.now
        loss.backward()
    logits = 4 * chunk * vocabulary
    made_in_forward = hidden.nbytes if frozen else 0
    assert logits <= forward <= logits + made_in_forward + 16 * 1024
    assert kept == (hidden.nbytes if frozen else 12 * tokens) + 4
    weight_gradient = 0 if frozen else weight.nbytes
    assert logits + weight_gradient <= memory.peak <= logits + weight_gradient + hidden.nbytes + 24 * 1024


@pytest.mark.slow
def test_the_head_is_trained_as_with_the_models_own_loss():
    def train(chunk):
        model = build(TINY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EQUALITY_EPSILON)
        for step in range(20):
            rows = batch(TINY, 4, 16, step)
            if chunk:
                hidden = model.model(rows["input_ids"]).last_hidden_state.flatten(0, 1)
                labels = F.pad(rows["labels"], (0, 1), value=-100)[:, 1:].flatten()
                loss = chunked_cross_entropy(hidden, model.lm_head.weight, labels, chunk)
            else:
                loss = model(**rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    assert largest_difference(train(13), train(None)) <= 1e-6


def test_the_ledger_sees_what_is_kept():
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden, _, labels = inputs(20)
    with SavedTensors(head) as activations:
        loss = chunked_cross_entropy(hidden * 1, head.weight, labels, 4)
    assert loss.requires_grad
    assert activations.total == hidden.nbytes + labels.nbytes + 12 * 20


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_chunked_loss_is_the_same_in_fp32_and_coarse_in_bf16(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(4096, 64, generator=generator)).to(dtype)
    targets = torch.randint(4096, (512,), generator=generator)
    targets[::3] = -100
    positions = (targets != -100).nonzero().squeeze(1)
    expected = plain(hidden, weight, targets).item()
    options = torch.nn.LinearCrossEntropyOptions()
    whole = F.linear_cross_entropy(hidden, weight, targets, options=options)
    selected = F.linear_cross_entropy(hidden[positions], weight, targets[positions], options=options)
    assert chunked_cross_entropy(hidden, weight, targets, 128).item() == pytest.approx(expected, rel=1e-6)
    for theirs in (whole, selected):
        assert theirs.dtype == dtype
        if dtype == torch.float32:
            assert theirs.item() == pytest.approx(expected, rel=1e-6)
        else:
            assert abs(theirs.item() - expected) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk is 0; give the number of tokens"),
        ({"hidden": torch.ones(2, 3, WIDTH)}, r"hidden is \(2, 3, 8\) and head_weight \(37, 8\)"),
        ({"head_weight": torch.ones(VOCABULARY, 5)}, r"head_weight \(37, 5\); give \[tokens, width\]"),
        ({"targets": torch.ones(4, dtype=torch.long)}, r"targets is \(4,\) for 6 tokens; give one for each"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    hidden, weight, labels = inputs(6)
    with pytest.raises(UserError, match=message):
        chunked_cross_entropy(**{"hidden": hidden, "head_weight": weight, "targets": labels, "chunk": 2} | change)
