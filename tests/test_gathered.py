"""Which matrices ZeRO-3 holds whole: predicted, and watched in DeepSpeed itself."""

import dataclasses
import re

import pytest
import torch
import torch.distributed as dist
from load_benchmark import load_benchmark
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.memory.predict import Configuration, Lora, ModelShape, Strategy
from helpers.memory.predict import gathered as parts
from helpers.memory.predict.gathered import most_gathered

SMALL = ModelShape(hidden=96, layers=3, heads=4, kv_groups=2, head_dim=32, intermediate=208, vocab=320)
# The smallest matrix has 6,144 elements, the largest of what ZeRO-3 leaves whole 768.
LAYER, THRESHOLD = SMALL.layer_matrices, 1000


def job(lora=True, checkpointing=False, live=0, prefetch=0, reuse=0):
    strategy = Strategy(
        "zero-3",
        2,
        reduce_bucket_size=1000,
        max_live_parameters=live or 1,
        prefetch_bucket_size=prefetch,
        max_reuse_distance=reuse,
    )
    return Configuration(
        SMALL,
        Lora(r=2) if lora else None,
        "bf16",
        strategy,
        micro_batch_size=1,
        sequence_length=8,
        checkpointing=checkpointing,
    )


@pytest.fixture(scope="module")
def script():
    return load_benchmark("prediction")


@pytest.fixture
def two_ranks(monkeypatch, deepspeed_on_the_cpu):
    """This process as rank 0 of two, whose collectives do nothing: what is gathered does not depend on the numbers."""
    import deepspeed.comm.comm

    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)  # its backend would be kept for the next test
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def place(name):
    """Where in the model a matrix is."""
    layer = re.search(r"layers\.(\d+)", name)
    return int(layer[1]) if layer else "embedding" if "embed_tokens" in name else "output"


def watch(script, c, monkeypatch):
    """Train two steps; return the most elements gathered in the second, for forward and backward and each place."""
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    monkeypatch.setattr(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None)
    monkeypatch.setattr(stage3, "is_invalid_grad_norm", lambda norm: False)  # nothing was really gathered
    model = script.build(c, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    config = script.deepspeed_config(c)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = THRESHOLD
    monkeypatch.setattr(script, "deepspeed_config", lambda c: config)
    engine = script._deepspeed(c, model, optimizer)
    sharded = {p: name for name, p in engine.module.named_parameters() if not p.ds_persist}
    most, fetch = {}, coordinator.fetch_sub_module

    def observed(self, module, forward):
        fetch(self, module, forward)
        names = [sharded[p] for p in module.parameters(recurse=False) if p in sharded]
        if names:
            flying = self._PartitionedParameterCoordinator__inflight_param_registry
            together = {id(h): h for handles in flying.values() for h in getattr(handles, "handles", [handles])}
            flat = [h for h in together.values() if isinstance(h, partition_parameters.AllGatherCoalescedHandle)]
            waiting = {p for h in flat if not h.complete for p in h.params}
            whole = [p for p in sharded if p.ds_status.name != "NOT_AVAILABLE" and p not in waiting]
            held = sum(p.ds_numel for p in whole) + sum(p.ds_numel for h in flat for p in h.params)
            key = "backward" if torch._C._current_graph_task_id() != -1 else "forward", place(names[0])
            most[key] = max(most.get(key, 0), held)

    monkeypatch.setattr(coordinator, "fetch_sub_module", observed)
    for _ in range(2):
        most.clear()
        ids = torch.ones(1, 8, dtype=torch.long)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return most


def predicted(c):
    """The same from most_gathered, without forward, which never is the peak."""
    found = most_gathered(c)

    def layer(name):
        return max(size for part, size in found.items() if part.startswith(name))

    most = {("forward", "output"): found[parts.OUTPUT], ("backward", "output"): found[parts.OUTPUT_BACKWARD]}
    if c.strategy.prefetch_bucket_size:  # later, how far ahead the prefetch is depends on modules without a matrix
        return most
    if c.lora is None or c.checkpointing:
        most["backward", "embedding"] = found[parts.EMBEDDING_BACKWARD]
    return most | {("backward", n): layer(name) for n, name in enumerate((parts.FIRST, parts.MIDDLE, parts.LAST))}


@pytest.mark.parametrize(
    "c",
    [
        job(reuse=3 * LAYER),
        job(live=2 * LAYER, prefetch=LAYER // 4),
        job(checkpointing=True),
        job(lora=False, reuse=LAYER),
        job(lora=False, checkpointing=True, live=LAYER, prefetch=LAYER // 4, reuse=LAYER // 2),
    ],
    ids=("kept", "prefetched", "checkpointing", "full", "full, checkpointing, prefetched"),
)
def test_deepspeed_gathers_what_is_predicted(c, script, two_ranks, monkeypatch):
    script.prepare_deepspeed(lean=True)
    most, expected = watch(script, c, monkeypatch), predicted(c)
    assert {key: most[key] for key in expected} == expected


def test_a_checkpointed_layer_is_whole_when_it_has_been_recomputed():
    c = job(checkpointing=True)
    assert most_gathered(c)[f"{parts.LAST}, {parts.RECOMPUTED}"] == LAYER
    # A trained matrix is freed again before its own backward.
    full = most_gathered(dataclasses.replace(c, lora=None))[f"{parts.LAST}, {parts.RECOMPUTED}"]
    assert full == SMALL.hidden * SMALL.intermediate * 3


def test_a_compiled_layer_is_gathered_as_one():
    c = dataclasses.replace(job(), compiled=True, lean=True)
    assert most_gathered(c)[f"{parts.LAST}, {parts.MLP}"] == 2 * LAYER  # the flat buffer, and the matrices
