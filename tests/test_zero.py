"""helpers.parallel.zero against a single process that sees all rows, and against the paper's formulas."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import GPUS
from one_process import LENGTH, ROWS, STEPS, TWO_LAYERS, make_optimizer, train_alone, unchanged
from shared_launch import SharedLaunches, backward_that_breaks_off, refusals

from helpers.launch import device
from helpers.memory.ledger import count_bytes
from helpers.memory.predict.states import published_states
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.traffic import count_traffic
from helpers.parallel.zero import Zero1, Zero2, Zero3
from helpers.parallel.zero.units import group_into_units

KIB = 1024
RANKS = max(2, GPUS)
STAGES = (1, 2, 3)
shared = SharedLaunches(__name__)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def frozen(model):
    """Whole layers, the embedding, and some parameters of layers of which others are trained."""
    for name, parameter in model.named_parameters():
        if "mlp" in name or "embed" in name or ".0." in name:
            parameter.requires_grad_(False)


def checkpointed(model):
    model.gradient_checkpointing_enable()


def zero(stage, model, group=None, bucket_bytes=200 * KIB):
    if stage == 3:
        return Zero3(model, make_optimizer, model.model.layers, group=group)
    return {1: Zero1, 2: Zero2}[stage](model, make_optimizer, bucket_bytes, group=group)


def train(stage, prepare=unchanged, rows=ROWS, micro_batches=1, max_norm=None):
    """The weights after STEPS steps on this rank's rows, without the others at stage 0; norms; bytes of a step."""
    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TWO_LAYERS, device(), seed=rank if stage else 0)  # ranks start apart: the first's weights must win
    prepare(model)
    optimizer = zero(stage, model) if stage else make_optimizer(model.parameters())
    norms = []
    for step in range(STEPS):
        inputs = {
            name: tensor.chunk(n)[rank] for name, tensor in batch(TWO_LAYERS, rows, LENGTH, step, device()).items()
        }
        with count_traffic() as traffic:
            for micro in range(micro_batches):
                part = {name: tensor.chunk(micro_batches)[micro] for name, tensor in inputs.items()}
                (model(**part).loss / micro_batches).backward()
            if max_norm:
                norms.append(float(optimizer.clip_gradients(max_norm)))
            optimizer.step()
            optimizer.zero_grad()
    with optimizer.full_parameters() if stage == 3 else nullcontext():
        return weights(model), norms, traffic.sent


def by_stage(nprocs, fn, stages=STAGES, **arguments):
    """Parameters ``stage`` and ``case`` of a test: ``fn`` for each stage."""
    return pytest.mark.parametrize(
        ("stage", "case"),
        [pytest.param(stage, shared.case(nprocs, fn, stage=stage, **arguments), id=str(stage)) for stage in stages],
    )


WAYS = [
    pytest.param(
        stage, prepare, shared.case(RANKS, train, stage=stage, prepare=prepare), id=f"{prepare.__name__}-{stage}"
    )
    for prepare in (unchanged, tied, frozen, checkpointed)
    for stage in STAGES
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "prepare", "case"), WAYS)
def test_ranks_compute_what_one_process_computes(stage, prepare, case):
    expected = train_alone(TWO_LAYERS, RANKS, unchanged if prepare is checkpointed else prepare).weights
    for found, _, _ in case.results:
        assert largest_difference(found, expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "together"), [(shared.case(1, train, stage=0), shared.case(RANKS, train, stage=0))])
def test_without_reduction_ranks_differ(alone, together):
    """The comparison can fail: a rank alone on its rows is far from all."""
    expected = train_alone(TWO_LAYERS, 1).weights
    found, _, _ = alone.results[0]
    assert largest_difference(found, expected) <= 1e-6
    half, _, _ = together.results[0]
    assert largest_difference(half, expected) > 1e-3
    assert largest_difference(train_alone(TWO_LAYERS, 1, frozen).weights, expected) > 1e-3


@pytest.mark.slow
@by_stage(3, train, prepare=tied, rows=6, micro_batches=2, max_norm=0.1)
def test_parameters_that_do_not_divide(stage, case):
    """Three ranks, of which none gets a whole number of parameters; micro-batches and clipping on top."""
    expected = train_alone(TWO_LAYERS, 3, tied, rows=6, max_norm=0.1)
    assert max(expected.norms) > 0.1  # clipped indeed
    for found, norms, _ in case.results:
        assert largest_difference(found, expected.weights) <= 1e-6
        assert norms == pytest.approx(expected.norms, rel=1e-5)


