"""The DeepSpeed files with offload: each is read, and those that need no other library train like a single process."""

import json
from pathlib import Path

import pytest
import torch

from helpers.launch import run
from helpers.memory.predict import ModelShape
from helpers.memory.predict.jobs import read_job
from helpers.parallel.network import TINY, batch, build, largest_difference

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("configs/ds_*offload*.json"), *ROOT.glob("configs/ds_*infinity*.json")])
IN_HOST_MEMORY = [path for path in FILES if "infinity" not in path.stem]
STEPS, ROWS, LENGTH = 20, 4, 16
RANKS = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 2


def alone():
    from helpers.launch import device
    from helpers.parallel.network import EQUALITY_EPSILON, weights

    model = build(TINY, device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EQUALITY_EPSILON)
    for step in range(STEPS):
        model(**batch(TINY, ROWS * RANKS, LENGTH, step, device())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def with_deepspeed(path):
    import torch.distributed as dist

    from helpers.config.deepspeed import fill_auto
    from helpers.launch import device
    from helpers.libraries.deepspeed import configure_deepspeed
    from helpers.parallel.network import EQUALITY_EPSILON

    configure_deepspeed(device())
    import deepspeed

    config = fill_auto(
        json.loads(path.read_text(encoding="utf-8")),
        micro_batch_size=ROWS,
        world_size=dist.get_world_size(),
        precision="fp32",
    )
    config["zero_force_ds_cpu_optimizer"] = False  # it would have to be compiled
    model = build(TINY, device())
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EQUALITY_EPSILON, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    for step in range(STEPS):
        whole = batch(TINY, ROWS * RANKS, LENGTH, step, device())
        engine.backward(engine(**{name: rows[dist.get_rank() :: RANKS] for name, rows in whole.items()}).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    return run(alone, 1 if RANKS == 2 else RANKS).results[0]


@pytest.mark.parametrize("path", IN_HOST_MEMORY, ids=lambda path: path.stem)
def test_it_trains_as_one_process_does(path, expected):
    for found in run(with_deepspeed, RANKS, path=path).results:
        assert largest_difference(found, expected) <= 1e-5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_can_be_read_for_a_prediction_and_leaves_the_device_what_it_says(path):
    job = read_job(ROOT / "configs" / "lora.yaml", path, shape=ModelShape(), world_size=2, sequence_length=64)
    content = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    assert job.strategy.zero_stage == content["stage"] and job.strategy.offload_optimizer
    assert job.strategy.offload_parameters == ("offload_param" in content)


def test_every_kind_of_offload_has_its_file():
    kinds = set()
    for path in FILES:
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        targets = (zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param"))
        kinds.add((zero["stage"], *targets))
    assert kinds == {(2, "cpu", None), (3, "cpu", None), (3, "cpu", "cpu"), (3, "cpu", "nvme"), (3, "nvme", "nvme")}
