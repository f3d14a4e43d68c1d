"""helpers.parallel.tensor against a single process that has every matrix whole."""

import dataclasses
import functools
import math
import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from one_process import STEPS, TWO_LAYERS, device_of, make_optimizer
from shared_launch import SharedLaunches, refusals
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from transformers import GlmConfig

from helpers.errors import UserError
from helpers.launch import device
from helpers.memory.ledger import count_bytes
from helpers.memory.saved_tensors import SavedTensors
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.tensor import (
    RowParallelLinear,
    Shard,
    VocabParallelEmbedding,
    full_weights,
    parallelize,
    shard_plan,
    vocab_parallel_cross_entropy,
)
from helpers.parallel.tensor.collectives import reduce, reduce_scatter
from helpers.parallel.traffic import count_traffic

ROWS, LENGTH = 2, 32
TOKENS = ROWS * LENGTH
PLAIN, SEQUENCE, AGAIN = {}, {"sequence_parallel": True}, {"sequence_parallel": True, "recompute_all_gather": True}
NAMES = {tuple(PLAIN): "plain", tuple(SEQUENCE): "sequence", tuple(AGAIN): "again"}
shared = SharedLaunches(__name__)


def train(model, steps=STEPS, micro_batches=1):
    """The losses of all micro-batches; each has a different number of targets."""
    optimizer = make_optimizer(model.parameters())
    losses = []
    for step in range(steps):
        for micro in range(micro_batches):
            tokens = batch(TWO_LAYERS, ROWS, LENGTH, micro_batches * step + micro, model.device)
            tokens["labels"] = tokens["labels"].clone()
            tokens["labels"][0, : 8 * micro] = -100
            loss = model(**tokens).loss / micro_batches
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_divided(checkpointing=False, size=None, **options):
    """Full weights after training, and the losses."""
    model = build(TWO_LAYERS, device())
    parallelize(model, **options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = train(model, **size or {})
    return full_weights(model), losses


@functools.cache
def alone(ranks, **size):
    """What one process computes that divides nothing."""
    model = build(TWO_LAYERS, device_of(ranks))
    losses = train(model, **size)
    return weights(model), losses


def assert_equal(results, expected):
    for found, losses in results:
        assert largest_difference(found, expected[0]) <= 1e-6
        assert losses == pytest.approx(expected[1], rel=1e-6)  # a loss of 6 has no digit below 5e-7


def by_options(fn, *variants, **arguments):
    """Parameters ``ranks``, ``options`` and ``case`` of a test; ``variants`` are pairs of the first two."""
    return pytest.mark.parametrize(
        ("ranks", "options", "case"),
        [
            pytest.param(
                ranks, options, shared.case(ranks, fn, **options, **arguments), id=f"{ranks}-{NAMES[tuple(options)]}"
            )
            for ranks, options in variants
        ],
    )


# --- the whole network


@pytest.mark.slow
@by_options(train_divided, (1, PLAIN), (2, PLAIN), (2, SEQUENCE), (2, AGAIN), (4, PLAIN), (4, SEQUENCE))
def test_ranks_compute_what_one_process_computes(ranks, options, case):
    assert_equal(case.results, alone(ranks))


@pytest.mark.slow
@by_options(train_divided, (8, PLAIN), (4, AGAIN), size={"steps": 3, "micro_batches": 2})
def test_gradients_that_ranks_share_add_up_over_micro_batches(ranks, options, case):
    assert_equal(case.results, alone(ranks, steps=3, micro_batches=2))


@pytest.mark.slow
@by_options(train_divided, (2, PLAIN), (2, AGAIN), size={"steps": 3}, checkpointing=True)
def test_checkpointed_layers_communicate_again_and_compute_the_same(ranks, options, case):
    assert_equal(case.results, alone(ranks, steps=3))


def in_half_precision(**options):
    model, whole = (build(TWO_LAYERS, device(), torch.bfloat16) for _ in range(2))
    parallelize(model, **options)
    losses = [network(**batch(TWO_LAYERS, ROWS, LENGTH, 0, device())).loss for network in (model, whole)]
    losses[0].backward()
    return [loss.item() for loss in losses], {(p.dtype, p.grad.dtype, bool(p.grad.any())) for p in model.parameters()}


@pytest.mark.slow
@by_options(in_half_precision, (4, PLAIN), (4, AGAIN))
def test_it_communicates_in_the_precision_of_the_network(ranks, options, case):
    for losses, kinds in case.results:
        assert losses[0] == pytest.approx(losses[1], abs=0.01)
        assert kinds == {(torch.bfloat16, torch.bfloat16, True)}


@shared.on(2)
def two_backwards():
    model = build(TWO_LAYERS, device())
    parallelize(model, **AGAIN)
    loss = model(**batch(TWO_LAYERS, ROWS, LENGTH, 0, device())).loss
    sent = []
    for retain in (True, False):
        with count_traffic() as traffic:
            loss.backward(retain_graph=retain)
        sent.append(traffic.by_operation())
    return sent


@pytest.mark.slow
def test_what_is_gathered_again_is_dropped_after_its_last_use():
    first, second = two_backwards.results[0]
    assert first == second  # nothing is left from the first that the second could use


def on_an_axis(axis, **options):
    """Two axes of two ranks; those of one ``axis`` divide the model, and the two groups work on different batches."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("first", "second"))
    group = mesh.get_group(axis)
    replica = mesh.get_local_rank("first" if axis == "second" else "second")
    model, whole = build(TWO_LAYERS, device()), build(TWO_LAYERS, device())
    parallelize(model, group, **options)
    for network in (model, whole):
        network(**batch(TWO_LAYERS, ROWS, LENGTH, replica, device())).loss.backward()
        for parameter in network.parameters():
            parameter.data -= parameter.grad
    return replica, largest_difference(full_weights(model, group), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(shared.case(4, on_an_axis, axis=axis, **options), id=f"{axis}-{NAMES[tuple(options)]}")
        for axis in ("first", "second")
        for options in (PLAIN, SEQUENCE)
    ],
)
def test_a_group_is_an_axis_of_a_mesh(case):
    assert max(difference for _, difference in case.results) <= 1e-6
    assert {replica for replica, _ in case.results} == {0, 1}


@shared.on(4)
def parts():
    model = build(TWO_LAYERS, device())
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    parallelize(model)
    attention = model.model.layers[1].self_attn
    return (
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        attention.num_key_value_groups,
    )


@pytest.mark.slow
def test_four_ranks_and_two_groups_of_keys_and_values():
    whole = weights(build(TWO_LAYERS, device_of(4)))
    key = "model.layers.0.self_attn.k_proj.weight"
    for rank, (found, frozen, queries_per_key) in enumerate(parts.results):
        assert torch.equal(found[key], whole[key].chunk(2)[rank // 2])
        assert frozen == ["model.layers.0.mlp.down_proj.weight"]
        assert queries_per_key == 2  # of 8 heads 2 are here, with one group
        gate, up = whole["model.layers.0.mlp.gate_up_proj.weight"].chunk(2)
        expected = torch.cat([gate.chunk(4)[rank], up.chunk(4)[rank]])
        assert torch.equal(found["model.layers.0.mlp.gate_up_proj.weight"], expected)


# --- shards


@st.composite
def divisions(draw):
    ranks, fused, dim = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(0, 1))
    copies = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    size = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    size[dim] *= ranks * fused
    return Shard(dim, fused, copies), ranks, size


@given(divisions())
def test_parts_join_to_the_whole(division):
    shard, ranks, size = division
    whole = torch.arange(math.prod(size)).view(size)
    divided = [shard.to_local(whole, rank, ranks) for rank in range(ranks)]
    assert torch.equal(shard.full_tensor(divided), whole)
    for rank, part in enumerate(divided):
        assert part.numel() * ranks == whole.numel() * shard.copies
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()  # the whole can be freed
        assert torch.equal(part, divided[rank // shard.copies * shard.copies])


@given(divisions())
def test_every_fused_tensor_is_divided(division):
    shard, ranks, size = division
    which = torch.arange(shard.fused).repeat_interleave(size[shard.dim] // shard.fused)
    whole = (which[:, None] if shard.dim == 0 else which[None]).expand(size)
    for rank in range(ranks):
        assert set(shard.to_local(whole, rank, ranks).unique().tolist()) == set(range(shard.fused))


def config(**changes):
    sizes = {"vocab_size": 516, "intermediate_size": 216, "num_attention_heads": 8, "num_key_value_heads": 2}
    return GlmConfig(pad_token_id=0, **({"tie_word_embeddings": False} | sizes | changes))


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "num_attention_heads is 8 and does not divide by 3 ranks"),
        ({}, 16, "num_attention_heads is 8 and does not divide by 16 ranks"),
        ({"intermediate_size": 218}, 4, "intermediate_size is 218 and does not divide by 4 ranks"),
        ({"vocab_size": 514}, 4, "vocab_size is 514 and does not divide by 4 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "num_key_value_heads is 4"),
        ({"tie_word_embeddings": True}, 2, "tie_word_embeddings is set"),
    ],
)
def test_what_cannot_be_divided_evenly(changes, ranks, message):
    with pytest.raises(UserError, match=message):
        shard_plan(config(**changes), ranks)


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_keys_and_values_are_copied_where_there_are_more_ranks_than_groups(ranks, copies):
    plan = shard_plan(config(vocab_size=512), ranks)
    assert {name for name, shard in plan.items() if shard.copies == copies} >= {"k_proj.weight", "v_proj.bias"}
    assert plan["q_proj.weight"] == Shard(0) and plan["o_proj.weight"] == Shard(1)


@shared.on(3)
def refused():
    model = build(TWO_LAYERS, device())
    before = weights(model)
    errors = refusals(lambda: parallelize(model), lambda: parallelize(model, recompute_all_gather=True))
    same = largest_difference(weights(model), before) == 0 and not model._forward_pre_hooks
    return errors, same and type(model.lm_head) is nn.Linear


@pytest.mark.slow
def test_nothing_is_changed_where_it_is_refused():
    for errors, unchanged in refused.results:
        assert [error for error, _ in errors] == ["UserError"] * 2 and "num_attention_heads is 8" in errors[0][1]
        assert unchanged


def twice():
    model = build(TWO_LAYERS, device())
    parallelize(model)
    parallelize(model)


def odd_length():
    model = build(TWO_LAYERS, device())
    parallelize(model, sequence_parallel=True)
    model(**batch(TWO_LAYERS, 2, 31, device=device()))


def again_alone():
    parallelize(build(TWO_LAYERS, device()), recompute_all_gather=True)


@shared.on(2)
def wrong_uses():
    return refusals(twice, odd_length, again_alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "line"),
    [
        (0, "the model is sharded already"),
        (1, "31 tokens per sequence do not divide by 2 ranks"),
        (2, "recompute_all_gather=True needs sequence_parallel=True"),
    ],
)
def test_wrong_use_is_told_in_one_line(number, line):
    for refused in wrong_uses.results:
        error, message = refused[number]
        assert error == "UserError" and line in message


# --- layers


def row_parallel(sequence_parallel):
    group, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = nn.Linear(8 * n, 5).to(device())
    x = torch.randn(2, 3 * n, 8 * n).to(device())
    weight = nn.Parameter(whole.weight.detach().chunk(n, 1)[rank])
    part = RowParallelLinear(weight, whole.bias, group, reduce_scatter if sequence_parallel else reduce)
    expected = whole(x).chunk(n, 1)[rank] if sequence_parallel else whole(x)
    return (part(x.chunk(n, -1)[rank]) - expected).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(shared.case(3, row_parallel, sequence_parallel=on), id=str(on)) for on in (False, True)]
)
def test_the_bias_of_a_row_parallel_matrix_is_added_once(case):
    assert max(case.results) < 1e-5


@shared.on(3)
def embedding():
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = nn.Embedding(4 * n, 5, padding_idx=5).to(device())
    mine = nn.Parameter(whole.weight.detach().chunk(n)[rank])
    divided = VocabParallelEmbedding(mine, whole.padding_idx, dist.group.WORLD)
    ids = torch.tensor([[0, 5, 4 * n - 1], [3, 4, 5]], device=device())
    upstream = torch.rand(2, 3, 5).to(device())
    (whole(ids) * upstream).sum().backward()
    (divided(ids) * upstream).sum().backward()
    same = torch.equal(divided(ids), whole(ids))
    return same and torch.equal(mine.grad, whole.weight.grad.chunk(n)[rank])


@pytest.mark.slow
def test_an_embedding_divided_by_its_vocabulary_and_its_padding():
    assert all(embedding.results)


# --- cross-entropy


def random_cases(seeds):
    """For each seed the vocabulary of a rank, the scale of the logits, targets of which some are ignored, the seed."""
    cases = []
    for seed in seeds:
        choose = random.Random(seed)
        part = choose.randint(1, 5)
        targets = [choose.choice([-100, choose.randrange(3 * part)]) for _ in range(choose.randint(1, 7))]
        cases.append((part, choose.choice([0.0, 1.0, 100.0, 1e4]), targets, seed))
    return cases


def compare_losses(cases):
    """Largest differences of losses and of gradients from torch's, relative to their largest, over all cases."""
    rank, n, worst = dist.get_rank(), dist.get_world_size(), [0.0, 0.0]
    for part, scale, targets, seed in cases:
        generator = torch.Generator().manual_seed(seed)
        logits = (scale * torch.randn(len(targets), n * part, generator=generator)).to(device())
        upstream = torch.rand(len(targets), generator=generator).to(device())
        targets = torch.tensor(targets, device=device())
        whole = logits.clone().requires_grad_()
        mine = logits.chunk(n, -1)[rank].clone().requires_grad_()
        expected = F.cross_entropy(whole, targets, reduction="none")
        found = vocab_parallel_cross_entropy(mine, targets, dist.group.WORLD)
        (expected * upstream).sum().backward()
        (found * upstream).sum().backward()
        differences = (found - expected).abs().max(), (mine.grad - whole.grad.chunk(n, -1)[rank]).abs().max()
        scales = max(1.0, expected.abs().max().item()), 1.0
        worst = [max(w, d.item() / s) for w, d, s in zip(worst, differences, scales, strict=True)]
    return worst


# A rank has no target, or none counts.
RARE = [(4, 1.0, [0, 3, 1], 1), (4, 1.0, [11, -100, 8], 2), (4, 1.0, [-100, -100], 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(shared.case(3, compare_losses, cases=random_cases(range(40))), id="random"),
        pytest.param(shared.case(3, compare_losses, cases=RARE), id="without targets"),
        pytest.param(
            shared.case(3, compare_losses, launch="campaign", cases=random_cases(range(40, 4000))),
            id="many random",
            marks=pytest.mark.campaign,
        ),
    ],
)
def test_cross_entropy_is_torchs(case):
    for of_loss, of_gradient in case.results:
        assert of_loss <= 1e-6 and of_gradient <= 1e-6


def losses_of_the_network(labels):
    model = build(TWO_LAYERS, device())
    ids = batch(TWO_LAYERS, ROWS, LENGTH, 0, device())["input_ids"]
    labels = labels.to(device())
    expected = [model(input_ids=ids, labels=labels, **more).loss.item() for more in ({}, {"num_items_in_batch": 7})]
    parallelize(model)
    found = [model(input_ids=ids, labels=labels, **more).loss.item() for more in ({}, {"num_items_in_batch": 7})]
    return found, expected


def labels_up_to(kept):
    labels = batch(TWO_LAYERS, ROWS, LENGTH)["labels"].clone()
    labels[:, kept:] = -100
    return labels


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(shared.case(2, losses_of_the_network, labels=labels_up_to(kept)), id=str(kept))
        for kept in (0, LENGTH // 2, LENGTH)
    ],
)
def test_the_networks_loss_ignores_and_normalises_as_transformers_does(case):
    for found, expected in case.results:
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)  # no target at all: nan in both


