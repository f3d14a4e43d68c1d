"""helpers.memory.ledger and .activations: every storage once, in its category, equal to what is counted by hand."""

import gc
import json
import weakref
from dataclasses import asdict
from functools import partial

import pytest
import torch
from conftest import LIMIT
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_ranks import measure
from peft import LoraConfig, get_peft_model
from small_chatglm import random_model, small_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.errors import UserError
from helpers.launch import environment, run
from helpers.memory.categories import CATEGORIES
from helpers.memory.ledger import Ledger, count_bytes, gather_ledgers
from helpers.memory.saved_tensors import SavedTensors, block_name
from helpers.memory.storages import storages, tensors_in


def held(ledger):
    """Non-empty categories, all devices together."""
    return {category: size for category, size in ledger.categories.items() if size}


# --- storages


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.sampled_from(CATEGORIES[:4])), max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
def test_views_ties_and_detached_copies_of_any_shape_count_once(sizes, uses, dtype):
    memory = [torch.zeros(size, dtype=dtype) for size in sizes]
    model = nn.Module()
    expected = 0
    used = set()
    for number, (which, start, kind) in enumerate(uses):
        which %= len(memory)
        whole = memory[which]
        view = whole[start % len(whole) :].detach()
        if kind == "buffers":
            model.register_buffer(f"b{number}", view)
        else:
            setattr(model, f"p{number}", nn.Parameter(view, requires_grad=False))
        if which not in used:
            used.add(which)
            expected += sizes[which] * dtype.itemsize
    assert count_bytes(model).total == expected


def test_what_takes_no_memory_has_no_storage():
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    assert [list(storages(tensor)) for tensor in (torch.empty(5, device="meta"), torch.empty(0), freed)] == [[], [], []]


def test_sparse_tensors_are_their_indices_and_values():
    layer = nn.Embedding(10, 3, sparse=True)
    layer(torch.tensor([1, 4])).sum().backward()
    assert held(count_bytes(layer)) == {"parameters": 120, "gradients": 2 * 8 + 2 * 3 * 4}


def test_tensors_are_found_in_any_container_once_and_modules_are_not_entered():
    first, second = torch.zeros(1), torch.zeros(2)
    nested = {"a": [first, (second, {"b": first})], "c": nn.Linear(1, 1), "d": {3: "text"}}
    nested["itself"] = nested
    assert {id(tensor) for tensor in tensors_in(nested)} == {id(first), id(second)}
    assert len(list(tensors_in(nested))) == 2


# --- the ledger of one process


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


PARAMETERS = 8 * 16 + 16 + 16 * 4 + 4


def test_a_training_step_of_an_mlp_to_the_byte():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    assert held(count_bytes(model, optimizer)) == {"parameters": 4 * PARAMETERS}
    with SavedTensors(model) as activations:
        loss = model(torch.randn(5, 8)).square().sum()
    saved = 4 * (5 * 8 + 5 * 16 + 5 * 4)  # the batch; ReLU's output, for itself and the next layer; what is squared
    assert held(count_bytes(model, optimizer, activations)) == {"parameters": 4 * PARAMETERS, "activations": saved}
    loss.backward()
    assert held(count_bytes(model, optimizer, activations)) == dict.fromkeys(CATEGORIES[:2], 4 * PARAMETERS)
    optimizer.step()
    steps = 4 * 4  # Adam keeps a step number per parameter, in fp32
    expected = dict.fromkeys(CATEGORIES[:2], 4 * PARAMETERS) | {"optimizer states": 2 * 4 * PARAMETERS + steps}
    assert held(count_bytes(model, optimizer)) == expected
    optimizer.zero_grad()
    assert "gradients" not in held(count_bytes(model, optimizer))


