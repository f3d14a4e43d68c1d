"""The fine-tune as users start it: real processes, real DeepSpeed on gloo, equality with one process, bad input."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_chatglm import random_model, small_config

from helpers.assets import TINY_DATA
from helpers.errors import UserError
from helpers.finetune import job
from helpers.finetune.loading import complete_checkpoints
from helpers.finetune.packing import best_fit_packing
from helpers.finetune.ranks import Ranks
from helpers.finetune.recorder import progress_line, read_metrics
from helpers.hardware import Gpu, describe_machine
from helpers.memory.predict.planner import fits
from helpers.memory.units import GIB

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "tests" / "data"
ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, store=None)
STEPS = 4

CONFIG = {
    "data_config": {"train_file": "train.json", "val_file": "dev.json"},
    "max_input_length": 96,
    "max_output_length": 96,
    "max_eval_samples": 4,
    "training_args": {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        # Adam divides by a gradient's size: with the usual 1e-8, the rounding of a tiny one becomes a whole step.
        "adam_epsilon": 1e-3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "predict_with_generate": True,
        "generation_config": {"max_new_tokens": 8},
        "seed": 1,
    },
    "peft_config": {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj"]},
}


def merged(base: dict, changes: dict) -> dict:
    """``base`` with ``changes``, blocks merged."""
    return base | {
        key: merged(base.get(key, {}), value) if isinstance(value, dict) else value for key, value in changes.items()
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Forty rows to train on and six to answer."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train.json", 40), ("dev.json", 6)):
        lines = (TINY_DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def write_config(folder: Path, **changes) -> Path:
    path = folder / "lora.yaml"
    path.write_text(yaml.safe_dump(merged(CONFIG, changes)), encoding="utf-8")
    return path


def command(nprocs: int, *arguments) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nprocs}"]
    return [sys.executable, *torchrun, "-m", "helpers.finetune.train", *map(str, arguments)]


def start(nprocs: int, *arguments, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command(nprocs, *arguments), capture_output=True, text=True, env=environment, **options)


def start_script(script: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    """``script``, which changes something of the job before it starts it, without torchrun."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and all(a[name].numel() for name in a)
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def single(tmp_path_factory, data_dir, small_checkpoint) -> Path:
    """Output folder of one process that sees, in each step, the rows that two ranks see together."""
    folder = tmp_path_factory.mktemp("single")
    config = write_config(folder, training_args={"per_device_train_batch_size": 8})
    finished = start(1, data_dir, small_checkpoint, config, "--output-dir", folder / "output")
    assert finished.returncode == 0, finished.stderr
    return folder / "output"


