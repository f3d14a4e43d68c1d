"""``peft_config``: names of modules, and every variant of LoRA from training to export."""

import dataclasses
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_finetune import adapter, largest_difference, prepare, write_config
from transformers import AutoModelForCausalLM

from helpers.config.adapter_names import translate_adapter, translate_name
from helpers.config.compatibility import check_adapter_options
from helpers.config.finetune import parse_finetune_config
from helpers.config.options import base_changing_option
from helpers.errors import UserError
from helpers.finetune import train
from helpers.finetune.adapter import check_adapter
from helpers.finetune.export import export
from helpers.finetune.loading import check_comparable, load_for_inference
from helpers.memory.predict import ModelShape
from helpers.memory.predict.jobs import configuration_of


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("query_key_value", ("q_proj", "k_proj", "v_proj")),
        ("dense", ("o_proj",)),
        ("dense_h_to_4h", ("gate_up_proj",)),
        ("dense_4h_to_h", ("down_proj",)),
        ("embedding", ("embed_tokens",)),
        ("word_embeddings", ("embed_tokens",)),
        ("transformer.embedding.word_embeddings", ("embed_tokens",)),
        ("transformer.output_layer", ("lm_head",)),
        ("final_layernorm", ("model.norm",)),
        ("transformer.encoder.layers.3.self_attention.dense", ("model.layers.3.self_attn.o_proj",)),
        (r"transformer\.encoder\.layers\.\d+\.mlp\.dense_h_to_4h", (r"model.layers\.\d+\.mlp\.gate_up_proj",)),
        ("q_proj", ("q_proj",)),
        ("all-linear", ("all-linear",)),
    ],
)
def test_published_names_are_translated(name, wanted):
    assert translate_name(name) == wanted


def test_every_option_that_names_modules_is_translated_and_said():
    notes: list[str] = []
    lora = {
        "target_modules": ["query_key_value", "dense", "q_proj"],
        "modules_to_save": ["embedding", "output_layer"],
        "exclude_modules": r".*\.0\..*query_key_value",
        "rank_pattern": {"query_key_value": 2, "dense": 3},
        "r": 8,
    }
    assert translate_adapter(lora, notes) == {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "exclude_modules": r"(?:.*\.0\..*q_proj)|(?:.*\.0\..*k_proj)|(?:.*\.0\..*v_proj)",
        "rank_pattern": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 3},
        "r": 8,
    }
    assert notes[0] == "query_key_value is split into three matrices: LoRA on q_proj, k_proj, v_proj"
    assert "dense is called o_proj here" in notes and "output_layer is called lm_head here" in notes


