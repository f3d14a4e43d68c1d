"""helpers.parallel.offload against a single process with torch's own AdamW, and its bytes."""

import pytest
import torch
import torch.distributed as dist

from helpers.errors import UserError
from helpers.launch import RankError, run
from helpers.parallel.network import TINY, batch, build, largest_difference

KIB = 1024
RANKS = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 2
STEPS, ROWS, LENGTH = 20, 3 * RANKS, 16


def alone(delay_after=None, micro_batches=1):
    """Plain AdamW over all rows; with ``delay_after`` the model gets each update one step late from then on."""
    from helpers.launch import device
    from helpers.parallel.network import EQUALITY_EPSILON, weights

    model = build(TINY, device())
    newest = build(TINY, device())  # what Adam updates; the model's gradients may be of older values
    optimizer = torch.optim.AdamW(newest.parameters(), lr=1e-3, eps=EQUALITY_EPSILON)
    for step in range(STEPS):
        whole = batch(TINY, ROWS, LENGTH, step, device())
        for micro in range(micro_batches):
            part = {name: rows[micro::micro_batches] for name, rows in whole.items()}
            (model(**part).loss / micro_batches).backward()
        before = weights(newest)
        for own, other in zip(newest.parameters(), model.parameters(), strict=True):
            own.grad, other.grad = other.grad, None
        optimizer.step()
        late = delay_after is not None and step >= delay_after
        model.load_state_dict(before if late else newest.state_dict(), strict=False)
    return weights(newest)


def offloaded(bucket_bytes=64 * KIB, delay_after=None, micro_batches=1, steps=STEPS, dtype=torch.float32):
    """The same on this rank's rows; weights, bytes by role, bytes copied to the host and to the device in a step."""
    from helpers.launch import device
    from helpers.parallel.network import EQUALITY_EPSILON, weights
    from helpers.parallel.offload import OffloadedAdamW

    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TINY, device(), dtype)
    optimizer = OffloadedAdamW(model, lr=1e-3, eps=EQUALITY_EPSILON, bucket_bytes=bucket_bytes, delay_after=delay_after)
    for step in range(steps):
        whole = batch(TINY, ROWS, LENGTH, step, device())
        for micro in range(micro_batches):
            part = {name: rows[micro::micro_batches][rank::n] for name, rows in whole.items()}
            (model(**part).loss / micro_batches).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
    optimizer.flush()
    copied = optimizer.bytes_to_host / steps, optimizer.bytes_to_device / steps
    return weights(model), optimizer.bytes_by_role(), copied


@pytest.mark.parametrize(
    "settings",
    [{}, {"bucket_bytes": 2**30}, {"bucket_bytes": 1}, {"delay_after": 0}, {"delay_after": 7}, {"micro_batches": 3}],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, RANKS])
def test_it_computes_what_one_process_computes(ranks, settings):
    reference = {name: value for name, value in settings.items() if name != "bucket_bytes"}
    expected = run(alone, ranks, **reference).results[0]
    for found, *_ in run(offloaded, ranks, **settings).results:
        assert largest_difference(found, expected) <= 1e-6


def test_a_delayed_update_is_another_training():
    expected = run(alone, 1).results[0]
    found, *_ = run(offloaded, 1, delay_after=0).results[0]
    assert largest_difference(found, expected) > 1e-4


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_bytes_are_what_it_says(ranks, dtype):
    size = dtype.itemsize
    for _, held, (down, up) in run(offloaded, ranks, steps=2, dtype=dtype, bucket_bytes=size * 100_000).results:
        # Shares are padded so that they are equally large: at most one element a bucket and rank.
        owned = held["host"]["gradients"] // 4
        assert TINY.parameters / ranks <= owned <= TINY.parameters / ranks + 10
        assert held["host"]["optimizer states"] == 12 * owned
        assert held["host"]["communication buffers"] == size * owned
        assert sum(held["host"].values()) == (16 + size) * owned
        assert held["device"]["parameters"] == size * ranks * owned
        assert held["device"]["optimizer states"] == held["device"]["gradients"] == 0
        assert (down, up) == (size * owned, size * owned)


def test_the_tensors_hold_what_the_roles_say():
    def fn():
        from helpers.parallel.offload import OffloadedAdamW

        model = build(TINY)
        optimizer = OffloadedAdamW(model, lr=1e-3, bucket_bytes=64 * KIB)
        model(**batch(TINY, 2, 8)).loss.backward()
        optimizer.step()
        storages = {}
        for bucket in optimizer.buckets:
            moments = [t for t in bucket.adam.state[bucket.master].values() if t.numel() > 1]
            for tensor in (bucket.staging, bucket.gradient, bucket.master, *moments):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        return optimizer.bytes_by_role(), sum(storages.values()), sum(parameters.values())

    held, on_host, parameters = run(fn, 1).results[0]
    assert sum(held["host"].values()) == on_host and held["device"]["parameters"] == parameters


def test_frozen_parameters_stay_where_they_are():
    def fn():
        from helpers.parallel.offload import OffloadedAdamW

        model = build(TINY, dtype=torch.bfloat16)
        model.model.requires_grad_(False)
        before = model.model.embed_tokens.weight.clone()
        optimizer = OffloadedAdamW(model, lr=1e-3)
        model(**batch(TINY, 2, 8)).loss.backward()
        optimizer.step()
        return torch.equal(model.model.embed_tokens.weight, before), optimizer.bytes_to_host

    assert run(fn, 1).results == [(True, 2 * TINY.embedding)]


def test_bad_use_is_named():
    def unused():
        from helpers.parallel.offload import OffloadedAdamW

        model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
        OffloadedAdamW(model, lr=1e-3)
        model["used"](torch.ones(1, 2)).sum().backward()

    def construct(arguments):
        from helpers.parallel.offload import OffloadedAdamW

        model = torch.nn.Linear(2, 2).requires_grad_(arguments.pop("trained", True))
        if arguments.pop("mixed", False):
            model.bias.data = model.bias.data.half()
        OffloadedAdamW(model, lr=1e-3, **arguments).step()

    with pytest.raises(RankError, match=r"no gradient for idle\.weight \(2 such parameters\)"):
        run(unused, 1)
    for arguments, line in (
        ({}, "no backward since the last step"),
        ({"bucket_bytes": 0}, "bucket_bytes is 0; give a size above 0"),
        ({"delay_after": -1}, "delay_after is -1; give a number of steps"),
        ({"trained": False}, "there is nothing to train"),
        ({"mixed": True}, r"torch.float16 on cpu and torch.float32 on cpu; give them one type"),
    ):
        with pytest.raises(RankError, match=line) as error:
            run(construct, 1, arguments=arguments)
        assert error.value.type == UserError.__name__
