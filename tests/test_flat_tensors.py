"""DeepSpeed's flat tensors, simulated alone, against traces of whole steps on fake tensors."""

import dataclasses
import json
from pathlib import Path

import pytest
from load_benchmark import load_benchmark

from helpers.memory.predict import Configuration, Strategy, predict
from helpers.memory.predict.states import sub_groups

ROOT = Path(__file__).resolve().parents[1]
TRACES = json.loads((ROOT / "notebooks/results/prediction_traced.json").read_text(encoding="utf-8"))["configurations"]
DRAWN = {
    name: case.configuration
    for name, case in load_benchmark("prediction_cases").cases().items()
    if name in TRACES and case.configuration.strategy.zero_stage and case.configuration.lora is None
}
SIMULATED = [n for n, c in DRAWN.items() if c.expandable_segments and not c.strategy.offload_optimizer]


@pytest.mark.parametrize("name", SIMULATED)
def test_a_few_tensors_give_what_the_allocator_holds(name):
    assert predict(DRAWN[name]).reserved == pytest.approx(TRACES[name]["reserved"], rel=0.07)


def test_most_configurations_are_within_three_percent():
    errors = [abs(predict(DRAWN[name]).reserved / TRACES[name]["reserved"] - 1) for name in SIMULATED]
    assert len(errors) >= 9 and sum(error < 0.035 for error in errors) >= len(errors) - 1


def test_a_sub_group_takes_whole_parameters_until_it_is_full():
    c = Configuration(lora=None, precision="bf16", strategy=Strategy("zero-3", 1, sub_group_size=1))
    groups = sub_groups(c)
    matrices = 2 + c.shape.layers * len(c.shape.linears)
    assert len(groups) == matrices and groups[0] == c.shape.embedding
    joined = Configuration(lora=None, precision="bf16", strategy=Strategy("zero-3", 1, sub_group_size=10**12))
    assert sub_groups(joined) == [sum(groups)]


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_the_allocator_never_holds_less_than_the_tensors(rows):
    c = Configuration(lora=None, precision="bf16", strategy=Strategy("zero-2", 2), micro_batch_size=rows)
    found = predict(dataclasses.replace(c, expandable_segments=True))
    assert found.reserved >= found.allocated
