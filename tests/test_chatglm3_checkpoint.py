"""Published files in and out: names, bits, dtypes, host memory, ZeRO-3, and one clear line for whatever is wrong."""

import gc
import hashlib
import json
import shutil
import struct
import threading
import warnings
from math import prod
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_chatglm import random_model, small_config
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, tokenizer
from helpers.chatglm3.checkpoint import check_checkpoint, expected_shapes, resolve_folder, tensor_shapes
from helpers.errors import UserError

# As published with ChatGLM3-6B.
PUBLISHED_6B = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = PUBLISHED_6B | {
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "num_layers": 3,
    "padded_vocab_size": 100,
    "torch_dtype": "float16",
}
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


def published_weights(config: dict, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, written out by hand, the rotary buffer included."""
    h, f, v = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    attention = config["num_attention_heads"] * config["kv_channels"]
    fused = attention + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes = {
        "transformer.embedding.word_embeddings.weight": (v, h),
        INV_FREQ: (config["kv_channels"] // 4,),
        "transformer.encoder.final_layernorm.weight": (h,),
        "transformer.output_layer.weight": (v, h),
    }
    for n in range(config["num_layers"]):
        shapes |= {
            f"transformer.encoder.layers.{n}.input_layernorm.weight": (h,),
            f"transformer.encoder.layers.{n}.self_attention.query_key_value.weight": (fused, h),
            f"transformer.encoder.layers.{n}.self_attention.query_key_value.bias": (fused,),
            f"transformer.encoder.layers.{n}.self_attention.dense.weight": (h, attention),
            f"transformer.encoder.layers.{n}.post_attention_layernorm.weight": (h,),
            f"transformer.encoder.layers.{n}.mlp.dense_h_to_4h.weight": (2 * f, h),
            f"transformer.encoder.layers.{n}.mlp.dense_4h_to_h.weight": (h, f),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_published(folder: Path, config: dict, weights: dict[str, torch.Tensor], form: str, shards: int = 3) -> Path:
    """Write config.json, and ``weights`` in ``shards`` files; ``form`` is what the file is called when it is one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if form.endswith("safetensors") else torch.save
    if shards == 1:
        save(weights, folder / form)
        return folder
    stem, suffix = form.split(".")
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = {name: weights[name] for name in names[i::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (folder / f"{form}.index.json").write_text(json.dumps(index))
    return folder


FORMS = [(form, shards) for form in ("model.safetensors", "pytorch_model.bin") for shards in (1, 3)]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- reading and writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "shards"), FORMS)
def test_published_files_are_read_and_written_bit_for_bit(tmp_path, form, shards):
    weights = published_weights(SMALL)
    folder = write_published(tmp_path / "in", SMALL, weights, form, shards)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is ChatGLM3ForCausalLM
    assert model.dtype == torch.float16  # the file's own
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    written = all_tensors(tmp_path / "out")
    del weights[INV_FREQ]  # derived, and dropped
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    again = ChatGLM3ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_wanted_dtype_is_read_directly(tmp_path, dtype):
    weights = published_weights(SMALL)
    model = AutoModelForCausalLM.from_pretrained(write_published(tmp_path, SMALL, weights, *FORMS[0]), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    head = weights["transformer.output_layer.weight"]
    assert torch.equal(model.lm_head.weight, head.to(dtype))


def test_a_model_made_from_a_configuration_is_written_in_the_published_layout(tmp_path):
    model = random_model(small_config())
    model.save_pretrained(tmp_path)
    written = all_tensors(tmp_path)
    assert {name: tuple(t.shape) for name, t in written.items()} == expected_shapes(model.config)
    fused = written["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    attention = model.model.layers[1].self_attn
    parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    assert torch.equal(fused, torch.cat(parts))


def test_the_6b_model_has_the_published_tensors():
    shapes = expected_shapes(ChatGLM3Config.from_dict(PUBLISHED_6B))
    assert sum(prod(shape) for shape in shapes.values()) == 6_243_584_000
    assert len(shapes) == 3 + 7 * 28
    layer = "transformer.encoder.layers.27."
    assert shapes[f"{layer}self_attention.query_key_value.weight"] == (4608, 4096)
    assert shapes[f"{layer}mlp.dense_h_to_4h.weight"] == (27392, 4096)


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("form", "shards"), [FORMS[1], FORMS[3]])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_no_second_copy_is_held_while_reading(tmp_path, form, shards, dtype, copies):
    # 100 MiB. The same dtype needs no memory of its own (the file is mapped), another one exactly one copy.
    config = SMALL | {"hidden_size": 512, "ffn_hidden_size": 8192, "padded_vocab_size": 16384}
    weights = published_weights(config)
    size = sum(tensor.nbytes for tensor in weights.values())
    folder = write_published(tmp_path, config, weights, form, shards)
    del weights
    gc.collect()
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    before = anonymous_memory()
    watcher.start()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        done.set()
        watcher.join()
    assert model.dtype == dtype
    assert max(peak, anonymous_memory()) - before < (copies + 0.3) * size


# --- configuration ------------------------------------------------------------------------------------------------


def test_the_published_configuration_is_understood(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_6B))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ChatGLM3Config
    assert (config.vocab_size, config.num_hidden_layers, config.intermediate_size) == (65024, 28, 13696)
    assert (config.head_dim, config.num_key_value_heads, config.qkv_rows) == (128, 2, [4096, 256, 256])
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([2, 64795, 64797], 0, 1)
    assert config.attention_bias
    assert not config.tie_word_embeddings
    assert config.dtype in ("float16", torch.float16)


def test_the_configuration_is_written_with_the_published_names(tmp_path):
    ChatGLM3Config.from_dict(PUBLISHED_6B).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    # What today's code has no switch for is not invented; the three ids at which an answer ends are added.
    dropped = {
        "_name_or_path",
        "auto_map",
        "apply_query_key_layer_scaling",
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "fp32_residual_connection",
        "hidden_dropout",
    }
    expected = {key: value for key, value in PUBLISHED_6B.items() if key not in dropped}
    expected |= {"eos_token_id": [2, 64795, 64797], "bos_token_id": 1}
    expected["transformers_version"] = written["transformers_version"]
    assert written == expected


def test_rope_ratio_survives_reading_and_writing(tmp_path):
    config = ChatGLM3Config.from_dict(SMALL | {"rope_ratio": 500})
    assert config.rope_parameters["rope_theta"] == 5_000_000
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_ratio"] == 500
    again = ChatGLM3Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.rope_parameters == config.rope_parameters


def test_only_the_published_vocabulary_gets_the_published_stop_tokens():
    assert ChatGLM3Config.from_dict(SMALL).eos_token_id == 2
    assert ChatGLM3Config.from_dict(PUBLISHED_6B | {"eos_token_id": [2, 64795]}).eos_token_id == [2, 64795]


def test_a_generation_config_that_knows_only_eos_does_not_hide_the_role_tokens(tmp_path):
    config = PUBLISHED_6B | {
        key: SMALL[key]
        for key in ("hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads", "num_layers")
    }
    write_published(tmp_path, config, published_weights(config), *FORMS[0])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.8, "do_sample": true}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [2, 64795, 64797]
    assert model.generation_config.top_p == 0.8
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 64795, 64797]