class Odd(torch.nn.Module):
    """Blocks of random widths, some parameters frozen, some shared: nothing divides by anything."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.width, *inner = torch.randint(1, 9, (6,), generator=generator).tolist()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(self.width, size), torch.nn.Tanh(), torch.nn.Linear(size, self.width))
            for size in inner
        )
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        first, last = self.blocks[0], self.blocks[-1]
        if seed % 2:
            last[2].bias = first[2].bias
        for block in list(self.blocks)[1 : 1 + seed % 3]:
            block[0].requires_grad_(False)
        if seed % 5 == 0:
            first.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def odd_differences(stage, seeds):
    """For each seed the largest difference to one process after five steps."""
    rank, n = dist.get_rank(), dist.get_world_size()
    differences = []
    for seed in seeds:
        alone, model = Odd(seed).to(device()), Odd(seed).to(device())
        plain_optimizer = make_optimizer([p for p in alone.parameters() if p.requires_grad])
        optimizer = (
            Zero3(model, make_optimizer, model.blocks)
            if stage == 3
            else (Zero1, Zero2)[stage - 1](model, make_optimizer, bucket_bytes=4 * (1 + 7 * seed))
        )
        for step in range(5):
            rows = torch.randn(2 * n, alone.width, generator=torch.Generator().manual_seed(step)).to(device())
            alone(rows).square().mean().backward()
            model(rows.chunk(n)[rank]).square().mean().backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            optimizer.step()
        with optimizer.full_parameters() if stage == 3 else nullcontext():
            differences.append(largest_difference(weights(model), weights(alone)))
    return differences


def odd_networks(seeds, **launch):
    """Parameters of a test: every stage on two ranks and on three."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(shared.case(ranks, odd_differences, stage=stage, seeds=seeds, **launch), id=f"{stage}-{ranks}")
            for ranks in (2, 3)
            for stage in STAGES
        ],
    )


@pytest.mark.slow
@odd_networks(range(6))  # each way of freezing and of sharing once
def test_odd_networks(case):
    for differences in case.results:
        assert len(differences) == 6 and max(differences) <= 1e-6


@pytest.mark.slow
@pytest.mark.campaign
@odd_networks(range(6, 60), launch="campaign")
def test_many_odd_networks(case):
    for differences in case.results:
        assert len(differences) == 54 and max(differences) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "case"), [(2, WAYS[0].values[2]), (2, WAYS[1].values[2]), (3, WAYS[2].values[2])], ids=STAGES
)
def test_traffic_is_the_formulas(units, case):
    for _, _, sent in case.results:
        assert sent == pytest.approx(units * (RANKS - 1) / RANKS * 4 * TWO_LAYERS.parameters, rel=0.001)


def held_bytes(stage, prepare=unchanged):
    """Bytes of parameters, gradients and optimizer states after backward, with 16-bit weights, and the parameters."""
    model = build(TWO_LAYERS, device(), torch.bfloat16)
    prepare(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    optimizer = zero(stage, model)
    for step in range(2):
        model(**batch(TWO_LAYERS, 2, LENGTH, step, device())).loss.backward()
        held = count_bytes(model, optimizer).categories
        optimizer.step()
        optimizer.zero_grad()
    return dict(held), trained, total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "case"),
    [
        pytest.param(stage, ranks, shared.case(ranks, held_bytes, stage=stage), id=f"{stage}-{ranks}")
        for stage in STAGES
        for ranks in (1, 2, 3)
    ],
)
def test_bytes_are_the_formulas(stage, ranks, case):
    """With 16-bit weights and gradients, fp32 master, momentum and variance; padding and step counters apart."""
    for held, trained, _ in case.results:
        states = held["parameters"] + held["gradients"] + held["optimizer states"]
        assert trained == TWO_LAYERS.parameters
        allowed = 1000 if stage < 3 else 2000  # 4 bytes a bucket for the step, up to 2 elements of padding a bucket
        assert states == pytest.approx(published_states(trained, stage, ranks), abs=allowed)
        assert held["communication buffers"] == 0  # between backward and step nothing is left of them


