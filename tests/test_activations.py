"""helpers.activations and helpers.memory.peak_bytes: the same training, with less kept on the device."""

from contextlib import nullcontext

import pytest
import torch
from one_process import FOUR_LAYERS, LENGTH, ROWS, STEPS, device_of, make_optimizer, train_alone
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.autograd.graph import save_on_cpu
from torch.utils.flop_counter import FlopCounterMode

from helpers.activations import compiled
from helpers.activations.checkpointing import ATTENTION, MATMULS, checkpoint_layers
from helpers.activations.flops import count_flops
from helpers.activations.offload import OffloadedActivations
from helpers.activations.swiglu import RecomputingMLP, swiglu
from helpers.errors import UserError
from helpers.memory.peak_bytes import PeakBytes
from helpers.memory.predict import Configuration
from helpers.memory.predict.saved_tensors import saved_checkpoints, total_bytes
from helpers.memory.saved_tensors import SavedTensors
from helpers.parallel.network import TINY, batch, build, largest_difference, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "keep", "offloaded"),
    [
        (None, (), False),
        ((1, 2), (), False),
        (None, MATMULS, False),
        (None, (*MATMULS, *ATTENTION), False),
        ((), (), True),
        (None, (), True),
    ],
    ids=["all layers", "two layers", "matmuls kept", "matmuls and attention kept", "offloaded", "both"],
)
def test_weights_are_those_of_plain_training(layers, keep, offloaded):
    device = device_of(1)
    model = build(FOUR_LAYERS, device)
    checkpoint_layers(model, layers, keep)
    optimizer = make_optimizer(model.parameters())
    for step in range(STEPS):
        # 4 KiB under way: far less than one layer keeps, so that the limit is at work.
        with OffloadedActivations(model, min_bytes=512, max_in_flight_bytes=4096) if offloaded else nullcontext():
            loss = model(**batch(FOUR_LAYERS, ROWS, LENGTH, step, device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(weights(model), train_alone(FOUR_LAYERS, 1).weights) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_equal_bit_for_bit_and_saves_its_input_only(dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(2, 5, 2 * 48, dtype=dtype, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    expected, seed = up * nn.functional.silu(gate), torch.randn(2, 5, 48, dtype=dtype)
    (gradient,) = torch.autograd.grad(expected, gate_up, seed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        found = swiglu(gate_up)
    assert torch.equal(found, expected) and torch.equal(torch.autograd.grad(found, gate_up, seed)[0], gradient)
    assert saved == [gate_up.data_ptr()]


def test_a_recomputing_mlp_trains_the_same_and_keeps_less():
    plain, lean = build(TINY), build(TINY)
    for layer in lean.model.layers:
        layer.mlp.__class__ = RecomputingMLP
    silu = len(plain.model.layers) * ROWS * LENGTH * TINY.intermediate * 4  # fp32
    assert kept(plain)[0] - kept(lean)[0] == silu
    for model in (plain, lean):
        model(**batch(TINY, ROWS, LENGTH)).loss.backward()
    pairs = zip(plain.parameters(), lean.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def kept(model):
    with PeakBytes("cpu") as memory:
        loss = model(**batch(TINY, ROWS, LENGTH)).loss
        bytes_now = memory.now
        loss.backward()
    model.zero_grad()
    return bytes_now, memory.peak


@pytest.mark.slow
def test_compiled_layers_that_recompute_adapters_inputs_keep_masks_instead_and_train_the_same(monkeypatch):
    # torch's partition of forward and backward, without generating code, which takes long.
    partition = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
    plain = aot_autograd(fw_compiler=nop, bw_compiler=nop, **partition)
    monkeypatch.setattr(compiled, "compile_fx", plain)
    width, rows = 64, 128
    found = []
    for backend in (plain, compiled.recompute_inputs):
        torch._dynamo.reset()
        torch.manual_seed(0)
        linear = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width))
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["1"], init_lora_weights=False)
        model = get_peft_model(linear, lora)
        x = torch.randn(rows, width, requires_grad=True)
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = torch.compile(model, backend=backend)(x)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"x": x.grad}
        found.append((sum(saved.values()), gradients))
    (most, right), (least, ours) = found
    assert most - least == rows * width * x.itemsize
    assert largest_difference(right, ours) == 0


def test_each_checkpointed_layer_keeps_its_input_only():
    model = build(TINY)
    sizes = []
    for count in (0, 3, 8):
        checkpoint_layers(model, range(count))
        sizes.append(kept(model)[0])
    assert sizes[0] - sizes[1] == pytest.approx(3 / 8 * (sizes[0] - sizes[2]), rel=0.01)
    configuration = Configuration(
        TINY, lora=None, precision="fp32", micro_batch_size=ROWS, sequence_length=LENGTH, checkpointing=True
    )
    with SavedTensors(model) as activations:
        loss = model(**batch(TINY, ROWS, LENGTH)).loss
    assert loss.requires_grad
    layers = sum(size for name, size in activations.by_module.items() if name.startswith("model.layers."))
    # The tables of cosine and sine belong to all layers, as do the positions, and are counted with the first.
    assert layers == total_bytes(saved_checkpoints(configuration)) + 8 * LENGTH


def test_what_is_kept_is_not_computed_again():
    model = build(TINY)

    def operations(keep):
        checkpoint_layers(model, None, keep)
        with FlopCounterMode(display=False) as counter:
            model(**batch(TINY, ROWS, LENGTH)).loss.backward()
        model.zero_grad()
        return counter.get_total_flops()

    checkpoint_layers(model, ())
    sizes = [kept(model)[0]]
    for keep in ((*MATMULS, *ATTENTION), MATMULS, ATTENTION, ()):
        checkpoint_layers(model, None, keep)
        sizes.append(kept(model)[0])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    # Backward stops to compute anew at the last tensor that it needs: down_proj's output is not among them.
    again = TINY.layer_matrices - TINY.hidden * TINY.intermediate
    assert operations(()) - operations(MATMULS) == 2 * ROWS * LENGTH * TINY.layers * again


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_costs_two_matmuls_forward_and_five_backward_whatever_heads_share(kv_heads):
    query = torch.randn(2, 4, 8, 16, requires_grad=True)
    key = torch.randn(2, kv_heads, 8, 16, requires_grad=True)
    with count_flops() as counter:
        out = nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    matmul = 2 * 2 * 4 * 8 * 8 * 16
    assert counter.get_total_flops() == 2 * matmul
    with count_flops() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * matmul


def test_an_unknown_layer_is_named():
    with pytest.raises(UserError, match="layer 8 of a model of 8 layers"):
        checkpoint_layers(build(TINY), [0, 8])


def test_offloading_moves_each_activation_once_and_no_weight():
    model = build(TINY)
    with SavedTensors(model) as plain:
        loss = model(**batch(TINY, ROWS, LENGTH)).loss
    del loss
    offload = OffloadedActivations(model, min_bytes=1)
    with SavedTensors(model) as activations, offload:
        loss = model(**batch(TINY, ROWS, LENGTH)).loss
    with SavedTensors(model) as again:
        other = model(**batch(TINY, ROWS, LENGTH)).loss
    assert offload.offloaded_bytes == activations.total == again.total
    assert offload.fetched_bytes == 0
    loss.backward()
    assert offload.fetched_bytes == offload.offloaded_bytes
    assert activations.total == 0 and other.requires_grad
    assert plain.peak == offload.offloaded_bytes


def test_small_tensors_and_weights_stay():
    linear = nn.Linear(4, 4)
    offload = OffloadedActivations(linear, min_bytes=65)
    with offload:
        loss = linear(torch.ones(4, 4)).square().sum()  # 64 bytes each
    assert offload.offloaded_bytes == 0
    loss.backward()
    assert linear.weight.grad is not None


def test_memory_that_is_used_again_is_another_tensor():
    """The same address and the same storage, with something else in it."""
    x = torch.ones(64, requires_grad=True)
    offload = OffloadedActivations(nn.Linear(1, 1), min_bytes=1)
    with offload:
        y = x * 2
        factor = torch.full((64,), 3.0)
        z = y * factor
        factor.fill_(5.0)  # plain autograd refuses this; what was saved is the copy
        z = z * factor
        for number in range(4):
            z = z * torch.full((64,), float(number + 1))  # freed after it was saved, and its place taken
    z.sum().backward()
    assert torch.equal(x.grad, torch.full((64,), 2.0 * 3 * 5 * 24))


def test_views_of_one_storage_come_back_as_they_were():
    base = torch.arange(24.0).reshape(4, 6).requires_grad_()
    offload = OffloadedActivations(nn.Linear(1, 1), min_bytes=1)

    def compute(x):
        whole = x * 1
        left, right = whole.chunk(2, dim=1)
        return (left * right.sin()).sum() + (whole.t()[1:3] ** 3).sum()

    with offload:
        loss = compute(base)
    (found,) = torch.autograd.grad(loss, base)
    (expected,) = torch.autograd.grad(compute(base), base)
    assert torch.equal(found, expected)
    assert offload.offloaded_bytes == 3 * base.nbytes - base.nbytes // 2 - base.nbytes


def test_the_librarys_way_gives_the_same_gradients():
    model = build(TINY)

    def gradients(context):
        with context:
            loss = model(**batch(TINY, ROWS, LENGTH)).loss
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    found = gradients(OffloadedActivations(model, min_bytes=1))
    assert largest_difference(found, gradients(save_on_cpu())) == 0


def test_peak_counts_what_a_block_makes():
    before = torch.ones(1000)
    with PeakBytes("cpu") as memory:
        a = before + 1
        view = a[:10]
        a.mul_(2)
        assert (memory.now, memory.peak) == (4000, 4000)
        b = torch.cat([a, a])
        assert memory.now == 12000
        del a, b
        assert memory.now == 4000  # the view holds all of it
    del view
    assert (memory.now, memory.peak) == (4000, 12000)


def test_peak_is_what_autograd_keeps_after_forward():
    model = build(TINY)
    with PeakBytes("cpu") as memory, SavedTensors(model) as activations:
        loss = model(**batch(TINY, ROWS, LENGTH)).loss
        assert memory.now == activations.total + loss.nbytes
