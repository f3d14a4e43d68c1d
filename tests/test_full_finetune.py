"""All parameters trained by the ordinary command: equal on any strategy, resumed, and written as a whole model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from load_benchmark import load_benchmark
from safetensors.torch import load_file
from small_finetune import ROOT, largest_difference, prepare, train_beside, write_config
from transformers import AutoModelForCausalLM, GlmForCausalLM, Trainer

from helpers.chatglm3.checkpoint import check_checkpoint
from helpers.config.finetune import parse_finetune_config
from helpers.errors import UserError
from helpers.finetune import evaluate
from helpers.finetune.checkpoints import complete_checkpoints
from helpers.finetune.export import export
from helpers.finetune.generate import answer
from helpers.finetune.loading import find_checkpoint, load_for_inference
from helpers.finetune.model import TrainedChatGLM3ForCausalLM
from helpers.finetune.recorder import read_metrics
from helpers.finetune.trainer import LoraTrainer
from helpers.memory.predict import ModelShape, predict
from helpers.memory.predict.jobs import read_job

ZERO_3 = ROOT / "configs" / "ds_zero_3_full.json"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def finetune(rank_server, data_dir, small_checkpoint):
    """Train all parameters on some ranks; returns the output folder, which is beside the configuration."""

    def run(nprocs: int, folder: Path, *arguments: object, rows: int = 4) -> Path:
        training = {"learning_rate": 1e-3, "eval_steps": 4, "per_device_train_batch_size": rows}
        config = write_config(folder, peft_config=None, training_args=training)
        return train_beside(rank_server, config, data_dir, small_checkpoint, *arguments, nprocs=nprocs)

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, finetune) -> Path:
    """Output folder of one process without DeepSpeed."""
    return finetune(1, tmp_path_factory.mktemp("alone"), rows=8)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, finetune) -> Path:
    """Output folder of two ranks under ZeRO-3."""
    return finetune(2, tmp_path_factory.mktemp("sharded"), ZERO_3)


@pytest.mark.slow
def test_two_ranks_under_zero_3_train_what_one_process_trains(alone, sharded, small_checkpoint):
    base = weights(small_checkpoint)
    for n in (2, 4):
        found, expected = (weights(output / f"checkpoint-{n}") for output in (sharded, alone))
        assert largest_difference(found, expected) < 1e-6
        assert all(not torch.equal(found[name], base[name]) for name in found)  # every parameter has moved
    losses = [[r["loss"] for r in read_metrics(o / "metrics.jsonl") if "loss" in r] for o in (sharded, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alone", "sharded"])
def test_a_resumed_training_ends_with_the_same_bits(name, request, tmp_path, finetune):
    whole = request.getfixturevalue(name)
    shutil.copytree(whole, tmp_path / "output")
    shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    output = finetune(1, tmp_path, "--resume", rows=8) if name == "alone" else finetune(2, tmp_path, ZERO_3, "--resume")
    assert largest_difference(weights(output / "checkpoint-4"), weights(whole / "checkpoint-4")) == 0
    losses = [[r["eval_loss"] for r in read_metrics(o / "metrics.jsonl") if "eval_loss" in r] for o in (output, whole)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_checkpoint_is_a_whole_model_in_the_published_layout(
    sharded, small_checkpoint, tokenizer, monkeypatch, capsys
):
    checkpoint = sharded / "checkpoint-4"
    check_checkpoint(checkpoint)
    assert [c.name for c in complete_checkpoints(sharded)] == ["checkpoint-2", "checkpoint-4"]
    assert find_checkpoint(sharded) == checkpoint
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, small_checkpoint)]
    assert configs[0] == configs[1]
    model, own_tokenizer = load_for_inference(sharded, device="cpu")
    assert answer(model, own_tokenizer, [{"role": "user", "content": "裙"}], 4) is not None
    data = sharded.parent / "dev.json"
    data.write_text('{"content": "裙", "summary": "裙"}\n', encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["evaluate", str(sharded), str(data), "--max-output-length", "4"])
    evaluate.main()
    printed = capsys.readouterr().out
    assert "tuned" in printed and "base" not in printed
    (row,) = map(json.loads, (sharded / "predictions-dev.jsonl").read_text(encoding="utf-8").splitlines())
    assert "tuned_scores" in row and "base" not in row


@pytest.mark.slow
def test_an_export_is_readable_without_this_package(sharded, tmp_path):
    expected, _ = load_for_inference(sharded, device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    for layout in ("published", "glm"):
        export(sharded, tmp_path / layout, layout)
        load = GlmForCausalLM if layout == "glm" else AutoModelForCausalLM
        found = load.from_pretrained(tmp_path / layout)
        with torch.no_grad():
            assert torch.equal(found(ids).logits, expected(ids).logits)
    with pytest.raises(UserError, match="is a whole model and not an adapter of base; remove --model"):
        export(sharded, tmp_path / "again", base="base")


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(alone, small_checkpoint):
    model = TrainedChatGLM3ForCausalLM.from_checked_folder(small_checkpoint)
    state = SimpleNamespace(best_model_checkpoint=str(alone / "checkpoint-4"))
    LoraTrainer._load_best_model(SimpleNamespace(model=model, state=state, is_deepspeed_enabled=False))
    expected, _ = load_for_inference(alone, device="cpu")
    assert largest_difference(model.state_dict(), expected.state_dict()) == 0


@pytest.mark.slow
def test_it_resumes_only_the_same_method(alone, tmp_path, data_dir, small_checkpoint):
    shutil.copytree(alone, tmp_path / "output")
    with pytest.raises(UserError, match="checkpoint-4 was trained with all parameters, but this job trains LoRA; give"):
        prepare(data_dir, small_checkpoint, write_config(tmp_path), resume=True)


def test_the_published_file_is_read_unchanged():
    # It differs from the published lora.yaml in these lines only.
    published = yaml.safe_load((ROOT / "tests" / "data" / "published_lora.yaml").read_text())
    del published["peft_config"]
    published["training_args"] |= {"learning_rate": "3e-4", "deepspeed": "ds_zero_3.json"}
    read = parse_finetune_config(published, "sft.yaml")
    assert read.trains_all and read.method == "all parameters" and read.training["learning_rate"] == 3e-4
    assert read.deepspeed_file == "ds_zero_3.json"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"peft_config": {}}, "peft_config is empty; add r and lora_alpha for a LoRA adapter, or remove the key"),
        ({"peft_config": None}, "peft_config is empty"),
    ],
)
def test_an_empty_peft_config_is_not_taken_for_all_parameters(content, said):
    with pytest.raises(UserError, match=said):
        parse_finetune_config(content, "my.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_bit": 4}, "quantization_bit 4 makes codes of the weights, which cannot be trained"),
        (
            {"speed": {"fp8": True}},
            "speed: fp8 rounds weights that stay frozen, but without peft_config all are trained",
        ),
    ],
)
def test_weights_that_are_trained_are_not_rounded(changes, said, tmp_path, data_dir, small_checkpoint):
    with pytest.raises(UserError, match=said):
        prepare(data_dir, small_checkpoint, write_config(tmp_path, peft_config=None, **changes))


@pytest.mark.parametrize(
    ("deepspeed", "precision", "states"),
    # Bytes per parameter: fp32 weights, autocast's 16-bit copies and Adam's states; 16 in all, or only 16-bit weights,
    # on two ranks.
    [
        (None, "autocast", 4 + 2 + 8),
        ("ds_zero_3_full.json", "bf16", 16 / 2),
        ("ds_zero_3_offload_full.json", "bf16", 1),
    ],
)
def test_the_predictor_reads_the_file(deepspeed, precision, states):
    file = ROOT / "configs" / deepspeed if deepspeed else None
    shape = ModelShape()
    predicted = read_job(ROOT / "configs" / "sft.yaml", file, shape=shape, world_size=2, sequence_length=None)
    assert (predicted.lora, predicted.precision) == (None, precision)
    held = predict(predicted).items
    found = sum(held[name] for name in ("parameters", "gradients", "optimizer states"))
    assert found / shape.parameters == pytest.approx(states, rel=0.15)


@pytest.mark.parametrize("name", ["24 GiB budget", "least memory"])
def test_the_benchmark_starts_the_ordinary_command(name, tmp_path, data_dir, small_checkpoint, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    script = load_benchmark("full_6b")
    file, deepspeed = script.RUNS[name]
    config = script.write_config(tmp_path / "few.yaml", file, script.FEW_STEPS | {"use_cpu": True}, {})
    job = prepare(data_dir, small_checkpoint, config, ROOT / "configs" / deepspeed)
    assert job.config.trains_all and job.planned_steps == 5 and job.data.dev is None
    asked = []
    monkeypatch.setattr(script, "run_command", lambda command: asked.append(command) or 3)
    with pytest.raises(UserError, match=f"{name} failed with status 3"):
        script.measure(name, data_dir, small_checkpoint, tmp_path / "run")
    assert "helpers.finetune.train" in asked[0] and any(str(part).endswith(deepspeed) for part in asked[0])


def test_operations_are_counted_as_transformers_does_and_parameters_once(small_checkpoint, monkeypatch):
    model = TrainedChatGLM3ForCausalLM.from_checked_folder(small_checkpoint)
    trainer, calls = LoraTrainer.__new__(LoraTrainer), []
    trainer.model = model
    inputs = {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}
    expected = Trainer.floating_point_ops(trainer, inputs)
    count = model.num_parameters
    monkeypatch.setattr(model, "num_parameters", lambda **options: calls.append(options) or count(**options))
    assert expected > 0 and [trainer.floating_point_ops(inputs) for _ in range(3)] == [expected] * 3
    assert len(calls) == 1
