"""The fine-tune on real ranks: DeepSpeed on gloo equals one process, a run's files, interrupts, faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_gpu
from rank_server import RankServer
from small_chatglm import random_model, small_config
from small_finetune import ROOT, STEPS, TRAIN, adapter, largest_difference, merged, prepare, train_beside, write_config

from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.packing import best_fit_packing
from helpers.finetune.recorder import read_metrics
from helpers.finetune.torchrun import torchrun_command

pytestmark = pytest.mark.slow

PUBLISHED = ROOT / "tests" / "data"
ON_THE_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def finetune(rank_server: RankServer, data_dir, small_checkpoint):
    """Fine-tune ``small_checkpoint`` on some ranks; the output folder is beside the configuration."""

    def run(nprocs: int | None, config: Path, *arguments: object, file_bytes: int | None = None):
        output = ("--output-dir", config.parent / "output")
        return rank_server.run(
            *(TRAIN, data_dir, small_checkpoint, config, *arguments, *output), nprocs=nprocs, file_bytes=file_bytes
        )

    return run


@pytest.fixture(scope="module")
def single(tmp_path_factory, rank_server, data_dir, small_checkpoint) -> Path:
    """Output folder of one process that sees, in each step, the rows that two ranks see together."""
    folder = tmp_path_factory.mktemp("single")
    config = write_config(folder, training_args={"per_device_train_batch_size": 8})
    return train_beside(rank_server, config, data_dir, small_checkpoint, nprocs=1)


@pytest.mark.parametrize("deepspeed", [None, "ds_zero_2.json", "ds_zero_3.json"])
def test_two_ranks_train_what_one_process_trains(deepspeed, tmp_path, finetune, single):
    config = write_config(tmp_path)
    finished = finetune(2, config, *([ROOT / "configs" / deepspeed] if deepspeed else []))
    assert finished.returncode == 0, finished.stderr
    for n in (2, 4):
        name = f"checkpoint-{n}"
        assert largest_difference(adapter(tmp_path / "output" / name), adapter(single / name)) < 1e-6
    losses = [
        [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
        for folder in (tmp_path / "output", single)
    ]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_a_deepspeed_file_leaves_open_is_that_of_the_job_and_it_needs_no_launcher(tmp_path, finetune, single):
    training = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}  # and max_grad_norm, by default
    (tmp_path / "ds.json").write_text('{"_comment": "no sizes, no clipping", "zero_optimization": {"stage": 2}}')
    finished = finetune(None, write_config(tmp_path, training_args=training), tmp_path / "ds.json")
    assert finished.returncode == 0, finished.stderr
    assert "ds.json leaves train_micro_batch_size_per_gpu, gradient_accumulation_steps, gradient_clipping open" in (
        finished.stdout
    )
    name = f"checkpoint-{STEPS}"
    assert largest_difference(adapter(tmp_path / "output" / name), adapter(single / name)) < 1e-6


@pytest.fixture(scope="module")
def train_rows(tmp_path_factory, data_dir, small_checkpoint):
    """The rows to train on, as token ids."""
    return prepare(data_dir, small_checkpoint, write_config(tmp_path_factory.mktemp("rows"))).data.train


@pytest.fixture(scope="module")
def padded(tmp_path_factory, rank_server, data_dir, small_checkpoint, train_rows) -> Path:
    """Output folder of one process whose every step sees all rows, padded."""
    folder = tmp_path_factory.mktemp("padded")
    training = {"per_device_train_batch_size": len(train_rows), "eval_steps": 4}
    config = write_config(folder, training_args=training)
    return train_beside(rank_server, config, data_dir, small_checkpoint, nprocs=1)


@pytest.mark.parametrize("deepspeed", [None, "ds_zero_2.json"])
def test_two_ranks_with_packs_train_what_one_process_does_with_padded_rows(
    deepspeed, tmp_path, finetune, train_rows, padded
):
    lengths = list(map(len, train_rows["input_ids"][:]))
    # As many packs on each rank: where they do not divide, one of them would be trained on twice.
    capacity, packs = next((c, n) for c in range(400, 900) if (n := len(best_fit_packing(lengths, c, seed=1))) % 2 == 0)
    training = {"per_device_train_batch_size": packs // 2, "eval_steps": 4}
    config = write_config(tmp_path, training_args=training, speed={"packing": capacity, "loss_chunk": 100})
    finished = finetune(2, config, *([ROOT / "configs" / deepspeed] if deepspeed else []))
    assert finished.returncode == 0, finished.stderr
    packed = tmp_path / "output"
    # Every step sees all rows, whatever their order.
    assert largest_difference(adapter(packed / "checkpoint-4"), adapter(padded / "checkpoint-4")) < 1e-5
    found, expected = ([r for r in read_metrics(f / "metrics.jsonl") if "loss" in r] for f in (packed, padded))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=1e-5)
    rates = [r["samples_per_second"] / r["tokens_per_second"] for r in (*found, *expected)]
    assert rates == pytest.approx([len(lengths) / sum(lengths)] * len(rates))  # padding is no token, a pack many rows


def test_layer_inputs_in_host_memory_change_nothing(tmp_path, finetune):
    training = {"gradient_checkpointing": True, "eval_strategy": "no"}
    trained = []
    for offloaded in (False, True):
        folder = tmp_path / str(offloaded)
        config = write_config(folder, training_args=training, speed={"offload_checkpoints": offloaded})
        finished = finetune(2, config)
        assert finished.returncode == 0, finished.stderr
        trained.append(adapter(folder / "output" / "checkpoint-4"))
    assert largest_difference(*trained) == 0


def test_grouping_by_length_puts_rows_of_like_length_into_a_batch(tmp_path, finetune):
    training = {"train_sampling_strategy": "group_by_length", "max_steps": 10}
    finished = finetune(1, write_config(tmp_path, training_args=training))
    assert finished.returncode == 0, finished.stderr
    records = [r for r in read_metrics(tmp_path / "output" / "metrics.jsonl") if "loss" in r]
    tokens = [round(r["tokens_per_second"] * r["step_seconds"]) for r in records]
    # The sampler sorts the rows of two batches at a time, the longest first.
    assert len(set(tokens)) > 2 and all(tokens[i] >= tokens[i + 1] for i in range(0, len(tokens), 2))


def test_a_run_leaves_what_it_promises(single):
    records = read_metrics(single / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    for record in steps:
        for key in ("learning_rate", "grad_norm", "tokens_per_second", "samples_per_second", "step_seconds"):
            assert record[key] >= 0, key
        for key in ("nvml_used_gib", "torch_allocated_gib", "torch_reserved_gib", "resident_gib"):
            assert len(record[key]) == 1, key
        assert record["nvml_used_gib"] == [None] and record["resident_gib"][0] > 0  # no GPU: nothing is made up
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [r["step"] for r in records if "eval_rouge_l" in r] == [2, 4]

    run = json.loads((single / "run.json").read_text())
    assert run["status"] == "finished" and run["world_size"] == 1 and run["machine"]["versions"]["torch"]
    assert "helpers.finetune.train" in run["command"] and run["config"]["max_input_length"] == 96
    assert run["predicted"]["total_gib"] == pytest.approx(sum(run["predicted"]["items_gib"].values()))
    predictions = [json.loads(line) for line in (single / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == run["scores"]["rows"] == 4
    assert {"prompt", "reference", "base", "tuned"} <= predictions[0].keys()
    assert set(run["scores"]["tuned"]) == {"rouge-1", "rouge-2", "rouge-l", "bleu-4"}
    assert (single / "loss_and_memory.png").read_bytes().startswith(b"\x89PNG")
    assert [c.name for c in complete_checkpoints(single)] == ["checkpoint-2", "checkpoint-4"]


def test_published_files_run_unchanged_stop_at_a_signal_and_resume(tmp_path, data_dir, small_checkpoint, rank_server):
    files = (data_dir, small_checkpoint, PUBLISHED / "published_lora.yaml", PUBLISHED / "published_ds_zero_2.json")
    seen = []
    # A process group of its own gets the signal whole, torchrun passes it on to its ranks, and all have data loaders'
    # workers: nobody but the ranks may act.
    with subprocess.Popen(
        torchrun_command(*files, output_dir=tmp_path / "output", nprocs=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ON_THE_CPU | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step 10/3000"):
                os.killpg(process.pid, signal.SIGTERM)
    output = "".join(seen)
    assert "stopped after step" in output, output
    (checkpoint,) = complete_checkpoints(tmp_path / "output")
    stopped_at = int(checkpoint.name.split("-")[1])
    assert 10 <= stopped_at <= 13
    assert json.loads((tmp_path / "output" / "run.json").read_text())["status"] == "interrupted"
    for said in ("evaluation_strategy is called eval_strategy", "LoRA on q_proj, k_proj, v_proj", "seed 42"):
        assert said in output

    refused = rank_server.run(TRAIN, *files, "--output-dir", tmp_path / "output", nprocs=1)
    assert refused.returncode != 0 and "is not empty; continue with --resume" in refused.stderr
    assert complete_checkpoints(tmp_path / "output") == [checkpoint]


@pytest.fixture
def killed_while_saving(tmp_path, single) -> Path:
    """A copy of ``single`` as if it had been killed while it saved its second checkpoint: the configuration."""
    shutil.copytree(single, tmp_path / "output")
    (tmp_path / "output" / "checkpoint-4" / "manifest.json").unlink()
    return write_config(tmp_path, training_args={"per_device_train_batch_size": 8})


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(killed_while_saving, finetune, single):
    output = killed_while_saving.parent / "output"
    resumed = finetune(1, killed_while_saving, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout and "checkpoint-2" in resumed.stdout
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(single / "checkpoint-4")) == 0
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]


def test_a_full_disk_keeps_the_previous_checkpoint(killed_while_saving, finetune):
    output = killed_while_saving.parent / "output"
    shutil.rmtree(output / "checkpoint-4")
    before = adapter(output / "checkpoint-2")
    training = {"per_device_train_batch_size": 8, "eval_strategy": "no"}
    config = write_config(killed_while_saving.parent, training_args=training)
    # No file can grow beyond this: every larger write fails, as on a full disk.
    limit = 8 * 1024
    assert (output / "checkpoint-2" / "adapter_model.safetensors").stat().st_size > limit
    full = finetune(1, config, "--resume", file_bytes=limit)
    lines = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert full.returncode != 0 and len(lines) == 1, full.stderr
    line = lines[0]
    assert "checkpoint-4 could not be written" in line and "checkpoint-2 is complete" in line
    assert not (output / "checkpoint-4").exists()
    assert largest_difference(adapter(output / "checkpoint-2"), before) == 0
    again = finetune(1, config, "--resume")
    assert again.returncode == 0, again.stderr


def test_two_ranks_say_a_mistake_once(tmp_path, data_dir, small_checkpoint):
    bad = tmp_path / "data"
    bad.mkdir()
    lines = (data_dir / "train.json").read_text(encoding="utf-8").splitlines()
    lines[6] = '{"content": "类型#裙"'
    lines[9] = '{"conversations": [{"role": "user", "content": "裙"}]}'
    (bad / "train.json").write_text("\n".join(lines), encoding="utf-8")
    finished = subprocess.run(
        torchrun_command(bad, small_checkpoint, write_config(tmp_path), output_dir=tmp_path / "output", nprocs=2),
        capture_output=True,
        text=True,
        env=os.environ | ON_THE_CPU,
    )
    assert finished.returncode != 0
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert "train.json:7: not JSON" in line and "train.json:10: " in line
    assert not (tmp_path / "output").exists()


COUNT_LAYER_CALLS = """
import sys
from helpers.activations.swiglu import RecomputingMLP  # once per layer; the layer itself is wrapped
from helpers.finetune import train

