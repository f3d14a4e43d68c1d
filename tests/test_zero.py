"""helpers.parallel.zero against a single process that sees all rows, and against the paper's formulas."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist

from helpers.launch import RankError, run
from helpers.memory.predict.states import published_states
from helpers.parallel.network import EQUALITY_EPSILON, TINY, batch, build, largest_difference, weights
from helpers.parallel.zero.units import group_into_units

STEPS, ROWS, LENGTH = 20, 8, 16
KIB = 1024
RANKS = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 2
make_optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=EQUALITY_EPSILON)


def plain(model):
    pass


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
    from helpers.parallel.zero import Zero1, Zero2, Zero3

    if stage == 3:
        return Zero3(model, make_optimizer, model.model.layers, group=group)
    return {1: Zero1, 2: Zero2}[stage](model, make_optimizer, bucket_bytes, group=group)


def train(stage, prepare=plain, micro_batches=1, max_norm=None):
    """The weights after STEPS steps on this rank's rows, or on all of them (stage 0); norms; bytes of the last step."""
    from helpers.launch import device
    from helpers.parallel.traffic import count_traffic

    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TINY, device(), seed=rank if stage else 0)  # ranks start apart: the first one's weights must win
    prepare(model)
    optimizer = zero(stage, model) if stage else make_optimizer(model.parameters())
    norms = []
    for step in range(STEPS):
        inputs = batch(TINY, ROWS, LENGTH, step, device())
        if stage:
            inputs = {name: rows.chunk(n)[rank] for name, rows in inputs.items()}
        with count_traffic() as traffic:
            for micro in range(micro_batches):
                part = {name: rows.chunk(micro_batches)[micro] for name, rows in inputs.items()}
                (model(**part).loss / micro_batches).backward()
            if max_norm and stage:
                norms.append(float(optimizer.clip_gradients(max_norm)))
            elif max_norm:
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
            optimizer.step()
            optimizer.zero_grad()
    with optimizer.full_parameters() if stage == 3 else nullcontext():
        return weights(model), norms, traffic.sent


STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


@pytest.mark.parametrize("prepare", [plain, tied, frozen, checkpointed])
def test_ranks_compute_what_one_process_computes(prepare):
    expected, _, _ = run(train, RANKS, stage=0, prepare=prepare).results[0]
    for stage in (1, 2, 3):
        for found, _, _ in run(train, RANKS, stage=stage, prepare=prepare).results:
            assert largest_difference(found, expected) <= 1e-6, stage


def test_without_reduction_ranks_differ():
    """The comparison can fail: rank 0 alone on its rows is far from all."""
    expected, _, _ = run(train, 2, stage=0).results[0]
    found, _, _ = run(train, 1, stage=0).results[0]
    assert largest_difference(found, expected) == 0
    half, _, _ = run(train, 1, stage=0, prepare=frozen).results[0]
    assert largest_difference(half, expected) > 1e-3


@STAGES
def test_parameters_that_do_not_divide(stage):
    """Three ranks, of which none gets a whole number of parameters; micro-batches and clipping on top."""
    options = {"prepare": tied, "micro_batches": 2, "max_norm": 0.1}
    results = run(partial(train_on_six_rows), 3, stage=stage, **options).results
    expected, norms, _ = run(partial(train_on_six_rows), 3, stage=0, **options).results[0]
    assert max(norms) > 0.1  # clipped indeed
    for found, found_norms, _ in results:
        assert largest_difference(found, expected) <= 1e-6
        assert found_norms == pytest.approx(norms, rel=1e-5)


def train_on_six_rows(**options):
    globals()["ROWS"] = 6
    return train(**options)


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
    from helpers.parallel.zero import Zero1, Zero2, Zero3

    rank, n = dist.get_rank(), dist.get_world_size()
    differences = []
    for seed in range(seeds):
        alone, model = Odd(seed), Odd(seed)
        plain_optimizer = make_optimizer([p for p in alone.parameters() if p.requires_grad])
        optimizer = (
            Zero3(model, make_optimizer, model.blocks)
            if stage == 3
            else (Zero1, Zero2)[stage - 1](model, make_optimizer, bucket_bytes=4 * (1 + 7 * seed))
        )
        for step in range(5):
            rows = torch.randn(2 * n, alone.width, generator=torch.Generator().manual_seed(step))
            alone(rows).square().mean().backward()
            model(rows.chunk(n)[rank]).square().mean().backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            optimizer.step()
        with optimizer.full_parameters() if stage == 3 else nullcontext():
            differences.append(largest_difference(weights(model), weights(alone)))
    return differences


@pytest.mark.parametrize("ranks", [2, 3])
@STAGES
def test_odd_networks(stage, ranks):
    for differences in run(odd_differences, ranks, stage=stage, seeds=15).results:
        assert len(differences) == 15 and max(differences) <= 1e-6


@pytest.mark.parametrize(("stage", "units"), [(1, 2), (2, 2), (3, 3)])
def test_traffic_is_the_formulas(stage, units):
    for _, _, sent in run(train, RANKS, stage=stage).results:
        assert sent == pytest.approx(units * (RANKS - 1) / RANKS * 4 * TINY.parameters, rel=0.001)