def lora_of(**options):
    return parse_finetune_config({"peft_config": {"r": 4} | options, "training_args": {"seed": 1}}, "my.yaml").lora


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target_modules": ["q_proj", "FAKE"]}, "target_modules 'FAKE' matches no module; there are .*q_proj, k_proj"),
        ({"target_modules": ["proj"]}, "target_modules 'proj' matches no module"),
        ({"target_modules": "FAKE"}, "target_modules 'FAKE' matches no module"),
        ({"target_modules": r".*\.nothing_.*"}, "target_modules .* matches no module"),
        ({"target_modules": r".*\.(q_proj"}, "is not a regular expression"),
        ({"target_modules": ["norm"]}, "target_modules 'norm' names model.norm, which is a norm layer, not a matrix"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "a norm layer, .* train all of it, under modules_to_save"),
        ({"target_modules": ".*layernorm"}, "names model.layers.0.input_layernorm, which is a norm layer"),
        (
            {"target_modules": ["mlp"]},
            "which is not a matrix; LoRA adapts matrices: name those inside it, gate_up_proj, down_proj",
        ),
        ({"target_modules": ".*"}, "names model, which is not a matrix"),
        ({"target_modules": ["rotary_emb"]}, "names model.rotary_emb, which has no weights to adapt"),
        ({"target_modules": ["all-linear"]}, r"\['all-linear'\]: for every matrix write target_modules: all-linear"),
        ({"target_modules": "all"}, "for every matrix write target_modules: all-linear"),
        ({"target_modules": []}, "target_modules is empty, .* or leave it out for q_proj, k_proj, v_proj"),
        ({"target_modules": ["embedding"], "lora_bias": True}, "lora_bias=True is not supported for Embedding"),
        ({"modules_to_save": ["layers"]}, "modules_to_save or exclude_modules leaves out every module"),
        ({"r": 1_000_000_000}, "r 1000000000 is more than any matrix has, whose smaller side is"),
        ({"rank_pattern": {"q_proj": 999}}, "rank_pattern q_proj 999 is more than any matrix has"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj must be a whole number above 0, not 0"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern q_proj must be a whole number above 0, not '4'"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern q_proj must be a number above 0, not -1"),
        ({"modules_to_save": ["lm_head", "score"]}, "modules_to_save 'score' matches no module"),
        ({"exclude_modules": ["FAKE"]}, "exclude_modules 'FAKE' matches no module"),
        ({"rank_pattern": {"o_proj": 2}}, "rank_pattern 'o_proj' matches no module with an adapter"),
        ({"alpha_pattern": {"FAKE": 2}}, "alpha_pattern 'FAKE' matches no module with an adapter"),
        ({"layers_to_transform": [0, 9]}, "layers_to_transform 9 is not a layer; there are 0 to"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "layers_pattern 'blocks' matches no list"),
        ({"target_parameters": ["FAKE.weight"]}, "target_parameters 'FAKE.weight' matches no module"),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
            "target_modules 'v_proj' has no effect",
        ),
        ({"modules_to_save": ["q_proj"]}, "target_modules 'q_proj' has no effect, because modules_to_save"),
        (
            {"trainable_token_indices": [3, 99_999_999]},
            "trainable_token_indices 99999999 is not a token; there are 0 to",
        ),
        ({"trainable_token_indices": {"embedding": [-1]}}, "trainable_token_indices -1 is not a token"),
        ({"lora_bias": True, "target_modules": ["q_proj", "dense"]}, "lora_bias on o_proj, which has no bias"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "requires the LoRA rank to be even"),
        ({"init_lora_weights": "mica", "r": 48}, "init_lora_weights mica takes an r up to"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"], "lora_dropout": 0.1}, "dropout"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the base model"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changes the base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora changes the base model"),
        ({"bias": "all"}, "bias all changes the base model"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication changes the base model"),
    ],
)
def test_what_would_train_something_else_is_one_line(options, wanted, small_checkpoint):
    with pytest.raises(UserError, match=wanted) as caught:
        check_adapter(lora_of(**options), small_checkpoint, "my.yaml")
    assert str(caught.value).startswith("my.yaml, peft_config") and "\n" not in str(caught.value)


def test_null_as_target_modules_is_the_stated_default(small_checkpoint):
    notes = parse_finetune_config({"peft_config": {"r": 4, "target_modules": None}}, "my.yaml").notes
    assert "no target_modules given: LoRA on q_proj, k_proj, v_proj" in notes
    check_adapter(lora_of(target_modules=None), small_checkpoint, "my.yaml")


def test_names_are_checked_before_weights_are_loaded(tmp_path, data_dir, small_checkpoint):
    with pytest.raises(UserError, match="target_modules 'FAKE' matches no module"):
        prepare(data_dir, small_checkpoint, write_config(tmp_path, peft_config={"target_modules": ["q_proj", "FAKE"]}))