@pytest.mark.parametrize("deepspeed", [None, "ds_zero_2.json", "ds_zero_3.json"])
def test_two_ranks_train_what_one_process_trains(deepspeed, tmp_path, data_dir, small_checkpoint, single):
    config = write_config(tmp_path)
    file = [ROOT / "configs" / deepspeed] if deepspeed else []
    finished = start(2, data_dir, small_checkpoint, config, *file, "--output-dir", tmp_path / "output")
    assert finished.returncode == 0, finished.stderr
    for n in (2, 4):
        name = f"checkpoint-{n}"
        assert largest_difference(adapter(tmp_path / "output" / name), adapter(single / name)) < 1e-6
    losses = [
        [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
        for folder in (tmp_path / "output", single)
    ]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("deepspeed", [None, "ds_zero_2.json"])
def test_two_ranks_with_packs_train_what_one_process_does_with_padded_rows(
    deepspeed, tmp_path, data_dir, small_checkpoint
):
    def train(name: str, nprocs: int, batch: int, *file: Path, **changes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        training = {"per_device_train_batch_size": batch, "eval_steps": 4}
        config = write_config(folder, training_args=training, **changes)
        finished = start(nprocs, data_dir, small_checkpoint, config, *file, "--output-dir", folder / "output")
        assert finished.returncode == 0, finished.stderr
        return folder / "output"

    rows = prepare(data_dir, small_checkpoint, write_config(tmp_path)).data.train
    lengths = list(map(len, rows["input_ids"][:]))
    # As many packs on each rank: where they do not divide, one of them would be trained on twice.
    capacity, packs = next((c, n) for c in range(400, 900) if (n := len(best_fit_packing(lengths, c, seed=1))) % 2 == 0)
    file = [ROOT / "configs" / deepspeed] if deepspeed else []
    speed = {"packing": capacity, "loss_chunk": 100}
    packed = train("packed", 2, packs // 2, *file, speed=speed)
    padded = train("padded", 1, len(rows))
    # Every step sees all rows, whatever their order.
    assert largest_difference(adapter(packed / "checkpoint-4"), adapter(padded / "checkpoint-4")) < 1e-5
    found, expected = ([r for r in read_metrics(f / "metrics.jsonl") if "loss" in r] for f in (packed, padded))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=1e-5)
    rates = [r["samples_per_second"] / r["tokens_per_second"] for r in (*found, *expected)]
    assert rates == pytest.approx([len(lengths) / sum(lengths)] * len(rates))  # padding is no token, a pack many rows


def test_layer_inputs_in_host_memory_change_nothing(tmp_path, data_dir, small_checkpoint):
    training = {"gradient_checkpointing": True, "eval_strategy": "no"}
    trained = []
    for offloaded in (False, True):
        folder = tmp_path / str(offloaded)
        folder.mkdir()
        config = write_config(folder, training_args=training, speed={"offload_checkpoints": offloaded})
        finished = start(2, data_dir, small_checkpoint, config, "--output-dir", folder / "output")
        assert finished.returncode == 0, finished.stderr
        trained.append(adapter(folder / "output" / "checkpoint-4"))
    assert largest_difference(*trained) == 0


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_checkpointing_is_decided_with_the_mask_that_an_old_card_needs(
    capability, monkeypatch, tmp_path, data_dir, small_checkpoint
):
    asked = []
    monkeypatch.setattr(
        job, "fits", lambda configuration, size: asked.append(configuration) or fits(configuration, size)
    )
    card = Gpu("a card", 16 * GIB, capability)
    monkeypatch.setattr(job, "describe_machine", lambda: dataclasses.replace(describe_machine(), gpus=(card,)))
    prepare(data_dir, small_checkpoint, write_config(tmp_path, training_args={"gradient_checkpointing": "auto"}))
    (configuration,) = asked
    assert configuration.masked == (capability < (8, 0))


@pytest.mark.parametrize(("gib", "wanted"), [(80, False), (0.5, True), (None, False)])
def test_checkpointing_is_turned_on_where_the_card_needs_it(
    gib, wanted, monkeypatch, tmp_path, data_dir, small_checkpoint
):
    gpus = () if gib is None else (Gpu("a card", int(gib * GIB), (9, 0)), Gpu("a larger one", 2**40, (9, 0)))
    monkeypatch.setattr(job, "describe_machine", lambda: dataclasses.replace(describe_machine(), gpus=gpus))
    prepared = prepare(
        data_dir, small_checkpoint, write_config(tmp_path, training_args={"gradient_checkpointing": "auto"})
    )
    assert prepared.config.checkpointing is wanted
    (note,) = [note for note in prepared.notes if note.startswith("gradient_checkpointing auto")]
    assert str(wanted).lower() in note and ("GiB predicted" in note) == (gib is not None)


def test_grouping_by_length_puts_rows_of_like_length_into_a_batch(tmp_path, data_dir, small_checkpoint):
    config = write_config(tmp_path, training_args={"train_sampling_strategy": "group_by_length", "max_steps": 10})
    finished = start(1, data_dir, small_checkpoint, config, "--output-dir", tmp_path / "output")
    assert finished.returncode == 0, finished.stderr
    records = [r for r in read_metrics(tmp_path / "output" / "metrics.jsonl") if "loss" in r]
    tokens = [round(r["tokens_per_second"] * r["step_seconds"]) for r in records]
    assert len(set(tokens)) > 2 and max(tokens) == tokens[0]  # the sampler begins with the longest rows


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
    predictions = [json.loads(line) for line in (single / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == run["scores"]["rows"] == 4
    assert {"prompt", "reference", "base", "tuned"} <= predictions[0].keys()
    assert set(run["scores"]["tuned"]) == {"rouge-1", "rouge-2", "rouge-l", "bleu-4"}
    assert (single / "loss_and_memory.png").read_bytes().startswith(b"\x89PNG")
    assert [c.name for c in complete_checkpoints(single)] == ["checkpoint-2", "checkpoint-4"]


def test_published_files_run_unchanged_stop_at_ctrl_c_and_resume(tmp_path, data_dir, small_checkpoint):
    files = (data_dir, small_checkpoint, PUBLISHED / "published_lora.yaml", PUBLISHED / "published_ds_zero_2.json")
    arguments = (*files, "--output-dir", tmp_path / "output")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    seen = []
    # A process group of its own, which gets the signal whole, as it does from a terminal.
    with subprocess.Popen(
        command(2, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step 10/3000"):
                os.killpg(process.pid, signal.SIGINT)
    output = "".join(seen)
    assert "stopped after step" in output, output
    (checkpoint,) = complete_checkpoints(tmp_path / "output")
    stopped_at = int(checkpoint.name.split("-")[1])
    assert 10 <= stopped_at <= 13
    assert json.loads((tmp_path / "output" / "run.json").read_text())["status"] == "interrupted"
    for said in ("evaluation_strategy is called eval_strategy", "LoRA on q_proj, k_proj, v_proj", "seed 42"):
        assert said in output

    refused = start(1, *arguments)
    assert refused.returncode != 0 and "is not empty; continue with --resume" in refused.stderr
    assert complete_checkpoints(tmp_path / "output") == [checkpoint]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, data_dir, small_checkpoint, single):
    output = tmp_path / "output"
    config = write_config(tmp_path, training_args={"per_device_train_batch_size": 8})
    half = start(1, data_dir, small_checkpoint, config, "--output-dir", output)
    assert half.returncode == 0, half.stderr
    # As if it had been killed while it saved its second checkpoint.
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = start(1, data_dir, small_checkpoint, config, "--output-dir", output, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout and "checkpoint-2" in resumed.stdout
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(single / "checkpoint-4")) == 0
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, data_dir, small_checkpoint, single):
    output = tmp_path / "output"
    config = write_config(tmp_path, training_args={"max_steps": 2, "eval_strategy": "no"})
    first = start(1, data_dir, small_checkpoint, config, "--output-dir", output)
    assert first.returncode == 0, first.stderr
    before = adapter(output / "checkpoint-2")
    config = write_config(tmp_path, training_args={"eval_strategy": "no"})
    # No file can grow beyond this: every larger write fails, as on a full disk.
    limit = 8 * 1024
    assert (output / "checkpoint-2" / "adapter_model.safetensors").stat().st_size > limit
    full = start(
        1,
        *(data_dir, small_checkpoint, config, "--output-dir", output, "--resume"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.returncode != 0
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert "checkpoint-4 could not be written" in line and "checkpoint-2 is complete" in line
    assert not (output / "checkpoint-4").exists()
    assert largest_difference(adapter(output / "checkpoint-2"), before) == 0
    again = start(1, data_dir, small_checkpoint, config, "--output-dir", output, "--resume")
    assert again.returncode == 0, again.stderr


def test_two_ranks_say_a_mistake_once(tmp_path, data_dir, small_checkpoint):
    bad = tmp_path / "data"
    bad.mkdir()
    lines = (data_dir / "train.json").read_text(encoding="utf-8").splitlines()
    lines[6] = '{"content": "类型#裙"'
    lines[9] = '{"conversations": [{"role": "user", "content": "裙"}]}'
    (bad / "train.json").write_text("\n".join(lines), encoding="utf-8")
    finished = start(2, bad, small_checkpoint, write_config(tmp_path), "--output-dir", tmp_path / "output")
    assert finished.returncode != 0
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert "train.json:7: not JSON" in line and "train.json:10: " in line
    assert not (tmp_path / "output").exists()


def prepare(data_dir: Path, model_dir: Path, config: Path, deepspeed=None, *, resume=False, ranks=ONE_RANK) -> job.Job:
    output = config.parent / "output"
    return job.prepare(data_dir, str(model_dir), config, deepspeed, output_dir=output, resume=resume, ranks=ranks)


def test_bad_input_is_one_line_before_a_weight_is_loaded(tmp_path, data_dir, small_checkpoint, monkeypatch):
    config = write_config(tmp_path)

    def refused(*arguments, **options) -> str:
        with pytest.raises(UserError) as caught:
            prepare(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refused(data_dir, empty, config)
    assert "train.json does not exist" in refused(empty, small_checkpoint, config)
    assert "is no folder" in refused(data_dir, tmp_path / "nowhere", config)
    contradictory = tmp_path / "ds.json"
    contradictory.write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}')
    message = refused(data_dir, small_checkpoint, config, contradictory)
    assert "train_micro_batch_size_per_gpu is 2 but per_device_train_batch_size is 4" in message
    packed = write_config(empty, speed={"packing": 60})
    assert "packing 60 is shorter than the longest row of 1" in refused(data_dir, small_checkpoint, packed)
    compiled = write_config(empty, speed={"compile_layers": True})
    message = refused(data_dir, small_checkpoint, compiled, ROOT / "configs" / "ds_zero_3.json")
    assert "compile_layers does not work with ZeRO-3" in message
    assert "holds no finished checkpoint" in refused(data_dir, small_checkpoint, config, resume=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    four = Ranks(rank=0, local_rank=0, world_size=4, local_world_size=4, store=None)
    assert "--nproc_per_node=2" in refused(data_dir, small_checkpoint, config, ranks=four)


def test_a_6b_vocabulary_with_another_tokenizer_is_a_warning_in_one_line(tmp_path, data_dir, tokenizer):
    folder = tmp_path / "model"
    random_model(small_config(vocab_size=65024, hidden_size=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prepared = prepare(data_dir, folder, write_config(tmp_path))
    (note,) = [note for note in prepared.notes if note.startswith("warning:")]
    assert "tokenizer.model is not the tokenizer published with ChatGLM3-6B" in note and "\n" not in note


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_any_number_of_dev_rows_will_do(rows, tmp_path, data_dir, small_checkpoint):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_bytes((data_dir / "train.json").read_bytes())
    if rows:
        lines = (data_dir / "dev.json").read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / "dev.json").write_text("".join(lines), encoding="utf-8")
    prepared = prepare(folder, small_checkpoint, write_config(tmp_path))
    if rows is None:
        assert prepared.data.dev is None and any("evaluation is skipped" in note for note in prepared.notes)
    else:
        assert len(prepared.data.dev) == len(prepared.data.answers) == rows


COUNT_LAYER_CALLS = """
import sys
from transformers.models.glm.modeling_glm import GlmMLP  # once a layer; the layer itself is wrapped
from helpers.finetune import train

calls, forward = 0, GlmMLP.forward

def counted(self, *args, **kwargs):
    global calls
    calls += self.training
    return forward(self, *args, **kwargs)

GlmMLP.forward = counted
train.main(sys.argv[1:])
print("layer calls:", calls)
"""


def test_gradient_checkpointing_really_runs_each_layer_twice(tmp_path, data_dir, small_checkpoint):
    counts = {}
    for on in (False, True):
        folder = tmp_path / str(on)
        folder.mkdir()
        config = write_config(
            folder, training_args={"gradient_checkpointing": on, "eval_strategy": "no", "max_steps": 2}
        )
        # Without torchrun, which is one process, too.
        arguments = [data_dir, small_checkpoint, config, "--output-dir", folder / "output"]
        finished = start_script(COUNT_LAYER_CALLS, *arguments, CUDA_VISIBLE_DEVICES="")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
    finished = start_script(
        WATCH_FOR_WAITING, data_dir, tmp_path / "model", config, "--output-dir", tmp_path / "output"
    )
    if waits:
        assert finished.returncode != 0 and "called a synchronizing CUDA operation" in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr


def test_the_progress_line_tells_loss_speed_memory_and_time_left():
    record = {"step": 10, "loss": 3.4212, "learning_rate": 5e-5, "grad_norm": 0.5, "tokens_per_second": 12345.6}
    record |= {"nvml_used_gib": [17.23, 16.9], "resident_gib": [3.0, 3.0]}
    line = progress_line(record, max_steps=3000, seconds_left=3725)
    for part in ("step 10/3000", "loss 3.421", "12,346 tokens/s", "NVML 17.2 / 16.9 GiB", "1:02:05 left"):
        assert part in line
    on_cpu = progress_line(record | {"nvml_used_gib": [None, None]}, 3000, None)
    assert "resident 3.0 / 3.0 GiB" in on_cpu and "NVML" not in on_cpu
