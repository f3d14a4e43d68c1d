"""The switches reach what they are meant for in the installed DeepSpeed, and configs/ds_*.json train with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from one_process import LENGTH, ROWS, TWO_LAYERS, make_optimizer, train_alone
from shared_launch import SharedLaunches
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.config.deepspeed import fill_auto
from helpers.errors import UserError
from helpers.launch import device
from helpers.libraries.deepspeed import configure_deepspeed, gather_whole_layers
from helpers.parallel.network import batch, build, largest_difference, weights

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 5
shared = SharedLaunches(__name__)

SCRIPT = """
import torch.distributed as dist
from helpers.libraries.deepspeed import share_world_group, skip_cpu_collectives

skip_cpu_collectives()
share_world_group()
import deepspeed
from deepspeed.utils import groups

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
assert deepspeed.comm.comm.cdb.shm_comm_op is None
assert groups._get_data_parallel_group() is dist.group.WORLD
before = len(dist.distributed_c10d._world.pg_map)
assert groups._get_data_parallel_group() is dist.group.WORLD
assert len(dist.distributed_c10d._world.pg_map) == before == 1
assert dist.get_global_rank(dist.group.WORLD, 0) == 0

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from helpers.libraries.deepspeed import configure_deepspeed, gather_whole_layers

set_accelerator(CUDA_Accelerator())  # what it takes where there is a GPU
configure_deepspeed(torch.device("cpu"))
assert get_accelerator().device_name() == "cpu"
print("fine")
"""


@pytest.mark.slow
def test_deepspeed_works_on_the_cpu_compiles_nothing_and_makes_no_second_world_group():
    on_the_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=on_the_cpu
    )
    assert finished.stdout.endswith("fine\n"), finished.stderr


def train_with_deepspeed(name):
    configure_deepspeed(device())
    import deepspeed

    rank, n = dist.get_rank(), dist.get_world_size()
    model = build(TWO_LAYERS, device())
    config = fill_auto(
        json.loads((CONFIGS / name).read_text()), micro_batch_size=ROWS // n, world_size=n, precision="fp32"
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model.parameters()), config=config)
    for step in range(STEPS):
        rows = {key: value.chunk(n)[rank] for key, value in batch(TWO_LAYERS, ROWS, LENGTH, step, device()).items()}
        engine.backward(engine(**rows).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=engine.zero_optimization_stage() == 3):
        return weights(model), engine.zero_optimization_stage()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "stage"),
    [
        pytest.param(shared.case(2, train_with_deepspeed, name=name), stage, id=name)
        for name, stage in (
            ("ds_zero_1.json", 1),
            ("ds_zero_1_full.json", 1),
            ("ds_zero_2_full.json", 2),
            ("ds_zero_3_full.json", 3),
        )
    ],
)
def test_a_file_trains_what_one_process_trains(case, stage):
    for found, used in case.results:
        assert used == stage
        assert largest_difference(found, train_alone(TWO_LAYERS, 2, steps=STEPS).weights) <= 1e-6


def frozen_embedding():
    model = build(TWO_LAYERS, device())
    model.get_input_embeddings().weight.requires_grad_(False)
    return model, make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])


def compiled_layers_under_zero_3():
    """Train as one process does and under ZeRO-3 with compiled layers.

    Returns the largest difference, how many matrices stay gathered, of how many, how often layers were compiled, the
    ranges that were marked for Nsight, and how often each layer's parameters were listed after DeepSpeed's start.
    """
    configure_deepspeed(device())
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch._dynamo.utils import counters

    ranges = []
    get_accelerator().range_push = ranges.append

    rank, n = dist.get_rank(), dist.get_world_size()
    rows = [batch(TWO_LAYERS, ROWS, LENGTH, step, device()) for step in range(STEPS)]
    alone, optimizer = frozen_embedding()
    for step in rows:
        alone(**step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = frozen_embedding()
    gather_whole_layers(model, model.model.layers)
    matrices = []
    for layer in model.model.layers:
        forward = torch.compile(layer.forward, backend="aot_eager")
        own = [parameter for parameter in layer.parameters() if parameter.dim() > 1]

        def remember(*args, own=own, forward=forward, **kwargs):
            matrices.extend(StorageWeakRef(parameter.data.untyped_storage()) for parameter in own)
            return forward(*args, **kwargs)

        layer.forward = remember
    config = json.loads((CONFIGS / "ds_zero_3_full.json").read_text())
    config = fill_auto(config, micro_batch_size=ROWS // n, world_size=n, precision="fp32")
    config["zero_optimization"] |= {f"stage3_{name}": 0 for name in ("max_live_parameters", "max_reuse_distance")}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    listed = dict.fromkeys(model.model.layers, 0)
    named_parameters = torch.nn.Module.named_parameters

    def count(module, *args, **kwargs):
        if module in listed:
            listed[module] += 1
        return named_parameters(module, *args, **kwargs)

    with mock.patch.object(torch.nn.Module, "named_parameters", count):
        for step in rows:
            matrices.clear()
            loss = engine(**{key: value.chunk(n)[rank] for key, value in step.items()}).loss
            kept = sum(not reference.expired() for reference in matrices), len(matrices)
            engine.backward(loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        difference = largest_difference(weights(model), weights(alone))
    return difference, *kept, counters["stats"]["unique_graphs"], ranges, list(listed.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(shared.case(2, compiled_layers_under_zero_3), id="compiled")])
def test_compiled_layers_are_gathered_whole_and_freed_before_backward(case):
    for difference, kept, gathered, compiled, ranges, listed in case.results:
        assert difference <= 1e-6
        assert kept == 0 and gathered > 4
        assert compiled == 1  # all layers share their code; the compiler gives up after 8 versions
        assert not ranges
        assert listed == [1, 1]  # and not four times in each of the steps


def saved_by_a_frozen_and_a_trained_layer():
    """Return shapes saved by each layer of two under ZeRO-3's linear function, and the gradients of both."""
    configure_deepspeed(device())
    configure_deepspeed(device())  # a second call changes nothing
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    found = []
    for trained in (False, True):
        for bias in (None, torch.ones(4, device=device())):
            weight = torch.arange(12.0, device=device()).view(4, 3).requires_grad_(trained)
            values = torch.ones(2, 3, device=device(), requires_grad=True)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, to=saved: to.append(tuple(t.shape)) or t, lambda t: t
            ):
                output = zero3_linear_wrap(values, weight, bias)
            output.sum().backward()
            found.append((saved, values.grad.tolist(), None if weight.grad is None else weight.grad.tolist()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(shared.case(2, saved_by_a_frozen_and_a_trained_layer), id="linear")])