VARIANTS = {
    "plain": {},
    "all linear": {"target_modules": "all-linear"},
    "published names": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "a pattern": {"target_modules": r".*\.layers\.0\..*\.(query_key_value|dense)"},
    "one name": {"target_modules": "q_proj"},
    "embedding and output layer": {"target_modules": ["q_proj", "embedding", "output_layer"]},
    "modules to save": {"modules_to_save": ["embedding", "output_layer"]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"query_key_value": 2}, "alpha_pattern": {"query_key_value": 3}},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.self_attention.v_proj"]},
    "new tokens by module": {"trainable_token_indices": {"embedding": [3, 5]}},
    "parameters alone": {"target_parameters": ["mlp.dense_4h_to_h.weight"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "bias of the adapter": {"lora_bias": True},
    "new tokens": {"trainable_token_indices": [3, 5]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_compared_with_its_true_base_continued_and_exported(name, tmp_path, small_checkpoint):
    lora = lora_of(**VARIANTS[name])
    check_adapter(lora, small_checkpoint, "my.yaml")
    ids = torch.arange(3, 11)[None]

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits.double()

    base = AutoModelForCausalLM.from_pretrained(small_checkpoint, dtype=torch.float32)
    wanted = logits(base.eval())
    tuned = get_peft_model(base, LoraConfig(**lora)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    after = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    settings = (tmp_path / "adapter" / "adapter_config.json").read_text()
    path = re.escape(str(small_checkpoint))
    assert re.search(f'"base_model_name_or_path": "{path}"', settings)
    check_comparable(tmp_path / "adapter")
    again, _ = load_for_inference(tmp_path / "adapter", device="cpu", dtype=torch.float32)
    assert isinstance(again, PeftModel)
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-5)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-5)
    assert (after - wanted).abs().max() > 1e-3
    export(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_an_adapter_of_others_that_changes_its_base_is_not_compared(options, tmp_path, small_checkpoint):
    base = AutoModelForCausalLM.from_pretrained(small_checkpoint, dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"changes its base model .*, so there is none to compare with"):
        check_comparable(tmp_path / "adapter")
    load_for_inference(tmp_path / "adapter", dtype=torch.float32)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query_key_value"], ("q_proj", "k_proj", "v_proj")),
        ("all-linear", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")),
        (r".*\.mlp\.(gate_up|down)_proj", ("gate_up_proj", "down_proj")),
        (["self_attention.dense"], ("o_proj",)),
    ],
)
def test_the_prediction_counts_the_matrices_that_are_trained(targets, expected):
    job = parse_finetune_config({"peft_config": {"r": 4, "target_modules": targets}}, "my.yaml")
    shape = dataclasses.replace(ModelShape(), layers=2)
    predicted = configuration_of(job, None, shape=shape, world_size=1, sequence_length=8)
    assert predicted.lora is not None and predicted.lora.targets == expected


def test_an_adapter_whose_base_cannot_be_made_again_is_not_loaded(tmp_path, small_checkpoint):
    base = AutoModelForCausalLM.from_pretrained(small_checkpoint, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_2"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"pissa_niter_2 changed with random numbers, which cannot be made again"):
        load_for_inference(tmp_path / "adapter", dtype=torch.float32)


@pytest.mark.parametrize("initial", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_foreign_initialisations_that_change_the_base_are_known(initial):
    assert base_changing_option({"init_lora_weights": initial}) == f"init_lora_weights {initial}"


@pytest.mark.parametrize(
    ("lora", "bits", "stage", "wanted"),
    [
        ({"init_lora_weights": "mica"}, None, 3, "mica freezes a part of the adapter, which ZeRO-3 does not save"),
        ({"trainable_token_indices": [3]}, None, 3, "trainable_token_indices reads rows .* use configs/ds_zero_2.json"),
        ({"init_lora_weights": "mica"}, 4, 0, "mica reads weights in 16 bit; remove it, or quantization_bit"),
        ({"init_lora_weights": "mica", "trainable_token_indices": [3]}, None, 2, None),
        ({"use_dora": True, "modules_to_save": ["output_layer"]}, None, 3, None),
    ],
)
def test_options_that_need_whole_weights_are_refused_where_there_are_none(lora, bits, stage, wanted):
    config = parse_finetune_config({"peft_config": {"r": 4, **lora}, "quantization_bit": bits}, "my.yaml")
    deepspeed = {"zero_optimization": {"stage": stage}} if stage else None
    if wanted is None:
        check_adapter_options(config, deepspeed)
        return
    with pytest.raises(UserError, match=wanted):
        check_adapter_options(config, deepspeed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"query_key_value": 2},
            "modules_to_save": ["output_layer"],
        },
        {"init_lora_weights": "mica", "trainable_token_indices": [3, 5]},
        {"lora_bias": True, "exclude_modules": ["layers.0.self_attention.v_proj"]},
        {"target_parameters": ["mlp.dense_4h_to_h.weight"]},
    ],
)
def test_a_variant_is_resumed_as_if_it_had_not_been_stopped(lora, tmp_path, data_dir, small_checkpoint, monkeypatch):
    def failed(_, error):
        raise error  # instead of ending this process

    monkeypatch.setattr(train.Ranks, "exit_with_error", failed)
    monkeypatch.setattr(train, "draw_figures", lambda *_: None)
    monkeypatch.setattr(train.StopOnSignal, "install", lambda self: None)
    monkeypatch.setattr(train, "quiet_libraries", lambda: None)
    training = {"use_cpu": True, "predict_with_generate": False, "eval_strategy": "no"}
    config = write_config(tmp_path, training_args=training, peft_config=lora, data_config={"val_file": None})

    def last(output, *options):
        train.main([str(data_dir), str(small_checkpoint), str(config), "--output-dir", str(output), *options])
        return adapter(output / "checkpoint-4")

    whole = last(tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", resumed / "checkpoint-2")
    assert largest_difference(last(resumed, "--resume"), whole) == 0