@pytest.mark.slow
@by_stage(2, held_bytes, prepare=frozen)
def test_bytes_of_frozen_parameters(stage, case):
    """They have neither gradients nor states; ZeRO-3 alone partitions them."""
    for held, trained, total in case.results:
        assert 0 < trained < total
        assert held["optimizer states"] == pytest.approx(12 * trained / 2, abs=1000)
        assert held["gradients"] == pytest.approx(2 * trained / (1 if stage == 1 else 2), abs=1000)
        assert held["parameters"] == pytest.approx(2 * total / (2 if stage == 3 else 1), abs=1000)


def most_in_backward(stage):
    """The most bytes of gathered parameters and unreduced gradients when a gradient has come; buckets' sizes."""
    model = build(TINY, device())
    optimizer = zero(stage, model, bucket_bytes=300 * KIB)
    seen = []
    for bucket in optimizer.buckets:
        for parameter in bucket.parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _: seen.append(count_bytes(model, optimizer).categories["communication buffers"])
            )
    for step in range(2):
        model(**batch(TINY, 2, LENGTH, step, device())).loss.backward()
        optimizer.step()
    return max(seen), sorted(bucket.flat.numel() * 4 for bucket in optimizer.buckets), len(seen)


@pytest.mark.slow
@by_stage(2, most_in_backward, stages=(2, 3))
def test_backward_holds_few_buckets(stage, case):
    for found, sizes, moments in case.results:
        assert moments == 2 * len(list(build(TINY).parameters()))
        # Stage 2: one under way, two being filled. Stage 3: of gradients one under way, one being filled; of parameters
        # the unit that computes and the next one.
        limit = sum(sizes[-3:]) if stage == 2 else 2 * sum(sizes[-2:])
        assert sizes[-1] < found <= limit < 4 * TINY.parameters


@shared.on(2)
def without_gradients():
    model = build(TWO_LAYERS, device()).eval()
    expected = weights(model)
    inputs = batch(TWO_LAYERS, 2, LENGTH, 0, device())
    with torch.no_grad():
        before = model(**inputs).logits
        optimizer = zero(3, model)
        after = model(**inputs).logits
    model.train()
    model(**inputs)  # a forward without backward, as in an evaluation that forgot no_grad
    model(**inputs).loss.backward()
    empty = {parameter.numel() for parameter in model.parameters()}
    with optimizer.full_parameters():
        found = weights(model)
    return torch.allclose(before, after, rtol=0, atol=1e-6), empty, largest_difference(found, expected)


@pytest.mark.slow
def test_zero_3_computes_without_gradients_and_shows_parameters_whole():
    assert without_gradients.results == [(True, {0}, 0.0)] * 2


def weights_of_a_group(stage):
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    model = build(TWO_LAYERS, device(), seed=rank)
    optimizer = zero(stage, model, group=groups[rank % 2])
    model(**batch(TWO_LAYERS, 2, LENGTH, rank, device())).loss.backward()
    optimizer.step()
    with optimizer.full_parameters() if stage == 3 else nullcontext():
        return weights(model)


@pytest.mark.slow
@by_stage(4, weights_of_a_group)
def test_a_group_partitions_for_itself(stage, case):
    found = case.results
    assert largest_difference(found[0], found[2]) == largest_difference(found[1], found[3]) == 0
    assert largest_difference(found[0], found[1]) > 1e-3


def step_without_learning_rate(stage):
    model = build(TWO_LAYERS, device())
    before = weights(model)
    optimizer = zero(stage, model)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    model(**batch(TWO_LAYERS, 2, LENGTH, 0, device())).loss.backward()
    optimizer.step()
    with optimizer.full_parameters() if stage == 3 else nullcontext():
        return largest_difference(weights(model), before)


@pytest.mark.slow
@by_stage(2, step_without_learning_rate)
def test_a_scheduler_sets_the_learning_rate(stage, case):
    assert case.results == [0.0, 0.0]


def step_with_an_unused_parameter(stage):
    model = build(TWO_LAYERS, device())
    model.model.layers[1].extra = torch.nn.Linear(3, 3, device=device())
    optimizer = zero(stage, model)
    model(**batch(TWO_LAYERS, 2, LENGTH, 0, device())).loss.backward()
    optimizer.step()