def test_a_frozen_layer_under_zero_3_saves_no_input(case):
    for frozen, frozen_bias, trained, trained_bias in case.results:
        gradient = [[18.0, 22.0, 26.0]] * 2  # the sums of the weight's columns
        assert frozen == ([(4, 3)], gradient, None) and frozen_bias == ([(4, 3), (4,)], gradient, None)
        assert trained == ([(2, 3), (4, 3)], gradient, [[2.0] * 3] * 4)
        assert trained_bias == ([(2, 3), (4, 3), (4,)], gradient, [[2.0] * 3] * 4)


def test_auto_is_filled_as_the_trainer_does():
    config = json.loads((CONFIGS / "ds_zero_2.json").read_text())
    filled = fill_auto(
        config,
        micro_batch_size=4,
        world_size=2,
        precision="bf16",
        gradient_accumulation_steps=3,
        gradient_clipping=0.5,
    )
    assert filled["train_batch_size"] == 24 and filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 3 and filled["gradient_clipping"] == 0.5
    assert filled["bf16"] == {"enabled": True} and filled["fp16"]["enabled"] is False
    assert filled["fp16"]["loss_scale_window"] == 1000  # what is not "auto" stays


def test_an_auto_that_nobody_knows_is_named():
    with pytest.raises(UserError, match=r'^fill_auto: zero_optimization.reduce_bucket_size is "auto"; give it'):
        fill_auto(
            {"zero_optimization": {"reduce_bucket_size": "auto"}}, micro_batch_size=1, world_size=1, precision="fp32"
        )
