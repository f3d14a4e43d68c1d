"""helpers.parallel.offload against a single process with torch's own AdamW, and its bytes."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from conftest import GPUS
from one_process import LENGTH, STEPS, TWO_LAYERS, device_of, make_optimizer, train_alone
from shared_launch import SharedLaunches, backward_that_breaks_off, refusals

from helpers.launch import device
from helpers.parallel.network import EQUALITY_EPSILON, batch, build, largest_difference, weights
from helpers.parallel.offload import OffloadedAdamW

pytestmark = pytest.mark.slow
KIB = 1024
RANKS = max(2, GPUS)
ROWS = 3 * RANKS
shared = SharedLaunches(__name__)


@cache
def train_delayed(ranks, delay_after):
    """Weights of AdamW over all rows in one process; from ``delay_after`` on the model gets them one step late."""
    device = device_of(ranks)
    model = build(TWO_LAYERS, device)
    newest = build(TWO_LAYERS, device)  # what Adam updates; the model's gradients may be of older values
    optimizer = make_optimizer(newest.parameters())
    for step in range(STEPS):
        model(**batch(TWO_LAYERS, ROWS, LENGTH, step, device)).loss.backward()
        before = weights(newest)
        for own, other in zip(newest.parameters(), model.parameters(), strict=True):
            own.grad, other.grad = other.grad, None
        optimizer.step()
        model.load_state_dict(before if step >= delay_after else newest.state_dict(), strict=False)
    return weights(newest)


def offloaded(bucket_bytes=64 * KIB, delay_after=None, micro_batches=1, steps=STEPS, dtype=torch.float32):
    """Train on this rank's rows; weights, bytes by role, bytes copied to the host and to the device in a step."""
    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TWO_LAYERS, device(), dtype)
    optimizer = OffloadedAdamW(model, lr=1e-3, eps=EQUALITY_EPSILON, bucket_bytes=bucket_bytes, delay_after=delay_after)
    for step in range(steps):
        whole = batch(TWO_LAYERS, ROWS, LENGTH, step, device())
        for micro in range(micro_batches):
            part = {name: rows[micro::micro_batches][rank::n] for name, rows in whole.items()}
            (model(**part).loss / micro_batches).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
    optimizer.flush()
    copied = optimizer.bytes_to_host / steps, optimizer.bytes_to_device / steps
    return weights(model), optimizer.bytes_by_role(), copied


SETTINGS = (
    *({}, {"bucket_bytes": 2**30}, {"bucket_bytes": 1}),
    *({"delay_after": 0}, {"delay_after": 7}, {"micro_batches": 3}),
)
TRAINED = [
    pytest.param(ranks, settings, shared.case(ranks, offloaded, **settings), id=f"{ranks}-{settings}")
    for ranks in (1, RANKS)
    for settings in SETTINGS
]


@pytest.mark.parametrize(("ranks", "settings", "case"), TRAINED)
def test_it_computes_what_one_process_computes(ranks, settings, case):
    if "delay_after" in settings:
        expected = train_delayed(ranks, settings["delay_after"])
    else:
        expected = train_alone(TWO_LAYERS, ranks, rows=ROWS).weights
    for found, *_ in case.results:
        assert largest_difference(found, expected) <= 1e-6


def test_a_delayed_update_is_another_training():
    _, _, delayed = TRAINED[3].values
    found, *_ = delayed.results[0]
    assert largest_difference(found, train_alone(TWO_LAYERS, 1, rows=ROWS).weights) > 1e-4


