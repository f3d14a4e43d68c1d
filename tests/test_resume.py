"""Resume: a damaged checkpoint is left out, another training is refused in one line, hosts agree on where to go on."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_chatglm import random_model, small_config
from small_finetune import (
    ONE_RANK,
    ROOT,
    TRAIN,
    adapter,
    largest_difference,
    merged,
    prepare,
    write_config,
    write_rows,
)
from transformers import TrainingArguments

from helpers.errors import UserError
from helpers.finetune import train
from helpers.finetune.checkpoints import complete_checkpoints, describe_files, read_manifest, write_manifest
from helpers.finetune.loading import find_checkpoint
from helpers.finetune.ranks import ALL_ARRIVED, FAILED, Ranks
from helpers.finetune.recorder import read_metrics
from helpers.finetune.resume import agree_on_facts, resume_point
from helpers.finetune.same_training import _FREE, _changed, weights_sample
from helpers.memory.phases import PhaseLog, read_phases

ZERO_2, ZERO_3 = (ROOT / "configs" / f"ds_zero_{stage}.json" for stage in (2, 3))
QUICK = {"training_args": {"eval_strategy": "no", "use_cpu": True}, "max_eval_samples": 1}
TWO_RANKS = dataclasses.replace(ONE_RANK, world_size=2, local_world_size=2)
pytestmark = pytest.mark.slow  # each test needs the run


@pytest.fixture(scope="module")
def train_here(data_dir, small_checkpoint):
    """Train in this process, in the folder of a configuration."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "draw_figures", lambda *_: None)
        monkeypatch.setattr(train.StopOnSignal, "install", lambda self: None)
        monkeypatch.setattr(train, "quiet_libraries", lambda: None)

        def run(config: Path, *arguments: str) -> Path:
            output = config.parent / "output"
            train.main([str(data_dir), str(small_checkpoint), str(config), *arguments, "--output-dir", str(output)])
            return output

        yield run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train_here) -> Path:
    """Output folder of a run of one process: checkpoint-2 and checkpoint-4."""
    return train_here(write_config(tmp_path_factory.mktemp("finished"), **QUICK))


@pytest.fixture(scope="module")
def finished_zero_2(tmp_path_factory, rank_server, data_dir, small_checkpoint) -> Path:
    """Output folder of a run on two ranks under ZeRO-2."""
    folder = tmp_path_factory.mktemp("finished_zero_2")
    config = write_config(folder, **QUICK)
    output = folder / "output"
    launched = rank_server.run(TRAIN, data_dir, small_checkpoint, config, ZERO_2, "--output-dir", output, nprocs=2)
    assert launched.returncode == 0, launched.stderr
    return output