def bad_uses(stage):
    return refusals(
        lambda: step_with_an_unused_parameter(stage),
        lambda: zero(stage, build(TWO_LAYERS, device())).step(),
        lambda: zero(stage, build(TWO_LAYERS, device()).requires_grad_(False)),
        lambda: zero(2, build(TWO_LAYERS, device()), bucket_bytes=0),
    )


def step_after_a_caught_error(stage):
    """What a backward that missed a layer raised; the largest difference of a later step to one without it."""
    stepped = []
    for fails_first in (True, False):
        model = build(TWO_LAYERS, device())
        optimizer, inputs, layer = zero(stage, model), batch(TWO_LAYERS, 2, LENGTH, 0, device()), model.model.layers[0]
        if fails_first:
            layer.forward = lambda hidden, **_: hidden  # uses no parameter
            refused = refusals(lambda model=model, inputs=inputs: model(**inputs).loss.backward())
            del layer.forward
            optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        with optimizer.full_parameters() if stage == 3 else nullcontext():
            stepped.append(weights(model))
    return refused, largest_difference(*stepped)


@pytest.mark.slow
@by_stage(2, step_after_a_caught_error, stages=(2, 3))
def test_a_backward_that_failed_leaves_nothing_to_the_next_one(stage, case):
    for [(error, message)], difference in case.results:
        assert error == "UserError" and "backward made no gradient for model.layers.0." in message
        assert difference <= 1e-6  # a GPU may add in another order


REFUSED = [shared.case(2, bad_uses, stage=stage) for stage in STAGES]
of_each_stage = pytest.mark.parametrize("case", REFUSED, ids=STAGES)


def assert_refused(case, number, pattern):
    for refused in case.results:
        error, message = refused[number]
        assert error == "UserError" and re.search(pattern, message)


@pytest.mark.slow
@of_each_stage
def test_an_unused_parameter_is_named(case):
    pattern = r"backward made no gradient for model\.layers\.1\.extra\.(weight|bias) \(2 such parameters\); freeze it"
    assert_refused(case, 0, pattern)


@pytest.mark.slow
@of_each_stage
def test_a_step_without_backward_is_refused(case):
    assert_refused(case, 1, r"backward made no gradient for ")


@pytest.mark.slow
@of_each_stage
def test_nothing_to_train_is_refused(case):
    assert_refused(case, 2, "every parameter is frozen; leave some to be trained")


@pytest.mark.slow
def test_a_bucket_needs_a_size():
    assert_refused(REFUSED[0], 3, "bucket_bytes is 0; give a size above 0")


def test_units_are_blocks_and_the_rest_with_shared_parameters_together():
    model = build(TINY)
    names = {module: name for name, module in model.named_modules()}
    blocks = list(model.model.layers)
    layers = [[f"model.layers.{layer}"] for layer in range(TINY.layers)]
    assert [[names[module] for module in unit.modules] for unit in group_into_units(model, blocks)] == [
        ["model.embed_tokens"],
        *layers,
        ["model.norm"],
        ["lm_head"],
    ]
    tied(model)
    assert [[names[module] for module in unit.modules] for unit in group_into_units(model, blocks)] == [
        ["model.embed_tokens", "lm_head"],
        *layers,
        ["model.norm"],
    ]


def test_a_parameter_that_ties_two_units_makes_them_one():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    both = torch.nn.Linear(2, 2)
    both.weight, both.bias = first.weight, second.bias
    [unit] = group_into_units(torch.nn.Sequential(first, second, both), [])
    assert unit.modules == [first, second, both]
    assert list(unit.parameters) == [first.weight, first.bias, second.weight, second.bias]


class Scaled(torch.nn.Module):
    """Parameters of its own before, between and after its submodules, in a list, and one shared with a submodule."""

    def __init__(self, width, inner=None, last="scale"):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))
        self.linear, self.inner, self.last = torch.nn.Linear(width, width), inner or torch.nn.Tanh(), last
        self.shifts = torch.nn.ParameterList([torch.randn(width), torch.randn(width)])
        self.tied = self.linear.weight

    def forward(self, x):
        hidden = self.inner(self.linear(x * self.scale + self.shifts[0])) @ self.tied.T + self.shifts[1]
        return {"scale": hidden * self.scale, "shift": hidden, "linear": self.linear(hidden)}[self.last]