@pytest.mark.parametrize(
    ("ranks", "dtype", "case"),
    [
        pytest.param(
            *(ranks, dtype),
            shared.case(ranks, offloaded, steps=2, dtype=dtype, bucket_bytes=dtype.itemsize * 50_000),
            id=f"{dtype}-{ranks}",
        )
        for ranks in (1, 3)
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_its_bytes_are_what_it_says(ranks, dtype, case):
    size = dtype.itemsize
    for _, held, (down, up) in case.results:
        # Shares are padded so that they are equally large: at most one element a bucket and rank.
        owned = held["host"]["gradients"] // 4
        assert TWO_LAYERS.parameters / ranks <= owned <= TWO_LAYERS.parameters / ranks + 10
        assert held["host"]["optimizer states"] == 12 * owned
        assert held["host"]["communication buffers"] == size * owned
        assert sum(held["host"].values()) == (16 + size) * owned
        assert held["device"]["parameters"] == size * ranks * owned
        assert held["device"]["optimizer states"] == held["device"]["gradients"] == 0
        assert (down, up) == (size * owned, size * owned)


@shared.on(1)
def bytes_of_tensors():
    model = build(TWO_LAYERS, device())
    optimizer = OffloadedAdamW(model, lr=1e-3, bucket_bytes=64 * KIB)
    model(**batch(TWO_LAYERS, 2, 8, device=device())).loss.backward()
    optimizer.step()
    storages = {}
    for bucket in optimizer.buckets:
        moments = [t for t in bucket.adam.state[bucket.master].values() if t.numel() > 1]
        for tensor in (bucket.staging, bucket.gradient, bucket.master, *moments):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return optimizer.bytes_by_role(), sum(storages.values()), sum(parameters.values())


def test_the_tensors_hold_what_the_roles_say():
    held, on_host, parameters = bytes_of_tensors.results[0]
    assert sum(held["host"].values()) == on_host and held["device"]["parameters"] == parameters


@shared.on(1)
def frozen_layers():
    model = build(TWO_LAYERS, device(), torch.bfloat16)
    model.model.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    optimizer = OffloadedAdamW(model, lr=1e-3)
    model(**batch(TWO_LAYERS, 2, 8, device=device())).loss.backward()
    optimizer.step()
    return torch.equal(model.model.embed_tokens.weight, before), optimizer.bytes_to_host


def test_frozen_parameters_stay_where_they_are():
    assert frozen_layers.results == [(True, 2 * TWO_LAYERS.embedding)]


def step_after_an_error(unused):
    """What a failed backward and a step after it raise; the largest difference of a later step to one without it."""
    stepped = []
    for fails_first in (True, False):
        model = build(TWO_LAYERS, device())
        optimizer = OffloadedAdamW(model, lr=1e-3, eps=EQUALITY_EPSILON, bucket_bytes=64 * KIB)
        inputs, layer = batch(TWO_LAYERS, ROWS, LENGTH, 0, device()), model.model.layers[0]
        if fails_first:
            if unused:
                layer.forward = lambda hidden, **_: hidden  # uses no parameter
            fail = (lambda model, inputs: model(**inputs).loss.backward()) if unused else backward_that_breaks_off
            refused = refusals(lambda model=model, inputs=inputs, fail=fail: fail(model, inputs), optimizer.step)
            vars(layer).pop("forward", None)
        model(**inputs).loss.backward()
        optimizer.step()
        stepped.append(weights(model))
    return refused, largest_difference(*stepped)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        pytest.param(shared.case(ranks, step_after_an_error, unused=unused), error, id=f"{error}-{ranks}")
        for ranks in (1, RANKS)
        for unused, error in ((False, "RuntimeError"), (True, "UserError"))
    ],
)
def test_a_backward_that_failed_adds_nothing_and_ends_nothing(case, error):
    for [failed, stepped], difference in case.results:
        assert failed[0] == error
        assert stepped == ("UserError", "OffloadedAdamW.step: no backward since the last step; there are no gradients")
        assert difference <= 1e-6


def unused_parameter():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)}).to(device())
    OffloadedAdamW(model, lr=1e-3)
    model["used"](torch.ones(1, 2, device=device())).sum().backward()


def construct(trained=True, mixed=False, **arguments):
    model = torch.nn.Linear(2, 2, device=device()).requires_grad_(trained)
    if mixed:
        model.bias.data = model.bias.data.half()
    OffloadedAdamW(model, lr=1e-3, **arguments).step()


@shared.on(1)
def bad_uses():
    return refusals(
        unused_parameter,
        construct,
        lambda: construct(bucket_bytes=0),
        lambda: construct(delay_after=-1),
        lambda: construct(trained=False),
        lambda: construct(mixed=True),
    )


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (0, "no gradient for idle.weight (2 such parameters)"),
        (1, "no backward since the last step"),
        (2, "bucket_bytes is 0; give a size above 0"),
        (3, "delay_after is -1; give a number of steps"),
        (4, "there is nothing to train"),
        (5, "torch.float16 on {0} and torch.float32 on {0}; give them one type"),
    ],
)
def test_bad_use_is_named(number, line):
    error, message = bad_uses.results[0][number]
    assert error == "UserError" and line.format("cuda:0" if device_of(1).type == "cuda" else "cpu") in message