# --- traffic and memory


def traffic_and_memory(layers, whole=False, **options):
    shape = dataclasses.replace(TINY, layers=layers)
    model = build(shape, device())
    if not whole:
        parallelize(model, **options)
    optimizer = torch.optim.AdamW(model.parameters())
    with count_traffic() as traffic:
        with SavedTensors(model) as saved:
            loss = model(**batch(shape, ROWS, LENGTH, 0, device())).loss
        kept = dict(saved.by_module)
        loss.backward()
    with torch.no_grad():
        optimizer.step()
    held = count_bytes(model, optimizer).categories
    return traffic.by_operation(), traffic.sent, kept["model.layers.0"], held, saved.total


MEASURED = {
    (ranks, layers, NAMES[tuple(options)]): shared.case(ranks, traffic_and_memory, layers=layers, **options)
    for ranks, options in ((2, PLAIN), (2, SEQUENCE), (2, AGAIN), (4, PLAIN), (4, SEQUENCE))
    for layers in (2, 3)
}
MEASURED_WHOLE = shared.case(2, traffic_and_memory, layers=2, whole=True)


def of_a_layer(ranks, name):
    """What one more layer sends."""
    two, three = (MEASURED[ranks, layers, name].results[0] for layers in (2, 3))
    return three[1] - two[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name", "times"),
    [(2, "plain", 8), (2, "sequence", 8), (2, "again", 10), (4, "plain", 8), (4, "sequence", 8)],
)
def test_a_layer_sends_what_the_formula_says(ranks, name, times):
    share = (ranks - 1) / ranks
    formula = times * TOKENS * TINY.hidden * share * 4
    # Beside it, and independent of the batch: gradients of two norms, and of keys and values that ranks share.
    norms = 2 * 2 * TINY.hidden * share * 4 if name != "plain" else 0
    copies = ranks // TINY.kv_groups
    shared = 2 * 2 * TINY.head_dim * (TINY.hidden + 1) * (copies - 1) / copies * 4
    sent = of_a_layer(ranks, name)
    assert sent == formula + norms + shared
    assert abs(sent - shared - formula) <= 0.01 * formula


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "sequence"])
def test_the_vocabulary_parallel_ends_send_half_a_layer_and_three_numbers_a_token(name):
    two = MEASURED[2, 2, name].results[0]
    ends = two[1] - 2 * of_a_layer(2, name)
    norm = 2 * TINY.hidden / 2 * 4 if name != "plain" else 0
    assert ends == 4 * TOKENS * TINY.hidden / 2 * 4 + 3 * 2 * TOKENS / 2 * 4 + norm


