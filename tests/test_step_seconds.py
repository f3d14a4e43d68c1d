"""The planner's step times against the order that H100s measured."""

import pytest
from load_benchmark import load_benchmark

from helpers.finetune.results import read_results
from helpers.memory.predict import Configuration, ModelShape, Strategy
from helpers.memory.predict.jobs import read_job
from helpers.memory.predict.planner import sort_strategies, traffic
from helpers.memory.predict.step_seconds import step_seconds
from helpers.memory.units import GIB
from helpers.parallel.step_time import rank_correlation


@pytest.fixture(scope="module")
def seconds(tmp_path_factory):
    """Predicted and measured seconds of the committed runs of the 6B job, by run."""
    script = load_benchmark("finetune_6b")
    ways = {way.name: way for way in [*script.WAYS, *script.ON_ALL_GPUS] if way.script is None}  # the command's own
    path = tmp_path_factory.mktemp("configs") / "lora.yaml"
    found = {}
    for name, run in read_results()["runs"].items():
        if run["name"] not in ways:
            continue
        way = ways[run["name"]]
        load_benchmark("jobs_6b").write_config(path, way.config, way.training, way.speed)
        job = read_job(path, way.deepspeed, shape=ModelShape(), world_size=run["ranks"], sequence_length=150)
        found[name] = step_seconds(job, traffic(job)), run["step_seconds"]
    return found


def test_the_order_of_the_runs_is_the_measured_one(seconds):
    predicted, measured = zip(*seconds.values(), strict=True)
    assert rank_correlation(predicted, measured) > 0.9
    assert all(0.7 < p / m < 1.3 for p, m in seconds.values()), seconds


def test_a_large_batch_takes_as_long_as_its_operations():
    one = Configuration(micro_batch_size=8, sequence_length=1024)
    two = Configuration(micro_batch_size=16, sequence_length=1024)
    assert step_seconds(two, 0) == pytest.approx(2 * step_seconds(one, 0))
    full = Configuration(lora=None, micro_batch_size=8, sequence_length=1024)
    assert 1.3 < step_seconds(full, 0) / step_seconds(one, 0) < 1.5  # 6 operations per parameter, not 4


def test_a_small_batch_takes_as_long_as_its_kernels_need_to_start():
    one, two = (Configuration(micro_batch_size=rows, sequence_length=64) for rows in (1, 2))
    assert step_seconds(one, 0) == step_seconds(two, 0)


def test_the_plan_tells_the_time_and_the_fastest_that_fits_is_first():
    found = sort_strategies(Configuration(), 2, 80 * GIB)
    times = [float(f"{candidate.seconds:.2g}") for candidate in found if candidate.fit]
    assert times == sorted(times) and len(times) > 5
    assert f"about {found[0].seconds:.2f} s a step" in found[0].reason


def test_host_memory_costs_time():
    def time(**offload) -> float:
        c = Configuration(lora=None, precision="bf16", strategy=Strategy("zero-3", 2, **offload))
        return step_seconds(c, 0)

    # 3.1 billion parameters on each of two GPUs: 3.5 s for Adam in offload_6b.json.
    assert 3 < time(offload_optimizer=True) - time() < 4.5
    assert time(offload_optimizer=True, offload_parameters=True) > time(offload_optimizer=True)
