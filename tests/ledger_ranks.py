"""What test_ledger.py runs on ranks: train a small model in every way that shards it, and count beside the ledger.

:func:`measure` returns {case: {moment: {"ledger", "alive"}}}. "alive" is the size of all storages that Python's garbage
collector finds behind tensors, less what a case does not own (earlier ones, a batch nobody keeps).
"""

import gc
import warnings
from dataclasses import asdict
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.libraries.deepspeed import configure_deepspeed
from helpers.memory.ledger import count_bytes, gather_ledgers
from helpers.memory.saved_tensors import SavedTensors

WIDTH = 24
BUCKET = 3000  # elements


class Block(nn.Module):
    """A block with a weight of its own, and one that does not divide by two ranks."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(7))
        self.register_buffer("shift", torch.zeros(WIDTH))

    def forward(self, x):
        return x + self.down(self.up(x + self.shift.to(x.dtype)).relu()) * self.scale.sum()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block()).to(dtype)


def alive(outside):
    """Bytes of the distinct storages of all tensors that the garbage collector knows, and ``outside`` does not hold."""
    foreign = {local(tensor).untyped_storage().data_ptr() for tensor in outside}
    found = {}
    for tensor in tensors():
        storage = local(tensor).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in foreign:
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def tensors():
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]


def local(tensor):
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def release_collectives():
    """Give gloo's threads something else to do: each may hold the tensors of its last collective until then."""
    for group in list(dist.distributed_c10d._world.pg_map):
        for work in [dist.barrier(group, async_op=True) for _ in range(16)]:
            work.wait()


class Case:
    """Records what the ledger and the garbage collector say at the moments of one training."""

    def __init__(self):
        gc.collect()
        # Held, so that none of their addresses is used again.
        self.outside = tensors()
        self.batch = torch.randn(5, WIDTH)
        self.more_than_counted = torch.zeros(1, dtype=torch.int)
        self.outside += [self.batch, self.more_than_counted]
        self.moments = {}

    def note(self, moment, model, optimizer=None, more=(), activations=None):
        ledger = count_bytes(model, optimizer, activations)
        kept = {storage.address for storage in activations.storages()} if activations else set()
        outside = [
            tensor for tensor in (*self.outside, *more) if local(tensor).untyped_storage().data_ptr() not in kept
        ]
        known = alive(outside)
        if moment != "inside backward":
            for _ in range(50):
                release_collectives()
                known = alive(outside)
                self.more_than_counted[0] = known > ledger.total
                dist.all_reduce(self.more_than_counted, dist.ReduceOp.MAX)
                if not self.more_than_counted:  # on no rank
                    break
        self.moments[moment] = {"ledger": asdict(ledger), "alive": known}


def plain(case, model, optimizer):
    """Two steps, noted before the first backward, after it, after the step."""
    for step in range(2):
        with SavedTensors(model) as activations:
            loss = model(case.batch).float().square().mean()
        case.note(f"forward {step}", model, optimizer, [loss], activations)
        loss.backward()
        del loss
        case.note(f"backward {step}", model, optimizer)
        optimizer.step()
        case.note(f"step {step}", model, optimizer)
        optimizer.zero_grad()
        case.note(f"zero {step}", model, optimizer)


@cache
def mesh():
    """One for all cases: a mesh keeps its ranks in tensors, which are no part of a training."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def ddp(case, views):
    model = DistributedDataParallel(network(), gradient_as_bucket_view=views, bucket_cap_mb=0.01)
    plain(case, model, torch.optim.AdamW(model.parameters()))
    buckets = {}

    def hook(state, bucket):
        buckets[bucket.index()] = bucket.buffer().untyped_storage().nbytes()
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    model(case.batch).sum().backward()
    case.moments["buckets"] = buckets


def fsdp(case, **options):
    model = network()
    for part in (*model[1:], model):
        fully_shard(part, mesh=mesh(), **options)
    plain(case, model, torch.optim.AdamW(model.parameters()))


def zero(case, stage, dtype="fp32", **options):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 5,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **options},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled
    }
    if stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 40, "stage3_prefetch_bucket_size": BUCKET}
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    del model, optimizer
    batch = case.batch.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    case.note("start", engine, more=[batch])

    def inside_backward(gradient):
        case.note("inside backward", engine, None, [batch, gradient], activations)

    engine.module[1].register_forward_hook(lambda module, args, output: output.register_hook(inside_backward) and None)
    for step in range(2):
        with SavedTensors(engine) as activations:
            loss = engine(batch).float().square().mean()
        case.note(f"forward {step}", engine, None, [loss, batch], activations)
        engine.backward(loss)
        del loss
        case.note(f"backward {step}", engine, more=[batch])
        engine.step()
        case.note(f"step {step}", engine, more=[batch])
    engine.destroy()


CASES = {
    "ddp": lambda case: ddp(case, False),
    "ddp, views": lambda case: ddp(case, True),
    "fsdp": fsdp,
    "fsdp, kept whole": lambda case: fsdp(case, reshard_after_forward=False),
    "fsdp, bf16": lambda case: fsdp(case, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "zero 0": lambda case: zero(case, 0),
    "zero 1": lambda case: zero(case, 1),
    "zero 2": lambda case: zero(case, 2),
    "zero 3": lambda case: zero(case, 3),
    "zero 0, bf16": lambda case: zero(case, 0, "bf16"),
    "zero 2, bf16": lambda case: zero(case, 2, "bf16"),
    "zero 3, bf16": lambda case: zero(case, 3, "bf16"),
    "zero 2, offload": lambda case: zero(case, 2, "bf16", offload_optimizer={"device": "cpu"}),
    "zero 3, offload": lambda case: zero(case, 3, "bf16", offload_optimizer={"device": "cpu"}),
}


def measure():
    """Every case in turn, on this rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    configure_deepspeed(torch.device("cpu"))
    mesh()
    gc.freeze()  # what was imported holds no tensor of a case, and takes long to search
    results = {}
    for name, train in CASES.items():
        case = Case()
        train(case)
        results[name] = case.moments
    own = count_bytes(nn.Linear(3 + dist.get_rank(), 1))
    return results | {"gathered": [asdict(ledger) for ledger in gather_ledgers(own)]}
