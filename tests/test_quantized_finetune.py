"""``quantization_bit`` in the fine-tune: real processes, what a run leaves, what every later command makes of it."""

import json

import bitsandbytes as bnb
import pytest
import torch
from small_finetune import ROOT, TRAIN, adapter, largest_difference, prepare, write_config, write_rows

from helpers.config import compatibility
from helpers.config.compatibility import check_quantization
from helpers.config.deepspeed import read_deepspeed_config
from helpers.config.finetune import parse_finetune_config, read_finetune_config
from helpers.errors import UserError
from helpers.finetune.export import export
from helpers.finetune.generate import answer
from helpers.finetune.loading import QUANTIZATION_FILE, load_for_inference, read_base_format
from helpers.memory.predict import ModelShape, predict
from helpers.memory.predict.jobs import read_job


@pytest.fixture(scope="module")
def train(rank_server, small_checkpoint):
    """Fine-tune on a base held in 4 bits; rows, configuration and output are in one folder."""

    def run(nprocs, folder, *arguments, rows):
        yaml_file = write_config(write_rows(folder, train=16, dev=2), **quantized(4, rows))
        output = ("--output-dir", folder / "output")
        return rank_server.run(TRAIN, folder, small_checkpoint, yaml_file, *arguments, *output, nprocs=nprocs)

    return run


def quantized(bits, rows):
    """What a configuration says of quantisation, with answers that are evaluated between two steps of training."""
    training = {"per_device_train_batch_size": rows, "generation_config": {"max_new_tokens": 4}}
    return {"quantization_bit": bits, "max_eval_samples": 2, "training_args": training}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, train):
    """Folder of a run on two ranks with ZeRO-2."""
    folder = tmp_path_factory.mktemp("two_ranks")
    finished = train(2, folder, ROOT / "configs" / "ds_zero_2.json", rows=2)
    assert finished.returncode == 0, finished.stderr
    assert "on a base held in 4 bits" in finished.stdout
    return folder


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains_and_resume(tmp_path, two_ranks, small_checkpoint, train):
    # Steps 3 and 4 of the single process come after it was interrupted.
    finished = train(1, tmp_path, rows=4)
    assert finished.returncode == 0, finished.stderr
    for name in ("adapter_model.safetensors", "manifest.json"):
        (tmp_path / "output" / "checkpoint-4" / name).unlink()
    resumed = train(1, tmp_path, "--resume", rows=4)
    assert resumed.returncode == 0, resumed.stderr
    for step in (2, 4):
        one, two = (adapter(folder / "output" / f"checkpoint-{step}") for folder in (tmp_path, two_ranks))
        assert largest_difference(one, two) <= 1e-6
    assert max(w.abs().max() for name, w in one.items() if "lora_B" in name) > 1e-3

    # The same run with other bits is another run.
    yaml_file = write_config(tmp_path, **quantized(8, rows=4))
    with pytest.raises(UserError, match=r"was trained with quantization_bit 4, but .* has 8"):
        prepare(tmp_path, small_checkpoint, yaml_file, resume=True)


@pytest.mark.slow
def test_the_run_says_what_its_base_was_held_in(two_ranks, small_checkpoint):
    run = json.loads((two_ranks / "output" / "run.json").read_text())
    assert run["config"]["quantization_bit"] == 4
    model, _ = load_for_inference(small_checkpoint, device="cpu")
    assert run["frozen_parameters"] == model.num_parameters()  # two weights a byte, and both are counted
    for checkpoint in (two_ranks / "output").glob("checkpoint-*"):
        assert json.loads((checkpoint / QUANTIZATION_FILE).read_text()) == {"quantization_bit": 4}


@pytest.mark.slow
def test_later_commands_load_the_base_in_the_same_way_and_export_keeps_the_function_that_was_trained(
    tmp_path, two_ranks, small_checkpoint
):
    model, tokenizer = load_for_inference(two_ranks / "output", device="cpu")
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(projection.base_layer, bnb.nn.Linear4bit)
    assert isinstance(model.base_model.model.lm_head, torch.nn.Linear)
    assert isinstance(answer(model, tokenizer, [{"role": "user", "content": "裙"}], 4), str)

    export(two_ranks / "output", tmp_path / "merged")
    merged, _ = load_for_inference(tmp_path / "merged", device="cpu")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        trained, exported = model(input_ids=ids).logits, merged(input_ids=ids).logits
        original, _ = load_for_inference(small_checkpoint, device="cpu")
        assert (trained - exported).abs().max() < 1e-4 < (trained - original(input_ids=ids).logits).abs().max()
    export(two_ranks / "output", tmp_path / "glm", layout="glm", dtype=torch.float16)
    assert load_for_inference(tmp_path / "glm", device="cpu", dtype="auto")[0].dtype == torch.float16


@pytest.mark.parametrize("value", [16, "4", True, 0, 4.5, [4]])
def test_bits_are_8_or_4_and_nothing_else(value):
    with pytest.raises(UserError, match=r"x\.yaml: quantization_bit must be 8 or 4, not"):
        parse_finetune_config({"quantization_bit": value, "peft_config": {"r": 8}}, "x.yaml")


def test_without_the_key_nothing_is_quantised():
    assert parse_finetune_config({"peft_config": {"r": 8}}, "x.yaml").quantization_bit is None


def test_zero_3_and_a_missing_library_are_told(monkeypatch):
    check_quantization(4, read_deepspeed_config(ROOT / "configs" / "ds_zero_2.json"))
    with pytest.raises(UserError, match="quantization_bit 4 does not go with ZeRO-3"):
        check_quantization(4, read_deepspeed_config(ROOT / "configs" / "ds_zero_3.json"))
    monkeypatch.setattr(compatibility, "find_spec", lambda name: None)
    check_quantization(None, None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_quantization(8, None)


def test_a_damaged_note_of_a_checkpoint_is_told(tmp_path):
    (tmp_path / QUANTIZATION_FILE).write_text('{"quantization_bit": 3}')
    with pytest.raises(UserError, match="is 3 and must be 8, 4 or 'fp8'"):
        read_base_format(tmp_path)


def test_qlora_yaml_leaves_no_decision_open_and_is_predicted_to_fit_a_card_of_8_gib():
    path = ROOT / "configs" / "qlora.yaml"
    assert read_finetune_config(path).notes == [] and read_finetune_config(path).quantization_bit == 4
    job = read_job(path, None, shape=ModelShape(), world_size=1, sequence_length=None)
    assert job.quantization_bits == 4 and predict(job).total < 7.5 * 2**30
    assert (
        predict(
            read_job(ROOT / "configs" / "lora.yaml", None, shape=ModelShape(), world_size=1, sequence_length=None)
        ).total
        > 24 * 2**30
    )