@pytest.mark.slow
def test_sequence_parallelism_replaces_all_reduces_by_their_two_halves():
    plain, sequence = (MEASURED[2, 2, name].results[0][0] for name in ("plain", "sequence"))
    assert set(plain) == {"all-reduce"}
    assert sequence["all-gather"] == sequence["reduce-scatter"]
    assert sum(sent for _, sent in sequence.values()) == pytest.approx(plain["all-reduce"][1], rel=0.01)


@pytest.mark.slow
def test_states_are_divided_and_each_activation_as_far_as_the_technique_goes():
    kept = {}
    whole = MEASURED_WHOLE.results[0]
    for name in ("plain", "sequence", "again"):
        for _, _, of_first_layer, held, left in MEASURED[2, 2, name].results:
            kept[name] = of_first_layer
            for category in ("parameters", "gradients", "optimizer states"):
                assert held[category] == pytest.approx(whole[3][category] / 2, rel=0.01)  # norms are whole
            assert left == 0  # nothing outlives backward
    width = 4 * TOKENS * TINY.hidden  # bytes of one activation of the hidden width
    rotary = 2 * LENGTH * TINY.head_dim // 2 * 4  # cosine and sine, whole everywhere
    replicated = 2 * 3 * width + 2 * 4 * TOKENS  # two norms: input, normed, output; and 1/rms
    one = whole[2]
    assert kept["plain"] == pytest.approx(replicated + rotary + (one - replicated - rotary) / 2, rel=0.002)
    assert kept["again"] == pytest.approx(rotary + (one - rotary) / 2, rel=0.002)
    assert kept["sequence"] == kept["again"] + 2 * (width // 2)  # two gathered inputs are whole