def test_master_weights_of_ones_own_are_optimizer_states_and_their_gradients_gradients():
    model = mlp().bfloat16()
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.SGD(masters)
    expected = {"parameters": 2 * PARAMETERS, "gradients": 4 * PARAMETERS, "optimizer states": 4 * PARAMETERS}
    assert held(count_bytes(model, optimizer)) == expected


def test_lora_has_gradients_and_states_for_the_adapter_only():
    model = get_peft_model(random_model(small_config()), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(torch.ones(2, 6, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    matrices = sum(parameter.requires_grad for parameter in model.parameters())
    assert held(count_bytes(model, optimizer)) == {
        "parameters": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "gradients": 4 * trained,
        "optimizer states": 8 * trained + 4 * matrices,
        "buffers": 4 * sum(buffer.numel() for buffer in model.buffers()),
    }


def test_a_tied_weight_counts_once_with_its_gradient():
    model = random_model(small_config(tie_word_embeddings=True))
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (count_bytes(model).categories["parameters"], count_bytes(model).categories["gradients"]) == (size, size)


def test_the_ledger_is_plain_data_with_a_readable_summary():
    ledger = Ledger(1, {"cuda": dict.fromkeys(CATEGORIES, 0) | {"parameters": 3 * 2**30, "buffers": 1},
                        "cpu": dict.fromkeys(CATEGORIES, 0) | {"optimizer states": 2**29}})  # fmt: skip
    assert Ledger(**json.loads(json.dumps(asdict(ledger)))) == ledger
    assert ledger.total == 3 * 2**30 + 2**29 + 1
    assert (ledger.on("cpu")["optimizer states"], ledger.on("xpu")["parameters"]) == (2**29, 0)
    lines = [line.split("  ") for line in ledger.summary().splitlines()]
    rows = {line[0]: [cell.strip() for cell in line[1:] if cell] for line in lines}
    assert rows["rank 1, GiB"] == ["cuda", "cpu"]
    assert rows["parameters"] == ["3.00", "0.00"] and rows["buffers"] == ["<0.01", "0.00"]
    assert rows["total"] == ["3.00", "0.50"]
    assert gather_ledgers(ledger) == [ledger]


def test_what_is_no_optimizer_is_named():
    with pytest.raises(UserError, match="SGDLike is not an optimizer"):
        count_bytes(mlp(), type("SGDLike", (), {})())


# --- what autograd keeps


def graph_storages(*roots):
    """Bytes of all tensors that the graph behind ``roots`` keeps, read off its nodes; tensors of leaves included."""
    found, waiting, seen = {}, [root.grad_fn for root in roots], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        kept += list(getattr(node, "saved_tensors", ()))
        for tensor in kept:
            for item in tensor if isinstance(tensor, list | tuple) else [tensor]:
                if isinstance(item, torch.Tensor):
                    found |= {storage.address: storage.nbytes for storage in storages(item)}
    return found


def own(model):
    return {s.address for tensor in (*model.parameters(), *model.buffers()) for s in storages(tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chatglm3_equals_what_the_graph_itself_says(dtype):
    model = random_model(small_config()).to(dtype).train()
    tokens = torch.ones(2, 12, dtype=torch.long)
    with SavedTensors(model) as activations:
        loss = model(tokens, labels=tokens).loss
    graph = graph_storages(loss)
    expected = sum(nbytes for address, nbytes in graph.items() if address not in own(model))
    assert activations.total == activations.peak == expected > 10_000
    assert sum(activations.by_module.values()) == expected
    layers = [activations.by_module[f"model.layers.{number}"] for number in (0, 1)]
    assert layers[0] == pytest.approx(layers[1], rel=0.05) and min(layers) > expected / 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["linear", "relu", "exp", "view", "square", "dropout", "norm", "add", "tied"]),
                min_size=1, max_size=12), st.integers(1, 7))  # fmt: skip
def test_any_chain_of_operations_equals_what_the_graph_says(names, rows):
    parts = nn.ModuleDict({"linear": nn.Linear(6, 6), "dropout": nn.Dropout(), "norm": nn.LayerNorm(6)})
    steps = {
        **{name: parts[name] for name in ("linear", "dropout", "norm")},
        "relu": torch.relu,
        "exp": torch.exp,
        "view": lambda x: x.view(-1).view(rows, 6),
        "square": torch.square,
        "add": lambda x: x + x,
        "tied": lambda x: nn.functional.linear(x, parts["linear"].weight),
    }
    x = torch.rand(rows, 6, requires_grad=True)
    with SavedTensors(parts) as activations:
        y = x
        for name in names:
            y = steps[name](y)
    expected = {a: n for a, n in graph_storages(y).items() if a not in own(parts)} if y.grad_fn else {}
    assert activations.total == sum(expected.values())
    del y
    assert activations.total == 0


class Blocks(nn.Module):
    """Blocks of two layers each, checkpointed or not."""

    def __init__(self, blocks, mode="none"):
        super().__init__()
        self.mode = mode
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(blocks))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if self.mode == "none":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_under_checkpointing_only_the_blocks_inputs_stay(mode):
    model = Blocks(5, mode)
    with SavedTensors(model) as activations:
        loss = model(torch.randn(3, 8)).sum()
    assert activations.total == 4 * 3 * 8 * (1 + 5)  # the batch, and one input per block
    assert activations.peak == activations.total
    loss.backward()
    assert activations.total == 0


def test_without_checkpointing_each_block_is_told_apart():
    model = Blocks(3)
    with SavedTensors(model) as activations:
        loss = model(torch.randn(3, 8)).sum()
    block = 4 * 3 * (8 + 32 + 32)  # its input, and GELU's input and output
    assert activations.by_module == {f"blocks.{n}": block for n in range(3)} | {"first": 4 * 3 * 8}
    del loss
    assert (activations.total, dict(activations.by_module)) == (0, {})


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_chatglm3_keeps_its_layers_inputs_and_what_they_share(reentrant):
    model = random_model(small_config(num_hidden_layers=3)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    seen = {}
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(given=list(tensors_in(kwargs)), input=args[0]), with_kwargs=True
    )
    tokens = torch.ones(2, 16, dtype=torch.long)
    with SavedTensors(model) as activations:
        loss = model(tokens, labels=tokens, use_cache=False).loss
    layer = 4 * 2 * 16 * 48
    assert seen["input"].nbytes == layer
    shared = {s.address: s.nbytes for tensor in seen["given"] for s in storages(tensor)}
    assert len(shared) >= 2  # cosines and sines
    by_module = activations.by_module
    assert [by_module[f"model.layers.{n}"] for n in (1, 2)] == [layer, layer]
    assert by_module["model.layers.0"] == layer + sum(shared.values())
    del seen["given"], seen["input"]
    loss.backward()
    del loss
    assert activations.total == 0


class OldLayer(GradientCheckpointingLayer):
    """A layer that checkpoints around its hooks, as those of transformers up to 5.17 do."""

    gradient_checkpointing = True

    def __init__(self, reentrant):
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)
        self.reentrant = reentrant
        self._gradient_checkpointing_func = lambda function, *args: function(*args)  # not a second time inside

    def __call__(self, *args, **kwargs):
        return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=self.reentrant)

    def forward(self, x, scale):
        return self.down(self.up(x).relu()) * scale