class Attending(torch.nn.Module):
    """torch's attention has a parameter of its own, and reads one of its submodule without calling that."""

    def __init__(self, width):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))
        self.attention = torch.nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x):
        pairs = torch.stack([x, x * self.scale], dim=1)  # [rows, 2, width]: each row is a sequence of its own
        return self.attention(pairs, pairs, pairs, need_weights=False)[0].sum(1)


OWN_PARAMETERS = {
    "attention": lambda: torch.nn.Sequential(Attending(5), torch.nn.Linear(5, 5)),
    "at the root": lambda: Scaled(5),
    "nested": lambda: torch.nn.Sequential(Scaled(5, Scaled(5, last="linear"), "shift"), torch.nn.Linear(5, 5)),
    "beside a block": lambda: Scaled(5, torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh())),
    "frozen inside": lambda: Scaled(5, Scaled(5, last="shift").requires_grad_(False), last="linear"),
}


def differences_with_own_parameters():
    rank, differences = dist.get_rank(), {}
    for name, make in OWN_PARAMETERS.items():
        torch.manual_seed(0)
        model = make().to(device())
        alone = copy.deepcopy(model)
        plain = make_optimizer([p for p in alone.parameters() if p.requires_grad])
        optimizer = Zero3(model, make_optimizer, [model.inner] if name == "beside a block" else [])
        for step in range(STEPS):
            rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(device())
            alone(rows).square().mean().backward()
            model(rows.chunk(2)[rank]).square().mean().backward()
            for each in (plain, optimizer):
                each.step()
                each.zero_grad()
        empty = {parameter.numel() for parameter in model.parameters()}
        with optimizer.full_parameters():
            differences[name] = largest_difference(weights(model), weights(alone)), empty
    return differences


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_PARAMETERS)
@pytest.mark.parametrize("case", [shared.case(2, differences_with_own_parameters)], ids=["zero-3"])
def test_a_module_may_have_parameters_next_to_submodules(name, case):
    for differences in case.results:
        difference, empty = differences[name]
        assert difference <= 1e-6 and empty == {0}


def step_after_an_error_in_backward(stage, moment):
    """The largest difference of a step after a backward that broke off, to one without; what it raised."""
    stepped = []
    for fails_first in (True, False):
        model = build(TWO_LAYERS, device())
        optimizer, inputs = zero(stage, model), batch(TWO_LAYERS, 2, LENGTH, 0, device())
        again = model(**inputs).loss if moment == "after another forward" and stage != 3 else None
        if fails_first:
            refused = refusals(lambda model=model, inputs=inputs: backward_that_breaks_off(model, inputs))
            optimizer.zero_grad()
        (model(**inputs).loss if again is None else again).backward()
        optimizer.step()
        with optimizer.full_parameters() if stage == 3 else nullcontext():
            stepped.append(weights(model))
    return refused, largest_difference(*stepped)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            shared.case(2, step_after_an_error_in_backward, stage=stage, moment=moment), id=f"{stage}-{moment}"
        )
        for stage in STAGES
        for moment in ("after another forward", "at once")
    ],
)
def test_a_backward_that_broke_off_leaves_nothing_to_the_next_one(case):
    for refused, difference in case.results:
        assert refused == [("RuntimeError", "out of memory, say")]
        assert difference <= 1e-6


def forward_after_a_forward_that_failed():
    model = build(TWO_LAYERS, device())
    optimizer, inputs, norm = zero(3, model), batch(TWO_LAYERS, 2, LENGTH, 0, device()), model.model.norm
    model(**inputs).loss.backward()
    failing = norm.register_forward_pre_hook(lambda *_: 1 / 0)
    refused = refusals(lambda: model(**inputs))
    failing.remove()
    optimizer.step()  # what the failed forward has gathered is old now
    loss = model(**inputs).loss
    with optimizer.full_parameters():
        expected = build(TWO_LAYERS, device())
        expected.load_state_dict({name: tensor.to(device()) for name, tensor in weights(model).items()})
    return refused, abs(float(loss - expected(**inputs).loss))


@pytest.mark.slow
@pytest.mark.parametrize("case", [shared.case(2, forward_after_a_forward_that_failed)], ids=["zero-3"])
def test_a_forward_that_failed_leaves_no_old_parameters(case):
    for [(error, _)], difference in case.results:
        assert error == "ZeroDivisionError" and difference <= 1e-5