calls, forward = 0, RecomputingMLP.forward

def counted(self, *args, **kwargs):
    global calls
    calls += self.training
    return forward(self, *args, **kwargs)

RecomputingMLP.forward = counted
train.main(sys.argv[1:])
print("layer calls:", calls)
"""


def test_gradient_checkpointing_really_runs_each_layer_twice(tmp_path, rank_server, data_dir, small_checkpoint):
    script = tmp_path / "count_layer_calls.py"
    script.write_text(COUNT_LAYER_CALLS)
    counts = {}
    for on in (False, True):
        folder = tmp_path / str(on)
        config = write_config(
            folder, training_args={"gradient_checkpointing": on, "eval_strategy": "no", "max_steps": 2}
        )
        # Without torchrun, which is one process, too.
        output = ("--output-dir", folder / "output")
        finished = rank_server.run(script, data_dir, small_checkpoint, config, *output)
        assert finished.returncode == 0, finished.stderr
        counts[on] = int(finished.stdout.rsplit("layer calls:", 1)[1])
        assert max(t.abs().max() for n, t in adapter(folder / "output" / "checkpoint-2").items() if "lora_B" in n) > 0
    assert counts[True] == 2 * counts[False] > 0


WATCH_FOR_WAITING = """
import sys
import torch
from helpers.finetune import train