@pytest.mark.parametrize("reentrant", [True, False])
def test_inputs_that_the_caller_saves_for_a_checkpointed_layer_are_the_layers(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.layers = nn.ModuleList(OldLayer(reentrant) for _ in range(3))

        def forward(self, x):
            x, scale = self.first(x), torch.rand(8)
            for layer in self.layers:
                x = layer(x, scale=scale)
            return x

    model = Model()
    with SavedTensors(model) as activations:
        loss = model(torch.randn(3, 8)).sum()
    each = 4 * 3 * 8
    expected = {"first": each, "layers.0": each + 4 * 8, "layers.1": each, "layers.2": each}
    assert activations.by_module == expected
    loss.backward()
    del loss
    assert activations.total == 0


def test_tensors_that_save_on_cpu_or_ones_own_hooks_pack_are_what_is_kept():
    model = mlp()
    with SavedTensors(model) as activations:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(torch.bfloat16), lambda t: t.float()):
            loss = model(torch.randn(5, 8)).square().sum()
    # Two-byte copies; ReLU's output is packed for itself and for the next layer, and so are the two weights.
    assert activations.total == 2 * (5 * 8 + 2 * 5 * 16 + 5 * 4 + 16 * 4)
    loss.backward()
    assert activations.total == 0
    with SavedTensors(model) as activations, torch.autograd.graph.save_on_cpu():
        loss = model(torch.randn(5, 8)).square().sum()
    assert {storage.device.type for storage in activations.storages()} == {"cpu"} and activations.total > 0
    assert torch.autograd.graph.saved_tensors_hooks.__enter__.__module__ == "torch.autograd.graph"