# --- hub names ----------------------------------------------------------------------------------------------------


def test_a_hub_name_that_was_downloaded_before_needs_no_network(tmp_path, small_checkpoint, monkeypatch):
    # transformers looks for an adapter of that name all the same. Where there is no network it tries for 23 seconds.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--chatglm"
    (repository / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(small_checkpoint, repository / "snapshots" / commit)
    model = AutoModelForCausalLM.from_pretrained("some/chatglm", cache_dir=tmp_path, local_files_only=True)
    # The name that an adapter trained on it will carry.
    assert model.name_or_path == model.config.name_or_path == "some/chatglm"


def test_a_path_is_remembered_so_that_it_is_right_from_everywhere(small_checkpoint, monkeypatch):
    monkeypatch.chdir(small_checkpoint.parent)
    assert AutoModelForCausalLM.from_pretrained(small_checkpoint.name).name_or_path == str(small_checkpoint)


@pytest.mark.parametrize(
    "name", ["/nowhere/chatglm3-6b", "./chatglm3-6b", "../x/chatglm3-6b", "~/chatglm3-6b", "a/b/c"]
)
def test_what_is_surely_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match=rf"^there is no folder {Path(name)}; give the folder"):
        resolve_folder(name)


def test_a_hub_name_that_cannot_be_had_is_one_line(tmp_path):
    message = r"^some/chatglm is not a local folder, and downloading it from the Hub failed .*; give"
    with pytest.raises(UserError, match=message) as e:
        resolve_folder("some/chatglm", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(e.value)


# --- what is wrong is said in one line ----------------------------------------------------------------------------


def broken(*changes) -> dict[str, torch.Tensor]:
    weights = published_weights(SMALL)
    for change in changes:
        change(weights)
    return weights


NORM = "transformer.encoder.final_layernorm.weight"
DENSE = "transformer.encoder.layers.2.self_attention.dense.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.pop(DENSE), f"missing {DENSE}"),
        (lambda w: w.update({"lora.weight": torch.zeros(2)}), "unknown lora.weight"),
        (lambda w: w.update({NORM: torch.zeros(31)}), f"{NORM} is [31] but must be [32]"),
        (lambda w: [w.pop(name) for name in list(w) if ".layers.2." in name], "and 4 more"),
    ],
    ids=["missing", "extra", "misshapen", "a whole layer missing"],
)
@pytest.mark.parametrize(("form", "shards"), [FORMS[0], FORMS[3]])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, fault, form, shards):
    write_published(tmp_path, SMALL, broken(change), form, shards)
    with pytest.raises(UserError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"the weights in {tmp_path} do not fit its config.json: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_all_kinds_of_fault_are_reported_at_once(tmp_path):
    weights = broken(lambda w: w.pop(DENSE), lambda w: w.update({"x": torch.zeros(1), NORM: torch.zeros(3)}))
    write_published(tmp_path, SMALL, weights, *FORMS[0])
    with pytest.raises(UserError, match=r"missing .*; unknown x; .* is \[3\] but must be \[32\]"):
        check_checkpoint(tmp_path)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.9999])