class Watching(train.Recorder):
    def on_step_begin(self, args, state, control, **kwargs):
        # From the third step to the fifth, with all that happens between them: everything is compiled, nothing logged.
        mode = {2: "error", 4: "default"}.get(state.global_step)
        if mode:
            torch.cuda.set_sync_debug_mode(mode)

train.Recorder = Watching
train.main(sys.argv[1:])
"""


@needs_gpu
@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({}, False),
        ({"speed": {"packing": 400, "compile_layers": True, "loss_chunk": 64}}, False),
        ({"speed": {"offload_checkpoints": True}, "training_args": {"gradient_checkpointing": True}}, False),
        ({"training_args": {"logging_nan_inf_filter": True}}, True),  # so that the test is known to notice
    ],
    ids=["rows", "packs", "layer inputs in host memory", "looking at every loss"],
)
def test_the_host_never_waits_for_the_gpu_between_logs(changes, waits, tmp_path, data_dir, tokenizer):
    model = random_model(small_config(head_dim=64, eos_token_id=tokenizer.stop_token_ids))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain = {"max_steps": 6, "logging_steps": 6, "eval_strategy": "no", "save_strategy": "no"}
    config = write_config(tmp_path, **merged({"training_args": plain}, changes))
    command = [sys.executable, "-c", WATCH_FOR_WAITING, data_dir, tmp_path / "model", config]
    finished = subprocess.run(
        [*map(str, command), "--output-dir", str(tmp_path / "output")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if waits:
        assert finished.returncode != 0 and "called a synchronizing CUDA operation" in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr
