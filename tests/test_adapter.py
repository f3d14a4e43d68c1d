"""A published adapter of the fused matrix, imported into the split layout, computes the same."""

import json
import sys

import pytest
import torch
from peft import PeftModel
from reference_chatglm3 import forward
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.chatglm3.adapter import import_fused_adapter, main
from helpers.chatglm3.checkpoint import read_config
from helpers.chatglm3.config import ChatGLM3Config
from helpers.errors import UserError, exit_with_one_line

RANK, ALPHA = 4, 16
LAYER = "transformer.encoder.layers.{}.self_attention.query_key_value"


def fused_tensors(config: ChatGLM3Config, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A trained adapter of query_key_value: neither matrix is zero."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for n in range(config.num_hidden_layers):
        name = f"base_model.model.{LAYER.format(n)}"
        a = torch.randn(RANK, config.hidden_size, generator=generator)
        b = torch.randn(sum(config.qkv_rows), RANK, generator=generator)
        tensors |= {f"{name}.lora_A.weight": 0.1 * a.to(dtype), f"{name}.lora_B.weight": 0.1 * b.to(dtype)}
    return tensors


@pytest.fixture
def config(small_checkpoint):
    return ChatGLM3Config.from_dict(read_config(small_checkpoint))


def write_fused(folder, tensors, form="safetensors", **changes):
    """As PEFT wrote it when the published fine-tune ran."""
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": "THUDM/chatglm3-6b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    if form == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(("settings", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)])
def test_the_imported_adapter_computes_what_the_fused_one_did(
    tmp_path, small_checkpoint, config, form, settings, scale
):
    tensors = fused_tensors(config)
    fused = write_fused(tmp_path / "fused", tensors, form, **settings)
    import_fused_adapter(fused, small_checkpoint, tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_checkpoint), tmp_path / "out")

    weights = load_file(small_checkpoint / "model.safetensors")
    for n in range(config.num_hidden_layers):
        name = LAYER.format(n)
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * b @ a
    # The fused computation by transformers on the same weights, and by hand.
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((small_checkpoint / "config.json").read_text())
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(small_checkpoint)(ids).logits
        imported = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    published = json.loads((small_checkpoint / "config.json").read_text())
    by_hand = forward(published, weights, ids, torch.ones_like(ids))
    assert (expected - base).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(imported, by_hand, rtol=0, atol=1e-5)


def test_the_imported_adapter_names_its_base_and_keeps_its_dtype(tmp_path, small_checkpoint, config):
    fused = write_fused(tmp_path / "fused", fused_tensors(config, torch.float16))
    import_fused_adapter(fused, str(small_checkpoint), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(small_checkpoint)
    assert sorted(settings["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (RANK, ALPHA, 0.1)
    imported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in imported.values()} == {torch.float16}
    assert len(imported) == 3 * 2 * config.num_hidden_layers


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'; only LORA adapters"),
        ({"target_modules": ["query_key_value", "dense"]}, r"target_modules is \['query_key_value', 'dense'\]; only"),
        ({"use_dora": True}, "use_dora is True; only plain LORA"),
        ({"bias": "all"}, "bias is 'all'; only plain LORA"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save is"),
        ({"rank_pattern": {"0": 2}}, "rank_pattern is"),
        ({"r": None}, "r is None and must be a whole number"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, small_checkpoint, config, settings, fault):
    fused = write_fused(tmp_path / "fused", fused_tensors(config), **settings)
    with pytest.raises(UserError, match=fault) as error:
        import_fused_adapter(fused, small_checkpoint, tmp_path / "out")
    assert "adapter_config.json" in str(error.value)
    assert not (tmp_path / "out").exists()


FIRST_A = f"base_model.model.{LAYER.format(0)}.lora_A.weight"
FIRST_B = f"base_model.model.{LAYER.format(0)}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop(FIRST_B), "lacks lora_B of layer 0; the model has layers 0 to 1"),
        (lambda t: t.update({FIRST_A.replace("layers.0", "layers.7"): torch.zeros(4, 48)}), "has lora_A of layer 7"),
        (lambda t: t.update({FIRST_A: torch.zeros(4, 40)}), r"lora_A of layer 0 is \[4, 40\] but must be \[4, 48\]"),
        (lambda t: t.update({FIRST_B: torch.zeros(96, 4)}), r"lora_B of layer 0 is \[96, 4\] but must be \[128, 4\]"),
        (
            lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(1)}),
            "the adapter trains base_model.model.x",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, small_checkpoint, config, change, fault):
    tensors = fused_tensors(config)
    change(tensors)
    with pytest.raises(UserError, match=fault):
        import_fused_adapter(write_fused(tmp_path / "fused", tensors), small_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_file_that_is_cut_off_is_named(tmp_path, small_checkpoint, config, form):
    fused = write_fused(tmp_path / "fused", fused_tensors(config), form)
    file = fused / f"adapter_model.{form}"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"adapter_model\.{form} cannot be read"):
        import_fused_adapter(fused, small_checkpoint, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        import_fused_adapter(fused, small_checkpoint, tmp_path / "out")


def test_the_command(tmp_path, small_checkpoint, config, monkeypatch, capsys):
    fused = write_fused(tmp_path / "fused", fused_tensors(config))
    monkeypatch.setattr(sys, "argv", ["adapter", str(fused), str(small_checkpoint), str(tmp_path / "out")])
    exit_with_one_line(main)
    assert f"python -m helpers.finetune.generate {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        exit_with_one_line(main)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} is not empty; name a new folder\n"