@pytest.mark.parametrize(("form", "shards"), FORMS)
def test_a_file_that_is_cut_off_is_named(tmp_path, form, shards, share):
    write_published(tmp_path, SMALL, published_weights(SMALL), form, shards)
    file = next(tmp_path.glob("*00002*")) if shards > 1 else tmp_path / form
    cut(file, share)
    with pytest.raises(UserError) as error:
        check_checkpoint(tmp_path)
    assert str(file) in str(error.value)
    assert "download it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pointer_that_git_lfs_left_is_no_weight_file(tmp_path):
    write_published(tmp_path, SMALL, published_weights(SMALL), *FORMS[0])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1827774160\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="is not a safetensors file"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(("form", "shards"), [FORMS[1], FORMS[3]])
def test_a_missing_shard_is_named(tmp_path, form, shards):
    write_published(tmp_path, SMALL, published_weights(SMALL), form, shards)
    shard = next(tmp_path.glob("*00002*"))
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}, which {form}.index.json names"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path, content):
    write_published(tmp_path, SMALL, published_weights(SMALL), *FORMS[1])
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model.safetensors.index.json .*download it again"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write_published(folder, SMALL, published_weights(SMALL), *FORMS[1])
    next(folder.glob("*-00001-*")).rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: name if "00001" in file else file for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"which is not a file of this folder; download it again"):
        check_checkpoint(folder)