@pytest.fixture
def resume(tmp_path, data_dir, small_checkpoint, monkeypatch):
    """Prepare to resume a copy of a run after ``damage``, with ``changes`` to its configuration."""

    def run(of: Path, *, changes=None, deepspeed=None, ranks=ONE_RANK, damage=None, data=data_dir, model=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # the ranks are not started
        shutil.copytree(of, tmp_path / "output")
        if damage:
            damage(tmp_path / "output")
        config = write_config(tmp_path, **merged(QUICK, changes or {}))
        return prepare(data, model or small_checkpoint, config, deepspeed, resume=True, ranks=ranks)

    return run


def cut(name: str, size: int):
    return lambda output: (output / "checkpoint-4" / name).write_bytes(
        (output / "checkpoint-4" / name).read_bytes()[:size]
    )


def remove(name: str):
    return lambda output: (output / "checkpoint-4" / name).unlink()


def change(name: str, at: int, to: bytes):
    def damage(output: Path) -> None:
        with (output / "checkpoint-4" / name).open("r+b") as file:
            file.seek(at, 2 if at < 0 else 0)
            file.write(to)

    return damage


DAMAGES = {
    "empty state": (cut("trainer_state.json", 0), "trainer_state.json has 0 bytes"),
    "half a state": (cut("trainer_state.json", 300), "trainer_state.json has 300 bytes"),
    "short optimizer": (cut("optimizer.pt", 1000), "optimizer.pt has 1,000 bytes"),
    "short random state": (cut("rng_state.pth", 1000), "rng_state.pth has 1,000 bytes"),
    "empty adapter": (cut("adapter_model.safetensors", 0), "adapter_model.safetensors has 0 bytes"),
    "empty adapter configuration": (cut("adapter_config.json", 0), "adapter_config.json has 0 bytes"),
    "no optimizer": (remove("optimizer.pt"), "optimizer.pt is missing"),
    "no schedule": (remove("scheduler.pt"), "scheduler.pt is missing"),
    "no random state": (remove("rng_state.pth"), "rng_state.pth is missing"),
    "no adapter": (remove("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
    "a flipped bit": (change("adapter_model.safetensors", -1, b"\x01"), "adapter_model.safetensors is not what"),
    "zeros": (change("optimizer.pt", 2000, bytes(500)), "optimizer.pt is not what was written"),
    "not finished": (remove("manifest.json"), "checkpoint-4 was not finished"),
    "empty manifest": (cut("manifest.json", 0), "manifest.json is not JSON"),
    "another manifest": (lambda o: (o / "checkpoint-4" / "manifest.json").write_text("{}"), "not the manifest"),
    "a list as manifest": (lambda o: (o / "checkpoint-4" / "manifest.json").write_text('{"files": []}'), "not the man"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_with_a_note(name, finished, resume):
    damage, said = DAMAGES[name]
    job = resume(finished, damage=damage)
    assert job.resume_from.name == "checkpoint-2"
    (note,) = [note for note in job.notes if "is left out" in note]
    assert "checkpoint-4 is left out: " in note and said in note and "\n" not in note
    assert any(note.startswith("resuming from") and note.endswith("checkpoint-2") for note in job.notes)


def test_without_damage_the_newest_checkpoint_is_used_and_nothing_is_noted(finished, resume):
    def edit_the_card(output: Path) -> None:
        (output / "checkpoint-4" / "README.md").write_text("my model")
        (output / "checkpoint-4" / "notes.txt").write_text("more")

    job = resume(finished, damage=edit_the_card)
    assert job.resume_from.name == "checkpoint-4" and not any("left out" in note for note in job.notes)


def test_if_every_checkpoint_is_damaged_each_reason_is_in_the_line(finished, resume):
    def damage(output: Path) -> None:
        (output / "checkpoint-2" / "optimizer.pt").unlink()
        (output / "checkpoint-4" / "manifest.json").unlink()

    with pytest.raises(UserError, match=r"no finished checkpoint \(.*checkpoint-4 was not.*; .*optimizer.pt is m"):
        resume(finished, damage=damage)


def test_a_run_resumed_after_damage_ends_where_the_first_one_did(tmp_path, finished, train_here):
    shutil.copytree(finished, tmp_path / "output")
    cut("trainer_state.json", 0)(tmp_path / "output")
    metrics = tmp_path / "output" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    phases = tmp_path / "output" / "phases-000.jsonl"
    phases.write_bytes(phases.read_bytes()[:-20])
    (tmp_path / "output" / "checkpoint-4" / "rng_state_7.pth").write_bytes(b"of an earlier try")
    output = train_here(write_config(tmp_path, **QUICK), "--resume")
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(finished / "checkpoint-4")) == 0
    logged = [[(r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")] for run in (output, finished)]
    assert logged[0] == logged[1] and len(logged[0]) == 4
    assert {"load model", "train"} <= {phase.name for phase in read_phases([phases])}
    assert not (output / "checkpoint-4" / "rng_state_7.pth").exists()
    assert complete_checkpoints(output)[-1].name == "checkpoint-4"


def test_a_run_of_deepspeed_resumed_after_damage_ends_where_the_first_one_did(
    tmp_path, finished_zero_2, rank_server, data_dir, small_checkpoint
):
    output = shutil.copytree(finished_zero_2, tmp_path / "output")
    shutil.rmtree(output / "checkpoint-4" / "global_step4")
    config = write_config(tmp_path, **QUICK)
    files = (data_dir, small_checkpoint, config, ZERO_2)
    resumed = rank_server.run(TRAIN, *files, "--output-dir", output, "--resume", nprocs=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-4 is left out" in resumed.stdout and "resuming from" in resumed.stdout
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(finished_zero_2 / "checkpoint-4")) == 0
    losses = [[r["loss"] for r in read_metrics(run / "metrics.jsonl")] for run in (output, finished_zero_2)]
    assert losses[0] == losses[1]


def test_zero_2_of_two_ranks_goes_on_with_one(tmp_path, finished_zero_2, rank_server, data_dir, small_checkpoint):
    output = shutil.copytree(finished_zero_2, tmp_path / "output")
    shutil.rmtree(output / "checkpoint-4")
    config = write_config(tmp_path, **merged(QUICK, {"training_args": {"per_device_train_batch_size": 8}}))
    files = (data_dir, small_checkpoint, config, ZERO_2)
    resumed = rank_server.run(TRAIN, *files, "--output-dir", output, "--resume", nprocs=1)
    assert resumed.returncode == 0, resumed.stderr
    assert "has 8 rows on each of 1 rank(s), and had 4 on 2" in resumed.stdout
    assert largest_difference(adapter(output / "checkpoint-4"), adapter(finished_zero_2 / "checkpoint-4")) < 1e-6


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda o: shutil.rmtree(o / "checkpoint-4" / "global_step4"), "_states.pt is missing"),
        (lambda o: next((o / "checkpoint-4").rglob("*rank_1_*optim_states.pt")).unlink(), "optim_states.pt is missing"),
        (remove("rng_state_1.pth"), "rng_state_1.pth is missing"),
        (cut("latest", 0), "latest has 0 bytes"),
        (change("global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", 900, bytes(50)), "is not what was written"),
    ],
)
def test_a_damaged_checkpoint_of_deepspeed_is_left_out(damage, said, finished_zero_2, resume):
    job = resume(finished_zero_2, deepspeed=ZERO_2, ranks=TWO_RANKS, damage=damage)
    assert job.resume_from.name == "checkpoint-2"
    assert any(said in note for note in job.notes)


OTHER_ADAPTERS = {
    "alpha": ({"peft_config": {"lora_alpha": 8}}, r"with lora_alpha 16, but .*yaml has 8"),
    "r": ({"peft_config": {"r": 8}}, r"with r 4, but .*yaml has 8; resume with the same, or start fresh"),
    "targets": (
        {"peft_config": {"target_modules": ["q_proj"]}},
        r'target_modules \["q_proj", .*but .* has \["q_proj"\]',
    ),
    "two": ({"peft_config": {"r": 8, "lora_alpha": 8}}, r"with lora_alpha 16, r 4, but .* has 8, 8;"),
    "bits": ({"quantization_bit": 8}, r"with quantization_bit none, but .*yaml has 8"),
    "optimizer": ({"training_args": {"optim": "sgd"}}, r"with optim adamw_torch\w*, but .*yaml has sgd"),
    "plateau": ({"training_args": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, r"lr_scheduler_type linear, but"),
}


@pytest.mark.parametrize("name", OTHER_ADAPTERS)
def test_what_the_states_do_not_fit_is_refused_in_one_line(name, finished, resume):
    changes, said = OTHER_ADAPTERS[name]
    with pytest.raises(UserError, match=said) as caught:
        resume(finished, changes=changes)
    assert "another --output-dir" in str(caught.value) and "\n" not in str(caught.value)


OTHER_SETTINGS = {
    "learning_rate": ({"training_args": {"learning_rate": 1e-3}}, "learning_rate is 0.001, and was 0.01: used from"),
    "a default": ({"training_args": {"weight_decay": 0.1}}, "weight_decay is 0.1, and was 0.0: used from here on"),
    "seed": ({"training_args": {"seed": 2}}, "seed is 2, and was 1: rows come in another order from here on"),
    "dropout": ({"peft_config": {"lora_dropout": 0.1}}, "lora_dropout is 0.1, and was 0.0: used from here on"),
    "accumulation": (
        {"training_args": {"gradient_accumulation_steps": 2}},
        "the 4 steps until here count as 32 rows instead of 16, so some rows are left out",
    ),
    "batch": ({"training_args": {"per_device_train_batch_size": 2}}, "8 rows instead of 16, so some rows are trained"),
    "length": ({"max_input_length": 80}, "max_input_length is 80, and was 96: used from here on"),
    "packing": ({"speed": {"packing": 256}}, "packing is 256, and was none: used from here on"),
    **{
        name: ({"training_args": {name: value}}, f"{name} is {shown}, and was {before}: used from here on")
        for name, value, shown, before in (
            ("tf32", False, "false", "none"),
            ("full_determinism", True, "true", "false"),
            ("ddp_bucket_cap_mb", 1, "1", "none"),
            ("ddp_backend", "gloo", "gloo", "none"),
            ("gradient_checkpointing_kwargs", {"preserve_rng_state": False}, '{"preserve_rng_state": false}', "none"),
        )
    },
    **{
        name: ({"speed": {name: value}}, f"{name} is {shown}, and was {before}: used from here on")
        for name, value, shown, before in (
            ("loss_chunk", 64, "64", "1024"),
            ("padding_mask", True, "true", "false"),
            ("compile_layers", True, "true", "false"),
        )
    },
    "skip": ({"training_args": {"ignore_data_skip": True}}, "rows come from the beginning of the epoch's order again"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_one_line_each(name, finished, resume):
    changes, said = OTHER_SETTINGS[name]
    job = resume(finished, changes=changes)
    assert job.resume_from.name == "checkpoint-4"
    assert len([note for note in job.notes if said in note]) == 1


DEEPSPEED_FILES = {
    "communication_data_type": ("fp32", "communication_data_type is fp32, and was none: used from here on"),
    "prescale_gradients": (True, "prescale_gradients is true, and was none: used from here on"),
    "data_types": ({"grad_accum_dtype": "fp32"}, 'data_types is {"grad_accum_dtype": "fp32"}, and was none: used from'),
    "fp16": (
        {"enabled": "auto", "hysteresis": 3},
        'fp16 of the DeepSpeed file is {"hysteresis": 3}, and was {"',
    ),
    "scheduler": ({"type": "WarmupLR", "params": {}}, r"with scheduler none, but .* has {.*WarmupLR.*}; resume with"),
}


@pytest.mark.parametrize("key", DEEPSPEED_FILES)
def test_what_a_deepspeed_file_changes_in_numbers_is_said(key, tmp_path, finished_zero_2, resume):
    value, said = DEEPSPEED_FILES[key]
    (tmp_path / "ds.json").write_text(json.dumps(json.loads(ZERO_2.read_text()) | {key: value}))
    if key == "scheduler":
        with pytest.raises(UserError, match=said):
            resume(finished_zero_2, deepspeed=tmp_path / "ds.json", ranks=TWO_RANKS)
    else:
        job = resume(finished_zero_2, deepspeed=tmp_path / "ds.json", ranks=TWO_RANKS)
        assert len([note for note in job.notes if said in note]) == 1


def test_a_schedule_that_follows_the_evaluation_makes_its_options_part_of_the_training():
    base = {
        **{key: {} for key in ("settings", "deepspeed", "peft_config")},
        **{"world_size": 1, "micro_batch_size": 1, "rows_per_step": 1, "zero_stage": None, "precision": "fp32"},
    }
    changed = {"eval_steps": 3, "metric_for_best_model": "rouge_l"}
    for name, wanted in (("linear", []), ("reduce_lr_on_plateau", ["eval_steps", "metric_for_best_model"])):
        facts = [base | {"training_args": {"lr_scheduler_type": name} | more} for more in ({}, changed)]
        assert [key for key, _, _ in _changed(*facts)] == wanted


def test_every_option_that_may_change_without_a_word_is_one_of_the_trainer():
    assert not _FREE - {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    "training",
    [
        {"eval_strategy": "steps", "eval_steps": 1, "predict_with_generate": True},
        {"dataloader_num_workers": 1},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": False},
    ],
)
def test_evaluations_and_workers_leave_the_numbers_of_dropout_alone(training, tmp_path, train_here, with_dropout):
    changes = {"training_args": training | {"max_steps": 12}, "peft_config": {"lora_dropout": 0.3}}
    output = train_here(write_config(tmp_path, **merged(QUICK, changes)))
    losses = [[r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] for run in (output, with_dropout)]
    assert losses[0] == losses[1] and len(losses[0]) == 12  # two epochs


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory, train_here) -> Path:
    """Output folder of a run that drops values."""
    changes = {"training_args": {"max_steps": 12}, "peft_config": {"lora_dropout": 0.3}}
    return train_here(write_config(tmp_path_factory.mktemp("with_dropout"), **merged(QUICK, changes)))


def test_a_changed_learning_rate_is_used(tmp_path, finished, train_here):
    output = shutil.copytree(finished, tmp_path / "output")
    shutil.rmtree(output / "checkpoint-4")
    train_here(write_config(tmp_path, **merged(QUICK, {"training_args": {"learning_rate": 1e-3}})), "--resume")
    rates = {record["step"]: record["learning_rate"] for record in read_metrics(output / "metrics.jsonl")}
    before = {record["step"]: record["learning_rate"] for record in read_metrics(finished / "metrics.jsonl")}
    assert rates[2] == before[2]
    assert [rates[step] for step in (3, 4)] == pytest.approx([before[step] / 10 for step in (3, 4)])


def test_a_changed_learning_rate_is_used_with_deepspeed_s_optimizer(tmp_path, rank_server, data_dir, small_checkpoint):
    content = json.loads(ZERO_2.read_text()) | {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    rates = {}
    for rate, flags in ((1e-2, []), (1e-3, ["--resume"])):
        config = write_config(tmp_path, **merged(QUICK, {"training_args": {"learning_rate": rate}}))
        files = (data_dir, small_checkpoint, config, tmp_path / "ds.json", "--output-dir", tmp_path / "output")
        done = rank_server.run(TRAIN, *files, *flags, nprocs=1)
        assert done.returncode == 0, done.stderr
        rates[rate] = {r["step"]: r["learning_rate"] for r in read_metrics(tmp_path / "output" / "metrics.jsonl")}
        shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    assert "learning_rate is 0.001, and was 0.01: used from here on" in done.stdout
    assert [rates[1e-3][step] for step in (3, 4)] == pytest.approx([rates[1e-2][step] / 10 for step in (3, 4)])


@pytest.mark.parametrize(
    "training",
    [
        {"logging_steps": 2, "save_steps": 1, "save_total_limit": 3, "dataloader_num_workers": 1},
        {"weight_decay": 0.0, "gradient_accumulation_steps": 1, "eval_strategy": "steps", "report_to": "none"},
        {"gradient_checkpointing": True, "per_device_eval_batch_size": 1},
    ],
)
def test_what_does_not_change_the_training_may_change(training, finished, resume):
    job = resume(finished, changes={"training_args": training, "peft_config": {"lora_dropout": 0}})
    assert job.resume_from.name == "checkpoint-4"


def test_a_run_may_be_made_longer_with_a_note(finished, resume):
    job = resume(finished, changes={"training_args": {"max_steps": 6}})
    (note,) = [note for note in job.notes if note.startswith("max_steps is 6, and was 4")]
    assert "schedule of the new length" in note


def test_the_same_rows_on_other_ranks_are_a_note(finished, resume):
    job = resume(finished, ranks=TWO_RANKS, changes={"training_args": {"per_device_train_batch_size": 2}})
    assert any("has 2 rows on each of 2 rank(s), and had 4 on 1" in note for note in job.notes)


@pytest.mark.parametrize("count", [2, 3])
def test_other_rows_per_step_are_a_note(count, finished, resume):
    job = resume(finished, ranks=dataclasses.replace(ONE_RANK, world_size=count, local_world_size=count))
    assert any(f"a step has {4 * count} rows ({count} ranks), and had 4 (1 ranks)" in note for note in job.notes)


@pytest.mark.parametrize(
    ("deepspeed", "ranks", "said"),
    [
        (ZERO_3, TWO_RANKS, r"under DeepSpeed ZeRO-2, but this job runs under DeepSpeed ZeRO-3; give .* stage 2"),
        (None, TWO_RANKS, r"under DeepSpeed ZeRO-2, but this job runs without DeepSpeed; give .* stage 2"),
    ],
)
def test_another_strategy_is_refused(deepspeed, ranks, said, finished_zero_2, resume):
    with pytest.raises(UserError, match=said):
        resume(finished_zero_2, deepspeed=deepspeed, ranks=ranks)


def test_deepspeed_after_a_run_without_it_is_refused(finished, resume):
    with pytest.raises(UserError, match=r"without DeepSpeed, but this job runs under .* leave the DeepSpeed file out"):
        resume(finished, deepspeed=ZERO_2)


def test_another_base_of_the_same_shape_is_refused(tmp_path, finished, resume, tokenizer):
    other = tmp_path / "other"
    torch.manual_seed(99)
    random_model(small_config(eos_token_id=tokenizer.stop_token_ids), seed=99).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"was trained with another base model; give the same one"):
        resume(finished, model=other)


def test_a_base_that_has_moved_is_the_same(tmp_path, finished, resume, small_checkpoint):
    moved = shutil.copytree(small_checkpoint, tmp_path / "moved")
    assert weights_sample(moved) == weights_sample(small_checkpoint)
    assert resume(finished, model=moved).resume_from.name == "checkpoint-4"


def test_other_data_are_a_note(tmp_path, finished, resume):
    (tmp_path / "fewer").mkdir()
    fewer = write_rows(tmp_path / "fewer", train=20, dev=6)
    job = resume(finished, data=fewer)
    assert any("train_file has other contents than before: training goes on" in note for note in job.notes)


def test_a_checkpoint_without_optimizer_cannot_be_resumed(tmp_path, train_here, resume):
    training = {"max_steps": 2, "save_only_model": True}
    output = train_here(write_config(tmp_path / "model_only", **merged(QUICK, {"training_args": training})))
    with pytest.raises(UserError, match=r"checkpoint-2 has no optimizer state .*remove save_only_model"):
        resume(output, changes={"training_args": training})


def test_a_manifest_of_another_version_is_told(finished, resume):
    def damage(output: Path) -> None:
        checkpoint = output / "checkpoint-4"
        write_manifest(checkpoint, read_manifest(checkpoint)[0], {"world_size": 1})

    with pytest.raises(UserError, match="of another version of this job"):
        resume(finished, damage=damage)


def test_older_checkpoints_go_only_when_the_newest_is_complete(tmp_path, train_here, monkeypatch):
    training = {"save_total_limit": 1}
    config = write_config(tmp_path, **merged(QUICK, {"training_args": training}))
    seen = []

    def watched(checkpoint: Path, *arguments: object) -> None:
        seen.append([path.name for path in sorted(checkpoint.parent.glob("checkpoint-*"))])
        write_manifest(checkpoint, *arguments)

    monkeypatch.setattr("helpers.finetune.trainer.write_manifest", watched)
    output = train_here(config)
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]


def test_an_adapter_that_is_damaged_is_not_answered_with(tmp_path, finished, capsys):
    output = shutil.copytree(finished, tmp_path / "output")
    remove("optimizer.pt")(output)  # which an answer does not need
    assert find_checkpoint(output).name == "checkpoint-4"
    change("adapter_model.safetensors", -1, b"\x01")(output)
    assert find_checkpoint(output).name == "checkpoint-2"
    assert "checkpoint-4 is left out: adapter_model.safetensors is not what" in capsys.readouterr().err
    remove("manifest.json")(output)
    assert find_checkpoint(output).name == "checkpoint-2" and not capsys.readouterr().err
    (output / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(UserError, match="checkpoint-4 was not finished, name it to use it as it is"):
        find_checkpoint(output)


# --- several ranks, on hosts of their own


@pytest.fixture
def hosts():
    """Two ranks with one store, as if on two hosts."""
    store = dist.HashStore()
    return [Ranks(rank=rank, local_rank=0, world_size=2, local_world_size=1, store=store) for rank in range(2)]


def test_every_rank_resumes_from_what_rank_0_chose(hosts, finished):
    assert [resume_point(finished, True, rank, []).name for rank in hosts] == ["checkpoint-4"] * 2


def test_a_host_with_a_folder_of_its_own_is_named(tmp_path, hosts, finished):
    own = shutil.copytree(finished, tmp_path / "own")
    shutil.rmtree(own / "checkpoint-4")
    assert resume_point(finished, True, hosts[0], []).name == "checkpoint-4"
    with pytest.raises(UserError, match=r"rank 0 resumes from checkpoint-4, which is not in .*own on .*must share"):
        resume_point(own, True, hosts[1], [])


@pytest.mark.parametrize("first", [True, False])
def test_resume_on_some_ranks_only_is_refused(first, tmp_path, hosts, finished):
    folders = {True: finished, False: tmp_path / "new"}
    resume_point(folders[first], first, hosts[0], [])
    with pytest.raises(UserError, match="with --resume and some without"):
        resume_point(folders[not first], not first, hosts[1], [])


def test_other_files_on_another_host_are_named(hosts):
    agree_on_facts({"train_file": "a", "base_model": "b", "world_size": 2}, hosts[0])
    with pytest.raises(UserError, match="has another train_file than the host of rank 0; give all hosts the same"):
        agree_on_facts({"train_file": "c", "base_model": "b", "world_size": 2}, hosts[1])


def test_a_rank_does_not_wait_for_one_that_has_failed(hosts):
    hosts[1].store.compare_set(FAILED, "", "rank 1 on b: output is not empty")
    for wait in (hosts[0].barrier, lambda: hosts[1].share("anything", "x")):
        with pytest.raises(UserError, match="rank 1 on b: output is not empty"):
            wait()
    hosts[0].store.set(ALL_ARRIVED, "1")
    hosts[0].barrier()


# --- files whose last line is half written


@pytest.mark.parametrize(("cut_at", "left"), [(-1, [1, 2]), (-20, [1]), (-60, [])])
def test_a_half_last_record_is_dropped(tmp_path, cut_at, left):
    path = tmp_path / "metrics.jsonl"
    raw = b"".join(json.dumps({"step": step, "loss": 1.5, "time": 1e9}).encode() + b"\n" for step in (1, 2))
    path.write_bytes(raw[:cut_at])
    assert [record["step"] for record in read_metrics(path)] == (
        [1, 2] if cut_at == -1 else [1] if cut_at == -20 else []
    )


def test_a_broken_record_in_between_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not a record of a step; delete the line"):
        read_metrics(path)


def test_a_half_phase_mark_is_dropped_when_the_file_is_used_again(tmp_path):
    path = tmp_path / "phases-0.jsonl"
    with PhaseLog(path).phase("train"):
        pass
    path.write_bytes(path.read_bytes()[:-20])
    with PhaseLog(path).phase("train"):
        pass
    assert len(read_phases([path])) == 2


def test_files_of_ranks_are_told_apart(tmp_path):
    names = ["rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "global_step4/bf16_zero_pp_rank_1_mp_rank_00_o.pt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert set(describe_files(tmp_path, 0)) == {"rng_state_0.pth", "optimizer.pt"}
    assert set(describe_files(tmp_path, 1)) == set(names) - set(describe_files(tmp_path, 0))