def held_bytes(stage, prepare=plain, group_of=None):
    """Bytes of parameters, gradients and optimizer states after backward, with 16-bit weights, and the parameters."""
    from helpers.launch import device
    from helpers.memory.ledger import count_bytes

    model = build(TINY, device(), torch.bfloat16)
    prepare(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    optimizer = zero(stage, model)
    for step in range(2):
        model(**batch(TINY, 2, LENGTH, step, device())).loss.backward()
        held = count_bytes(model, optimizer).categories
        optimizer.step()
        optimizer.zero_grad()
    return dict(held), trained, total


@pytest.mark.parametrize("ranks", [1, 2, 3])
@STAGES
def test_bytes_are_the_formulas(stage, ranks):
    """With 16-bit weights and gradients, fp32 master, momentum and variance; padding and step counters apart."""
    for held, trained, _ in run(held_bytes, ranks, stage=stage).results:
        states = held["parameters"] + held["gradients"] + held["optimizer states"]
        assert trained == TINY.parameters
        allowed = 1000 if stage < 3 else 2000  # 4 bytes a bucket for the step, up to 2 elements of padding a bucket
        assert states == pytest.approx(published_states(trained, stage, ranks), abs=allowed)
        assert held["communication buffers"] == 0  # between backward and step nothing is left of them


@STAGES
def test_bytes_of_frozen_parameters(stage):
    """They have neither gradients nor states; ZeRO-3 alone partitions them."""
    for held, trained, total in run(held_bytes, 2, stage=stage, prepare=frozen).results:
        assert 0 < trained < total
        assert held["optimizer states"] == pytest.approx(12 * trained / 2, abs=1000)
        assert held["gradients"] == pytest.approx(2 * trained / (1 if stage == 1 else 2), abs=1000)
        assert held["parameters"] == pytest.approx(2 * total / (2 if stage == 3 else 1), abs=1000)


@pytest.mark.parametrize("stage", [2, 3])
def test_backward_holds_few_buckets(stage):
    def most():
        """The most bytes of gathered parameters and unreduced gradients when a gradient has come; buckets' sizes."""
        from helpers.launch import device
        from helpers.memory.ledger import count_bytes

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

    for found, sizes, moments in run(most, 2).results:
        assert moments == 2 * len(list(build(TINY).parameters()))
        # Stage 2: one under way, two being filled. Stage 3: of gradients one under way, one being filled; of parameters
        # the unit that computes and the next one.
        limit = sum(sizes[-3:]) if stage == 2 else 2 * sum(sizes[-2:])
        assert sizes[-1] < found <= limit < 4 * TINY.parameters


def test_zero_3_computes_without_gradients_and_shows_parameters_whole():
    def fn():
        from helpers.launch import device

        model = build(TINY, device()).eval()
        expected = weights(model)
        inputs = batch(TINY, 2, LENGTH, 0, device())
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
        return torch.equal(before, after), empty, largest_difference(found, expected)

    assert run(fn, 2).results == [(True, {0}, 0.0)] * 2


@STAGES
def test_a_group_partitions_for_itself(stage):
    def fn():
        from helpers.launch import device

        rank = dist.get_rank()
        groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        model = build(TINY, device(), seed=rank)
        optimizer = zero(stage, model, group=groups[rank % 2])
        model(**batch(TINY, 2, LENGTH, rank, device())).loss.backward()
        optimizer.step()
        with optimizer.full_parameters() if stage == 3 else nullcontext():
            return weights(model)

    found = run(fn, 4).results
    assert largest_difference(found[0], found[2]) == largest_difference(found[1], found[3]) == 0
    assert largest_difference(found[0], found[1]) > 1e-3


@STAGES
def test_a_scheduler_sets_the_learning_rate(stage):
    def fn():
        from helpers.launch import device

        model = build(TINY, device())
        before = weights(model)
        optimizer = zero(stage, model)
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        model(**batch(TINY, 2, LENGTH, 0, device())).loss.backward()
        optimizer.step()
        with optimizer.full_parameters() if stage == 3 else nullcontext():
            return largest_difference(weights(model), before)

    assert run(fn, 2).results == [0.0, 0.0]


@STAGES
def test_an_unused_parameter_is_named(stage):
    def fn():
        from helpers.launch import device

        model = build(TINY, device())
        model.model.layers[3].extra = torch.nn.Linear(3, 3, device=device())
        optimizer = zero(stage, model)
        model(**batch(TINY, 2, LENGTH, 0, device())).loss.backward()
        optimizer.step()

    with pytest.raises(
        RankError,
        match=r"backward made no gradient for model\.layers\.3\.extra\.(weight|bias) \(2 such parameters\); freeze it",
    ):
        run(fn, 2)


@STAGES
def test_a_step_without_backward_is_refused(stage):
    def fn():
        zero(stage, build(TINY)).step()

    with pytest.raises(RankError, match=r"backward made no gradient for "):
        run(fn, 1)


@STAGES
def test_nothing_to_train_is_refused(stage):
    def fn():
        zero(stage, build(TINY).requires_grad_(False))

    with pytest.raises(RankError, match="every parameter is frozen; leave some to be trained"):
        run(fn, 1)


def test_a_bucket_needs_a_size():
    def fn():
        zero(2, build(TINY), bucket_bytes=0)

    with pytest.raises(RankError, match="bucket_bytes is 0; give a size above 0"):
        run(fn, 1)


def test_units_are_blocks_and_the_rest_with_shared_parameters_together():
    model = build(TINY)
    names = {module: name for name, module in model.named_modules()}
    blocks = list(model.model.layers)
    layers = [[f"model.layers.{layer}"] for layer in range(TINY.layers)]
    assert [[names[module] for module in unit] for unit in group_into_units(model, blocks)] == [
        ["model.embed_tokens"],
        *layers,
        ["model.norm"],
        ["lm_head"],
    ]
    tied(model)
    assert [[names[module] for module in unit] for unit in group_into_units(model, blocks)] == [
        ["model.embed_tokens", "lm_head"],
        *layers,
        ["model.norm"],
    ]
