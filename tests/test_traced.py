"""The allocator, simulated on the step's own allocations, against what an H100 held."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from load_benchmark import load_benchmark
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.errors import UserError
from helpers.memory.predict import Configuration, ModelShape, Strategy, predict
from helpers.memory.predict.__main__ import main
from helpers.memory.predict.allocations import Allocations
from helpers.memory.predict.traced import trace
from helpers.memory.units import GIB, MIB

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from prediction_cases import cases

SCRIPT = load_benchmark("prediction")
MEASURED = json.loads(SCRIPT.RESULTS.read_text())["configurations"]
VALIDATED = json.loads(SCRIPT.RESULTS.with_name("prediction_validation.json").read_text())["configurations"]
SMALL = ModelShape(hidden=64, layers=2, heads=4, kv_groups=2, head_dim=16, intermediate=96, vocab=512)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expandable"), [("full, fp32", False), ("LoRA, autocast, checkpointing", True)])
def test_the_simulation_holds_what_an_h100_held(name, expandable):
    configuration = dataclasses.replace(SCRIPT.configurations(1)[name], expandable_segments=expandable)
    entry = MEASURED[name] if expandable else MEASURED[name]["default_allocator"]
    (rank,) = entry["measured"]
    found = trace(configuration)
    assert found.reserved / GIB == pytest.approx(rank["reserved"] / GIB, abs=0.05)
    # NVML of the whole run, which the formulas miss by up to 6 %.
    assert predict(configuration, found.reserved).total == pytest.approx(rank["nvml"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        # The formulas miss the first by -2, the second by -15 % and the third by +17 %.
        "1 x zero-1, 2 layers, LoRA r 64, 8 x 256, default allocator",
        "1 x zero-2, offload, overlap, 2 layers, full bf16, 4 x 2048, checkpointing",
        "1 x zero-3, 5e8, 6 layers, full bf16, 2 x 256",
    ],
)
def test_deepspeed_itself_is_traced_and_holds_what_an_h100_held(name):
    (rank,) = VALIDATED[name]["measured"]
    found = trace(cases()[name].configuration)
    assert found.allocated == pytest.approx(rank["allocated"], rel=0.002)
    assert found.reserved == pytest.approx(rank["reserved"], abs=4 * MIB)


def test_the_job_is_traced_as_it_is():
    small = ModelShape(hidden=256, layers=2, heads=4, kv_groups=2, head_dim=64, intermediate=512, vocab=4096)
    plain = Configuration(small, sequence_length=512, padded=True, expandable_segments=True)
    job = dataclasses.replace(plain, lean=True, loss_chunk=256, padding_mask=False, strategy=Strategy("ddp", 2))
    found = trace(job)
    assert found.reserved >= found.allocated > 0
    assert found != trace(plain)
    assert trace(dataclasses.replace(job, lora=None)).allocated > found.allocated  # the model itself, without PEFT


@pytest.mark.parametrize("kind", ["zero-2", "zero-3"])
def test_several_ranks_are_traced_in_one_process_that_is_left_as_it_was(kind):
    linear, to = torch.nn.functional.linear, torch.nn.Module.to
    job = Configuration(SMALL, lora=None, precision="bf16", sequence_length=64, expandable_segments=True)
    alone, shared = (
        dataclasses.replace(job, strategy=Strategy(kind, ranks, reduce_bucket_size=10_000, max_live_parameters=10_000))
        for ranks in (1, 4)
    )
    found = trace(shared)
    # Of four ranks, each has a fourth of the states that ZeRO divides, 12 bytes per parameter and more.
    assert trace(alone).allocated - found.allocated >= 0.75 * 12 * SMALL.parameters
    assert not dist.is_initialized()
    assert (torch.nn.functional.linear, torch.nn.Module.to) == (linear, to) and not hasattr(torch, "lazy")


def test_what_is_offloaded_takes_no_gpu_memory():
    job = Configuration(SMALL, lora=None, precision="bf16", sequence_length=64, gradient_accumulation_steps=2)
    on_gpu, on_host = (
        dataclasses.replace(job, strategy=Strategy("zero-2", 1, reduce_bucket_size=10_000, offload_optimizer=offload))
        for offload in (False, True)
    )
    assert trace(on_gpu).allocated - trace(on_host).allocated > 8 * SMALL.parameters


def test_a_trace_of_deepspeed_wants_no_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="process group of its own"):
            trace(Configuration(SMALL, precision="bf16", strategy=Strategy("zero-2")))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compiled": True}, "the compiler decides"),
        ({"quantization_bits": 4}, "quantised matrices"),
        ({"offloaded_checkpoints": True}, "another stream"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UserError, match=f"{reason}.*leave --trace out"):
        trace(Configuration(**changes))


def test_a_block_that_another_stream_has_used_comes_back_when_python_waits():
    with FakeTensorMode(), Allocations(False, "cpu", workspace=MIB) as allocations:

        def used_elsewhere():
            tensor = torch.empty(30 * MIB, dtype=torch.uint8)
            allocations.record(tensor, stream=1)

        used_elsewhere()
        used_elsewhere()
        assert (allocations.allocated, allocations.reserved) == (30 * MIB, 60 * MIB)
        assert torch.empty(1).sum().item() == 0  # Python waits for the number
        used_elsewhere()
        assert allocations.reserved == 62 * MIB  # the numbers are in the small pool
        allocations.stream = 1
        torch.empty(30 * MIB, dtype=torch.uint8)  # has a pool of its own
        assert allocations.reserved == 92 * MIB
        allocations.empty_cache()
        torch.empty(90 * MIB, dtype=torch.uint8)
        assert allocations.reserved == 92 * MIB


def test_each_thread_and_stream_gets_a_workspace_at_its_first_matmul():
    with FakeTensorMode(), Allocations(False, "cpu", workspace=32 * MIB) as allocations:
        matrix = torch.empty(8, 8, requires_grad=True)
        assert allocations.allocated < MIB
        result = (matrix @ matrix) @ matrix
        assert 32 * MIB < allocations.allocated < 33 * MIB
        result.sum().backward()
        assert 64 * MIB < allocations.allocated < 65 * MIB


def test_tensors_of_another_device_are_not_followed():
    with FakeTensorMode(), Allocations(False, "lazy", workspace=MIB) as allocations:
        torch.empty(30 * MIB, dtype=torch.uint8)
        assert allocations.allocated == 0
        torch.empty(MIB, dtype=torch.uint8, device="lazy")
        assert allocations.allocated == MIB


@pytest.mark.parametrize("options", [[], ["--strategy", "zero-3", "--gpus", "2"]])
def test_the_command_traces(options, capsys, tmp_path):
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["--model", str(tmp_path), "--trace", "--length", "64", *options])
    changes = {"strategy": Strategy("zero-3", 2), "precision": "bf16"} if options else {}
    job = Configuration(SMALL, sequence_length=64, **changes)
    total = predict(job, trace(job).reserved).total
    assert f"  {'total':<24}{total / GIB:>8.2f}" in capsys.readouterr().out
