"""A small part of the campaign of faults (tests/benchmarks/faults.py): each is survived, or one clear line."""

import pytest
from fault_bench import Bench
from fault_kinds import GOOD
from load_benchmark import load_benchmark

faults = load_benchmark("faults")
pytestmark = pytest.mark.slow
# One process: what several ranks say when one of them is killed is the campaign's.
SEEDS = {"kill": (0, 1), "damage": range(2), "disk": (0,), "config": range(6), "rows": range(4), "change": (0, 1)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, rank_server):
    return Bench(tmp_path_factory.mktemp("bench"), rank_server)


@pytest.mark.parametrize("kind", SEEDS)
def test_faults_of_a_kind(kind, bench):
    records = [faults.inject(seed, bench, kind, "one process") for seed in SEEDS[kind]]
    assert not [record for record in records if record["verdict"] not in GOOD]