def test_recording_changes_no_gradient_and_leaves_nothing_behind():
    x = torch.randn(5, 8)
    gradients = []
    for record in (False, True):
        torch.manual_seed(0)
        model = Blocks(2, "not reentrant")
        if record:
            with SavedTensors(model):
                loss = model(x).square().sum()
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        else:
            loss = model(x).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    probe = weakref.ref(loss)
    del loss, gradients
    gc.collect()
    assert probe() is None


def test_a_block_that_raises_ends_cleanly():
    model = mlp()
    with pytest.raises(RuntimeError), SavedTensors(model) as activations:
        model(torch.randn(5, 9))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with activations:
        loss = model(torch.randn(5, 8)).sum()
    assert activations.by_module.keys() == {"0", "1"}
    del loss


def test_micro_batches_add_up_at_the_peak_and_fall_with_each_backward():
    model = mlp()
    each = 4 * (5 * 8 + 5 * 16)
    with SavedTensors(model) as all_forward:  # as GPipe does
        losses = [model(torch.randn(5, 8)).sum() for _ in range(4)]
        while losses:
            losses.pop().backward()
    with SavedTensors(model) as in_turn:  # as 1F1B does on its last stage
        for _ in range(4):
            model(torch.randn(5, 8)).sum().backward()
    assert (all_forward.peak, in_turn.peak) == (4 * each, each)
    assert (all_forward.total, in_turn.total) == (0, 0)


def test_activations_that_are_parameters_to_the_ledger_count_once():
    model = mlp()
    with SavedTensors(nn.Module()) as activations:  # knows no parameter, so it records the weights as kept
        loss = model(torch.randn(5, 8)).sum()
    ledger = count_bytes(model, activations=activations)
    assert ledger.categories["activations"] == 4 * (5 * 8 + 5 * 16) < activations.total
    assert ledger.categories["parameters"] == 4 * PARAMETERS
    del loss


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("", ""),
        ("lm_head", "lm_head"),
        ("model.layers.11.mlp.up", "model.layers.11"),
        ("h.3.experts.5", "h.3"),
        ("0", "0"),
    ],
)
def test_blocks_are_entries_of_lists(name, block):
    assert block_name(name) == block


# --- two ranks: DDP, FSDP2 and DeepSpeed


@pytest.fixture(scope="module")
def ranks():
    with environment({"CUDA_VISIBLE_DEVICES": ""}):
        return run(measure, 2, timeout=LIMIT).results