def test_a_file_of_something_else_is_named(tmp_path):
    write_published(tmp_path, SMALL, published_weights(SMALL), *FORMS[2])
    torch.save([1, 2, 3], tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is not a file of tensors"):
        check_checkpoint(tmp_path)


def test_a_header_that_is_a_list_is_named(tmp_path):
    write_published(tmp_path, SMALL, published_weights(SMALL), *FORMS[0])
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(UserError, match=path.name) as caught:
        check_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_old_bin_format_is_read(tmp_path):
    weights = published_weights(SMALL)
    write_published(tmp_path, SMALL, weights, *FORMS[2])
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert tensor_shapes(tmp_path) == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_an_empty_folder_a_wrong_one_and_none_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json \(it holds nothing\); give the folder"):
        ChatGLM3ForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"it holds README.md"):
        ChatGLM3ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        ChatGLM3ForCausalLM.from_pretrained(tmp_path / "typo")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(UserError, match="holds no weights"):
        ChatGLM3ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["not json", '{"model_type": "chatglm"', "[1]"])
def test_a_configuration_that_is_not_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json (is not JSON|holds no JSON object).*; download it again"):
        check_checkpoint(tmp_path)


def test_the_first_chatglm_is_another_network(tmp_path):
    first = {
        "model_type": "chatglm",
        "hidden_size": 4096,
        "inner_hidden_size": 16384,
        "num_attention_heads": 32,
        "num_layers": 28,
        "position_encoding_2d": True,
        "vocab_size": 130528,
    }
    (tmp_path / "config.json").write_text(json.dumps(first))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained, check_checkpoint):
        with pytest.raises(UserError, match=r"lacks ffn_hidden_size, .*: not a checkpoint of ChatGLM2 or ChatGLM3"):
            load(tmp_path)


def test_another_model_and_another_kind_of_layer_are_refused():
    with pytest.raises(UserError, match=r"model_type llama\) lacks"):
        ChatGLM3Config.from_dict({"model_type": "llama", "hidden_size": 64})
    for key in ("rmsnorm", "original_rope"):
        with pytest.raises(UserError, match=f"{key} = False; ChatGLM3 has True"):
            ChatGLM3Config.from_dict(SMALL | {key: False})


def test_a_checkpoint_without_original_rope_gets_it_where_it_is_written(tmp_path):
    """The original code has no default for it: it would stop with an AttributeError."""
    without = {key: value for key, value in SMALL.items() if key != "original_rope"}
    ChatGLM3Config.from_dict(without).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["original_rope"] is True


def test_another_network_is_refused_before_weights_are_read(tmp_path):
    write_published(tmp_path, SMALL | {"original_rope": False}, published_weights(SMALL), *FORMS[0])
    for load in (AutoModelForCausalLM.from_pretrained, check_checkpoint):
        with pytest.raises(UserError, match="original_rope = False; ChatGLM3 has True"):
            load(tmp_path)


def test_another_tokenizer_beside_the_6b_vocabulary_warns(tmp_path, small_checkpoint, monkeypatch):
    published_size = SMALL | {"padded_vocab_size": 65024}
    write_published(tmp_path, published_size, published_weights(published_size), *FORMS[0])
    shutil.copy(small_checkpoint / "tokenizer.model", tmp_path)
    with pytest.warns(UserWarning, match=r"tokenizer.model is not the tokenizer published with ChatGLM3-6B"):
        check_checkpoint(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_checkpoint(small_checkpoint)  # another vocabulary size: its own tokenizer is no surprise
        sha256 = hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
        monkeypatch.setattr(tokenizer, "PUBLISHED_SHA256", sha256)
        check_checkpoint(tmp_path)


# --- ZeRO-3 -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_zero_3_partitions_while_reading_and_gathers_the_same_bits(tmp_path, small_checkpoint, rank_server):
    script = Path(__file__).with_name("zero3_round_trip.py")
    finished = rank_server.run(script, small_checkpoint, tmp_path, nprocs=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    elements = sum(prod(shape) for shape in tensor_shapes(small_checkpoint).values())
    assert sorted(rank["rank"] for rank in ranks) == [0, 1]
    for rank in ranks:
        assert rank["elements"] == elements
        assert rank["whole"] == 0  # no parameter is there as a whole
        assert rank["held"] <= elements / 2 + 2 * len(tensor_shapes(small_checkpoint))  # half, rounded up for each
    written, original = all_tensors(tmp_path), all_tensors(small_checkpoint)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())