WIDTH = 24
SIZES = [WIDTH * WIDTH, WIDTH, *2 * [7, 2 * WIDTH * WIDTH, 2 * WIDTH, 2 * WIDTH * WIDTH]]
ALL = sum(SIZES)
HALF = sum(
    -(-size // 2) for size in SIZES
)  # of each parameter by itself: ZeRO-3, FSDP2 (whose first dimensions are even)
BUFFERS = 4 * 2 * WIDTH
BUCKET = 3000
# Of a batch of 5 rows: the batch; of each block its input, ReLU's output, and the output and the sum that are
# multiplied; and what is squared.
SAVED = 5 * WIDTH + 2 * (5 * WIDTH + 5 * 2 * WIDTH + 5 * WIDTH + 1) + 5 * WIDTH
SAVED_BF16 = 2 * SAVED + 2 * 5 * WIDTH  # it is squared in fp32
# A flat buffer with two elements of padding, cut in the middle. Who owns a part of a parameter gets its whole gradient.
FLAT = ALL + 2
GRADIENTS = (WIDTH * WIDTH + WIDTH + 7 + 1152 + 48 + 1152, 1152 + 7 + 1152 + 48 + 1152 + 2)


def moment(ranks, rank, case, name):
    """Parameters, gradients, optimizer states, activations, communication buffers; the buffers are always the same."""
    held = ranks[rank][case][name]["ledger"]["devices"]
    assert list(held) == ["cpu"] and held["cpu"].pop("buffers", BUFFERS) == BUFFERS
    return tuple(held["cpu"].values())


CASES = (
    *("ddp", "ddp, views", "fsdp", "fsdp, kept whole", "fsdp, bf16"),
    *("zero 0", "zero 1", "zero 2", "zero 3", "zero 0, bf16", "zero 2, bf16", "zero 3, bf16"),
    *("zero 2, offload", "zero 3, offload"),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_what_the_garbage_collector_finds(ranks, case):
    for rank in ranks:
        moments = {name: found for name, found in rank[case].items() if "ledger" in found}
        moments.pop("inside backward", None)  # autograd has temporaries there
        assert len(moments) >= 7
        for name, found in moments.items():
            held = found["ledger"]["devices"]["cpu"]
            # DDP's buckets are no tensors in Python, but the views of them are, from the first backward on.
            views = case == "ddp, views" and name.startswith("zero")
            hidden = held["communication buffers"] if case.startswith("ddp") and not views else 0
            assert sum(held.values()) == found["alive"] + hidden, name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_has_a_bucket_beside_every_gradient_unless_gradients_are_views_of_it(ranks, rank):
    states = 8 * ALL + 4 * len(SIZES)
    for case in ("ddp", "ddp, views"):
        assert len(ranks[rank][case]["buckets"]) == 2
        assert sum(ranks[rank][case]["buckets"].values()) == 4 * ALL
        assert moment(ranks, rank, case, "forward 0") == (4 * ALL, 0, 0, 4 * SAVED, 4 * ALL)
        assert moment(ranks, rank, case, "zero 1") == (4 * ALL, 0, states, 0, 4 * ALL)
    assert moment(ranks, rank, "ddp", "step 1") == (4 * ALL, 4 * ALL, states, 0, 4 * ALL)
    assert moment(ranks, rank, "ddp, views", "step 1") == (4 * ALL, 4 * ALL, states, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("case", "saved", "whole"),
    [
        ("fsdp", 4 * SAVED, 4 * (WIDTH * WIDTH + WIDTH)),  # the root is not given back after forward
        ("fsdp, kept whole", 4 * SAVED, 4 * 2 * HALF),
        ("fsdp, bf16", SAVED_BF16, 2 * (WIDTH * WIDTH + WIDTH)),
    ],
)
def test_fsdp_holds_shards_and_what_is_gathered_just_now(ranks, rank, case, saved, whole):
    # Storages of shards are padded to the largest; Adam's states are not: the second rank has 3 of 7 elements, twice.
    states = 8 * (HALF - 2 * rank) + 4 * len(SIZES)
    assert moment(ranks, rank, case, "forward 1") == (4 * HALF, 0, states, saved, whole)
    assert moment(ranks, rank, case, "backward 1") == (4 * HALF, 4 * HALF, states, 0, 0)
    assert moment(ranks, rank, case, "zero 1") == (4 * HALF, 0, states, 0, 0)


SCALARS = 2 * 4  # Adam's step number of the one flat parameter, and the norm of the gradient


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("case", "size", "saved", "gradients"),
    [
        # Of the block that has run backward, ZeRO-1 keeps the gradients; ZeRO-2 has them in the bucket.
        ("zero 1", 4, 4 * SAVED, sum(SIZES[6:])),
        ("zero 2", 4, 4 * SAVED, 0),
        ("zero 2, bf16", 2, SAVED_BF16, 0),
    ],
)
def test_zero_1_and_2_partition_states_and_gradients(ranks, rank, case, size, saved, gradients):
    states = 12 * FLAT // 2 + SCALARS
    assert moment(ranks, rank, case, "start") == (size * FLAT, 0, 4 * FLAT // 2, 0, 0)
    assert moment(ranks, rank, case, "forward 1") == (size * FLAT, 0, states, saved, 0)
    _, kept, _, _, bucket = moment(ranks, rank, case, "inside backward")
    assert (kept, bucket) == (size * gradients, size * BUCKET)
    assert moment(ranks, rank, case, "backward 1") == (size * FLAT, size * GRADIENTS[rank], states, 0, 0)
    assert moment(ranks, rank, case, "step 1") == (size * FLAT, 0, states, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("suffix", "size", "saved"), [("", 4, 4 * SAVED), (", bf16", 2, SAVED_BF16)])
def test_zero_3_partitions_parameters_and_keeps_gradients_and_bucket_for_good(ranks, rank, suffix, size, saved):
    case = f"zero 3{suffix}"
    tracker = 1  # of infinities: one truth value
    states = 12 * HALF + tracker + SCALARS + 4
    shards, bucket = size * HALF, size * BUCKET
    assert moment(ranks, rank, case, "start") == (shards, shards, 4 * HALF + tracker, 0, bucket)
    gathered = 2 * HALF  # nothing is given back below stage3_max_live_parameters
    assert moment(ranks, rank, case, "forward 1") == (shards, shards, states, saved, bucket + size * gathered)
    assert moment(ranks, rank, case, "step 1")[:4] == (shards, shards, states, 0)
    assert moment(ranks, rank, case, "step 1")[4] == bucket + size * (2 * 8 + WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_offload_keeps_gradients_and_the_buffers_that_carry_them(ranks, rank):
    """On a machine without a GPU all of it is on the CPU; the categories are those of a GPU's run."""
    largest = 2 * WIDTH * WIDTH
    staging = 2 * (FLAT // 2 + 2 * largest)  # updated weights on their way back; gradients on their way, at both ends
    expected = (2 * FLAT, 4 * FLAT // 2, 12 * FLAT // 2 + SCALARS, 0, staging)
    assert moment(ranks, rank, "zero 2, offload", "step 1") == expected
    parameters, gradients, *_ = moment(ranks, rank, "zero 3, offload", "step 1")
    assert (parameters, gradients) == (2 * HALF, (2 + 4) * HALF)  # 2-byte sums, and fp32 for the optimizer


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_zero_bf16_keeps_master_weights_whole(ranks, rank):
    adam = 8 * ALL + 4 * len(SIZES)
    assert moment(ranks, rank, "zero 0", "step 1") == (4 * ALL, 0, adam, 0, 0)
    assert moment(ranks, rank, "zero 0, bf16", "backward 1")[:2] == (2 * ALL, 2 * ALL)


@pytest.mark.slow
def test_every_rank_gathers_the_ledgers_of_all(ranks):
    for seen in ranks:
        assert [ledger["rank"] for ledger in seen["gathered"]] == [0, 1]
        sizes = [ledger["devices"]["cpu"]["parameters"] for ledger in seen["gathered"]]
        assert sizes == [4 * (3 + 1), 4 * (4 + 1)]
