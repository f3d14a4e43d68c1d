"""fp8: rounding and matmuls against fp64, what is not finite, loading, the whole fine-tune on the CPU's emulation."""

import dataclasses
import functools
import json
import shutil
import weakref

import pytest
import torch
from conftest import needs_gpu
from peft import LoraConfig, get_peft_model
from small_finetune import ROOT, adapter, largest_difference, prepare, write_config
from torch import nn
from transformers.models.glm.configuration_glm import GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP

from helpers.config.finetune import SpeedOptions, parse_finetune_config, read_finetune_config
from helpers.errors import UserError
from helpers.finetune import evaluate, generate, loading, speed, train
from helpers.finetune.export import export
from helpers.finetune.fp8 import check_fp8, obstacle, obstacle_on
from helpers.finetune.loading import load_for_inference
from helpers.finetune.model import TrainedChatGLM3ForCausalLM
from helpers.finetune.recorder import read_metrics
from helpers.finetune.speed import apply_speed_options
from helpers.hardware import Gpu, describe_machine
from helpers.memory.predict import Configuration, ModelShape, Strategy, predict
from helpers.memory.predict.jobs import read_job
from helpers.memory.predict.states import base_bytes
from helpers.memory.units import GIB
from helpers.parallel.network import TINY
from helpers.quantization import fp8_loading
from helpers.quantization.fp8 import E4M3, LARGEST, Fp8Linear, round_rows
from helpers.quantization.fp8_joined import join_products
from helpers.quantization.fp8_loading import Fp8Config
from helpers.quantization.fp8_swiglu import Fp8MLP, fuse_mlp
from helpers.quantization.library import exclude_frozen_from_ddp

INPUTS, OUTPUTS = 64, 48


def layer_of(weight):
    """A layer with this weight in fp8, and no bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return Fp8Linear.rounded(linear)


def off_by(values):
    """How far a rounded value may be off, by the docstring of ``round_rows``."""
    scales = values.abs().amax(dim=1, keepdim=True) / LARGEST
    return values.abs() / 16 + scales * 2**-10


def check_product(found, a, b, rounding):
    """Compare a product with a bᵀ in fp64, up to what the rounding of both operands and of the result explains."""
    a, b = a.double(), b.double()
    expected = a @ b.t()
    # (a + da)(b + db) - ab, each part as large as it can be; rows of b are what has a scale in the forward pass.
    bound = off_by(a) @ b.abs().t() + a.abs() @ off_by(b).t() + off_by(a) @ off_by(b).t()
    assert ((found.double() - expected).abs() <= bound + rounding * (expected.abs() + bound)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1,), (17,), (33, 1), (2, 3, 5)])
def test_output_and_gradient_are_within_the_rounding_errors(shape, size, dtype):
    torch.manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS).to(dtype)
    weight[:, 3] *= 100  # outliers of one input, of one output, of one token
    weight[5] *= 1000
    x = (size * torch.randn(*shape, INPUTS)).to(dtype)
    x.view(-1, INPUTS)[0, :2] *= 1000
    x.requires_grad_()
    gradient = (size * torch.randn(*shape, OUTPUTS)).to(dtype)
    layer = layer_of(weight)
    output = layer(x)
    output.backward(gradient)
    assert output.shape == gradient.shape and output.dtype == x.grad.dtype == dtype
    last_digit = 2**-9 if dtype == torch.bfloat16 else 2**-20  # sums of 64 products in fp32
    rows = x.detach().reshape(-1, INPUTS)
    check_product(output.detach().reshape(-1, OUTPUTS), rows, weight, last_digit)

    # Backward multiplies the rounded gradient, scaled by the weight's scales before, by the codes as they are.
    weighted = gradient.reshape(-1, OUTPUTS).double() * layer.scales.t().double()
    codes = layer.codes.double()
    bound = off_by(weighted) @ codes.abs()
    expected = weighted @ codes
    found = x.grad.reshape(-1, INPUTS).double()
    assert ((found - expected).abs() <= bound + last_digit * (weighted.abs() @ codes.abs())).all()
    # So the only other error is the weight's own, which was rounded once.
    weight = weight.double()
    assert ((codes * layer.scales.double() - weight).abs() <= off_by(weight)).all()


def test_errors_are_those_of_a_mantissa_of_three_bits():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 512), torch.randn(128, 512)
    expected = x @ weight.t()
    assert 0.02 < (layer_of(weight)(x) - expected).norm() / expected.norm() < 0.05
    codes, scales = round_rows(x)
    assert codes.dtype == E4M3 and (codes.float().abs().amax(dim=1) == LARGEST).all()
    assert ((codes.float() * scales - x).abs() <= off_by(x)).all()


def test_zeros_stay_zeros_and_the_smallest_numbers_are_no_division_by_zero():
    x, weight = torch.randn(4, INPUTS), torch.randn(OUTPUTS, INPUTS)
    x[1], x[2], weight[3] = 0, 1e-42, 0
    x.requires_grad_()
    output = layer_of(weight)(x)
    output.backward(torch.zeros_like(output))
    assert (output[1] == 0).all() and (output[:, 3] == 0).all() and (x.grad == 0).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_its_row_and_in_no_other(bad):
    torch.manual_seed(0)
    x, weight = torch.randn(5, INPUTS), torch.randn(OUTPUTS, INPUTS)
    layer = layer_of(weight)
    good = layer(x)
    x[2, 7] = bad
    found = layer(x)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(found[others], good[others])
    x = torch.randn(5, INPUTS, requires_grad=True)
    gradient = torch.randn(5, OUTPUTS)
    gradient[3, 1] = bad
    layer(x).backward(gradient)
    assert x.grad.isnan().all(dim=1).tolist() == x.grad.isnan().any(dim=1).tolist() == [row == 3 for row in range(5)]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_in_is_nothing_out(shape):
    x = torch.zeros(*shape, INPUTS, requires_grad=True)
    output = layer_of(torch.randn(OUTPUTS, INPUTS))(x)
    output.sum().backward()
    assert output.shape == (*shape, OUTPUTS) and x.grad.shape == x.shape


def test_autocast_does_not_change_the_emulation():
    torch.manual_seed(0)
    layer, x = layer_of(torch.randn(OUTPUTS, INPUTS)), torch.randn(3, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x).float())
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_casting_the_module_leaves_codes_and_scales_and_casts_the_bias():
    linear = nn.Linear(INPUTS, OUTPUTS)
    layer, x = Fp8Linear.rounded(linear), torch.randn(2, INPUTS)
    codes, scales = layer.codes.clone(), layer.scales.clone()
    layer.bfloat16().half().to(torch.bfloat16)
    assert torch.equal(layer.codes.float(), codes.float()) and torch.equal(layer.scales, scales)
    assert layer.bias.dtype == torch.bfloat16 and layer(x).dtype == x.dtype


def test_backward_needs_the_weight_and_nothing_else():
    layer = Fp8Linear.rounded(nn.Linear(INPUTS, OUTPUTS))
    x = torch.randn(9, INPUTS, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(2 * x)
    assert {tensor.data_ptr() for tensor in saved} == {layer.weight.data_ptr(), layer.scale_bits.data_ptr()}


@pytest.mark.slow
def test_a_layer_with_its_adapter_is_one_graph_for_the_compiler():
    torch.manual_seed(0)
    holder = nn.Sequential(nn.LayerNorm(INPUTS), Fp8Linear.rounded(nn.Linear(INPUTS, OUTPUTS)))
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["1"], use_rslora=True, init_lora_weights=False))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(1)).requires_grad_()
        run(x).square().sum().backward()
        gradients.append({"x": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 3
    assert largest_difference(*gradients) < 1e-4


class Readers(nn.Module):
    """Three matrices in fp8 that read the same input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, width in (("q", OUTPUTS), ("k", 16), ("v", 16)):
            setattr(self, name, Fp8Linear.rounded(nn.Linear(INPUTS, width)))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def test_a_transposed_copy_of_the_codes_changes_nothing_but_what_backward_reads():
    results = []
    for copied in (False, True):
        layer = layer_of(torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)))
        if copied:
            layer.keep_transposed()
        x = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(1), requires_grad=True)
        output = layer(x)
        if copied:
            layer.weight.data.zero_()  # backward does not need it
        output.square().sum().backward()
        results.append({"output": output, "gradient": x.grad})
    assert largest_difference(*results) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_joined_matrices_are_one_product_forward_and_backward(compiled):
    separate, readers = Readers(), Readers()
    whole = Fp8Linear(INPUTS, OUTPUTS + 32)
    whole.weight.data = torch.cat([layer.weight for layer in readers.children()])
    whole.scale_bits = torch.cat([layer.scale_bits for layer in readers.children()])
    whole.bias.data = torch.cat([layer.bias for layer in readers.children()])
    join_products(list(readers.children()))
    assert {name: tensor.tolist() for name, tensor in readers.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in separate.state_dict().items()
    }
    assert len({layer.weight.untyped_storage().data_ptr() for layer in readers.children()}) == 1
    if compiled:
        for layer in readers.children():
            layer.keep_transposed()
        assert readers.q.joined.transposed.shape == (INPUTS, OUTPUTS + 32) and readers.k.transposed is None
    run = torch.compile(readers, fullgraph=True, backend="aot_eager") if compiled else readers
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(9, INPUTS, generator=generator, requires_grad=True)
        gradient = torch.randn(9, OUTPUTS + 32, generator=generator)
        outputs = [each(x) for each in (run, whole, separate)]
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(outputs[0], outputs[2])
        found, right = (torch.autograd.grad(output, x, gradient)[0] for output in outputs[:2])
        torch.testing.assert_close(found, right)
        assert readers.q.joined.outputs == ()


def test_matrices_of_other_types_are_not_joined():
    readers = Readers()
    readers.k = nn.Linear(INPUTS, 16)
    join_products(list(readers.children()))
    assert [type(layer) for layer in readers.children()] == [Fp8Linear, nn.Linear, Fp8Linear]


def mlp_in_fp8(width=32, dtype=torch.float32, device="cpu"):
    """An MLP of ChatGLM3's form with its matrices in fp8."""
    torch.manual_seed(0)
    mlp = GlmMLP(GlmConfig(hidden_size=INPUTS, intermediate_size=width, hidden_act="silu")).to(dtype)
    mlp.gate_up_proj, mlp.down_proj = Fp8Linear.rounded(mlp.gate_up_proj), Fp8Linear.rounded(mlp.down_proj)
    return mlp.to(device)


def outputs_and_gradients(mlp, x, gradient):
    x = x.clone().requires_grad_()
    output = mlp(x)
    return output.detach(), torch.autograd.grad(output, x, gradient)[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_an_mlp_that_rounds_in_one_pass_computes_the_same_and_keeps_only_what_silu_reads(transposed):
    mlp, fused = mlp_in_fp8(), mlp_in_fp8()
    fuse_mlp(fused)
    assert type(fused) is Fp8MLP
    if transposed:
        fused.gate_up_proj.keep_transposed()
        fused.down_proj.keep_transposed()
    x, gradient = torch.randn(2, 9, INPUTS), torch.randn(2, 9, INPUTS)
    x[0, 2], x[0, 3, 5], gradient[1, 4], gradient[1, 5, 6] = 0, float("nan"), 0, float("inf")
    for found, right in zip(
        outputs_and_gradients(fused, x, gradient), outputs_and_gradients(mlp, x, gradient), strict=True
    ):
        assert torch.equal(found.isnan(), right.isnan()) and 0 < right.isnan().sum() < right.numel()
        # A number between two codes may be rounded to the other one if the last bit of the row's largest differs.
        assert (found - right).nan_to_num().norm() <= 2**-7 * right.nan_to_num().norm()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fused(x.requires_grad_())
    assert [tensor.shape for tensor in saved if tensor.dtype == torch.float32 and tensor.shape[1] > 1] == [(18, 64)]


@pytest.mark.parametrize("other", ["an adapter", "a bias", "bf16"])
def test_an_mlp_with_anything_else_than_frozen_matrices_in_fp8_is_left_as_it_is(other):
    mlp = mlp_in_fp8()
    if other == "an adapter":
        get_peft_model(mlp, LoraConfig(r=2, target_modules=["down_proj"]))
    else:
        linear = nn.Linear(INPUTS, 64, bias=other == "a bias")
        mlp.gate_up_proj = Fp8Linear.rounded(linear) if linear.bias is not None else linear
    fuse_mlp(mlp)
    assert type(mlp) is GlmMLP


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("width", [32, 13696])
def test_a_gpu_rounds_an_mlp_in_one_pass_as_the_emulation_does(width, compiled):
    if obstacle_on(torch.device("cuda")):
        pytest.skip("this GPU cannot multiply in fp8")
    results = []
    for device in ("cpu", "cuda"):
        mlp = mlp_in_fp8(width, torch.bfloat16, device)
        fuse_mlp(mlp)
        run = torch.compile(mlp, fullgraph=True) if compiled and device == "cuda" else mlp
        generator = torch.Generator().manual_seed(1)
        x, gradient = (torch.randn(16, INPUTS, generator=generator).bfloat16() for _ in range(2))
        x[3], x[4, 5], gradient[5], gradient[6, 7] = 0, float("nan"), 0, float("inf")
        results.append(
            [tensor.cpu().float() for tensor in outputs_and_gradients(run, x.to(device), gradient.to(device))]
        )
    for right, found in zip(*results, strict=True):
        assert torch.equal(right.isnan(), found.isnan())
        assert (found - right).nan_to_num().norm() <= 2**-6 * right.nan_to_num().norm()


@needs_gpu
@pytest.mark.parametrize("rows", [0, 1, 17, 256])
def test_a_gpu_multiplies_what_the_emulation_does(rows):
    if obstacle_on(torch.device("cuda")):
        pytest.skip("this GPU cannot multiply in fp8")
    torch.manual_seed(0)
    linear = nn.Linear(256, 512, dtype=torch.bfloat16)
    emulated, layer = Fp8Linear.rounded(linear), Fp8Linear.rounded(linear).cuda()
    x, gradient = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 512).bfloat16()
    if rows > 16:
        x[3], gradient[4], x[5, 7], gradient[6, 7] = 0, 0, float("nan"), float("inf")
    results = []
    for module, device in ((emulated, "cpu"), (layer, "cuda")):
        moved = x.to(device, copy=True).requires_grad_()
        output = module(moved)
        output.backward(gradient.to(device))
        results.append((output.detach().cpu().float(), moved.grad.cpu().float()))
    for right, found in zip(*results, strict=True):
        assert torch.equal(right.isnan(), found.isnan())
        assert (found - right).nan_to_num().norm() <= 2**-7 * right.nan_to_num().norm()


@pytest.fixture(scope="module")
def rounded(small_checkpoint):
    """The small checkpoint, loaded in bf16 with its matrices in fp8."""
    return TrainedChatGLM3ForCausalLM.from_checked_folder(
        small_checkpoint, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=Fp8Config()
    )


@pytest.mark.slow
def test_compiled_layers_whose_matrices_and_adapters_share_can_be_recomputed(small_checkpoint, monkeypatch):
    compiled = functools.partial(torch.compile, fullgraph=True)
    monkeypatch.setattr(speed.torch, "compile", lambda forward, backend: compiled(forward, backend="aot_eager"))
    torch._dynamo.reset()
    found = []
    for recomputed in (False, True):
        model = TrainedChatGLM3ForCausalLM.from_checked_folder(
            small_checkpoint, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=Fp8Config()
        )
        torch.manual_seed(0)
        targets = ["q_proj", "k_proj", "v_proj"]
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora).train()
        apply_speed_options(adapted, SpeedOptions(fp8=True, shared_dropout=True, compile_layers=recomputed))
        if recomputed:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.enable_input_require_grads()  # otherwise the first layer would be compiled apart
        ids = torch.arange(3, 35)[None]
        adapted(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert largest_difference(*found) == 0 and len(found[0]) == 12


def test_loading_rounds_the_layers_matrices_and_only_them(rounded, small_checkpoint):
    plain = TrainedChatGLM3ForCausalLM.from_checked_folder(small_checkpoint, dtype=torch.bfloat16)
    matrices = 0
    for name, module in plain.named_modules():
        found = rounded.get_submodule(name)
        if type(module) is nn.Linear and name != "lm_head":
            expected = Fp8Linear.rounded(module)
            assert torch.equal(found.weight, expected.weight) and torch.equal(found.scale_bits, expected.scale_bits)
            matrices += 1
        for own, parameter in module.named_parameters(recurse=False):
            if own != "weight" or not isinstance(found, Fp8Linear):
                assert torch.equal(getattr(found, own), parameter)
    assert matrices == 6 * len(plain.model.layers)


def test_no_two_matrices_exist_in_16_bit_at_the_same_time(small_checkpoint, monkeypatch):
    seen = []

    def watched(weight, stored_rows=fp8_loading.stored_rows):
        seen.append(weakref.ref(weight))
        alive = [matrix for matrix in (reference() for reference in seen) if matrix is not None]
        assert len({matrix.untyped_storage().data_ptr() for matrix in alive}) == 1  # q, k and v are read as one
        return stored_rows(weight)

    monkeypatch.setattr(fp8_loading, "stored_rows", watched)
    TrainedChatGLM3ForCausalLM.from_checked_folder(
        small_checkpoint, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=Fp8Config()
    )
    assert len(seen) == 12


SPEED = {"speed": {"fp8": True}}


@pytest.mark.parametrize(
    ("changes", "deepspeed", "said"),
    [
        ({"quantization_bit": 8}, None, "speed: fp8 and quantization_bit 8 both say how the frozen matrices are kept"),
        ({}, "ds_zero_3.json", "speed: fp8 does not go with ZeRO-3"),
        ({"peft_config": {"use_dora": True}}, None, "use_dora reads weights in 16 bit; remove it, or fp8"),
        ({"peft_config": {"init_lora_weights": "orthogonal"}}, None, "orthogonal reads weights in 16 bit; remove it"),
        ({"peft_config": {"init_lora_weights": "mica"}}, None, "mica reads weights in 16 bit; remove it, or fp8"),
        ({"peft_config": {"modules_to_save": ["o_proj"]}}, None, "modules_to_save 'o_proj' trains matrices that"),
        ({"peft_config": {"modules_to_save": ["mlp"]}}, None, "modules_to_save 'mlp' trains matrices that"),
        ({"peft_config": {"modules_to_save": [r"mlp.down_proj"]}}, None, "'mlp.down_proj' trains matrices that"),
        (
            {"peft_config": {"target_parameters": ["o_proj.weight"]}},
            None,
            "target_parameters 'o_proj.weight' trains matrices that",
        ),
    ],
)
def test_contradictions_are_one_line_before_anything_is_loaded(
    changes, deepspeed, said, tmp_path, data_dir, small_checkpoint
):
    file = ROOT / "configs" / deepspeed if deepspeed else None
    with pytest.raises(UserError) as caught:
        prepare(data_dir, small_checkpoint, write_config(tmp_path, **SPEED, **changes), file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": "all-linear"}])
def test_what_is_not_rounded_may_be_trained_and_every_matrix_adapted(lora, tmp_path, data_dir, small_checkpoint):
    config = write_config(tmp_path, **SPEED, peft_config=lora, training_args={"use_cpu": True})
    notes = prepare(data_dir, small_checkpoint, config).notes
    assert sum("fp8 is emulated on the CPU" in note for note in notes) == 1


CONFIG = parse_finetune_config({"peft_config": {"r": 8}, **SPEED}, "x.yaml")


@pytest.mark.parametrize(
    ("capability", "version", "cuda", "reason"),
    [
        ((8, 9), "2.11.0+cu130", "13.0", None),
        ((9, 0), "2.13.0", "12.8", None),
        ((10, 0), "2.10.1", "12.8", None),
        ((12, 0), "3.0.0a0", "13.0", None),
        ((8, 6), "2.13.0", "12.8", "compute capability 8.9, 9.0 or later, and this GPU has 8.6"),
        ((7, 5), "2.13.0", "12.8", "this GPU has 7.5"),
        ((9, 0), "2.4.1", "12.4", "torch 2.8 or later, and this is 2.4.1"),
        ((9, 4), "2.13.0", None, "not built for NVIDIA's GPUs"),
    ],
)
def test_a_gpu_without_fp8_is_refused_with_a_remedy(capability, version, cuda, reason):
    found = obstacle(capability, version, cuda)
    assert found is None if reason is None else reason in found
    machine = dataclasses.replace(
        describe_machine(),
        gpus=(Gpu("GPU X", 24 * GIB, capability),),
        versions={"torch": version},
    )
    if reason is None:
        (note,) = check_fp8(CONFIG, None, machine, ModelShape(), torch_cuda=cuda)
        assert "fp8 without compile_layers" in note
        compiled = dataclasses.replace(CONFIG, speed=dataclasses.replace(CONFIG.speed, compile_layers=True))
        assert check_fp8(compiled, None, machine, ModelShape(), torch_cuda=cuda) == []
        return
    with pytest.raises(UserError, match=r"fp8 does not work on GPU X: .*; remove fp8, or train with quantization_bit"):
        check_fp8(CONFIG, None, machine, ModelShape(), torch_cuda=cuda)


def test_a_job_that_contradicts_fp8_by_training_everything_or_by_odd_sides_is_refused():
    machine = describe_machine()
    with pytest.raises(UserError, match="without peft_config all are trained"):
        check_fp8(dataclasses.replace(CONFIG, lora={}), None, machine, ModelShape())
    with pytest.raises(UserError, match="multiples of 16, and gate_up_proj is 200 x 4096"):
        check_fp8(CONFIG, None, machine, ModelShape(intermediate=100))
    plain = parse_finetune_config({"peft_config": {"r": 8}}, "x.yaml")
    assert plain.base_format is None and check_fp8(plain, None, machine, ModelShape(intermediate=100)) == []


def test_the_predictor_counts_a_byte_a_weight_and_its_scales(rounded, small_checkpoint):
    shape = ModelShape(
        hidden=48, layers=2, heads=4, kv_groups=2, head_dim=16, intermediate=64, vocab=rounded.config.vocab_size
    )
    expected = base_bytes(Configuration(shape, fp8=True))
    scales = sum(buffer.nbytes for name, buffer in rounded.named_buffers() if name.endswith("scale_bits"))
    assert sum(parameter.nbytes for parameter in rounded.parameters()) + scales == expected
    assert base_bytes(Configuration(shape, fp8=True, fp8_transposed=True)) == expected + 2 * shape.layer_matrices
    fp8, half = (predict(Configuration(TINY, fp8=fp8)) for fp8 in (True, False))
    assert fp8.phases["optimizer step"] < half.phases["optimizer step"]
    with pytest.raises(UserError, match="fp8 is True; such weights are frozen and not partitioned"):
        Configuration(fp8=True, precision="bf16", strategy=Strategy("zero-3", 2))
    with pytest.raises(UserError, match="fp8 is True; such weights are frozen"):
        Configuration(fp8=True, lora=None)
    with pytest.raises(UserError, match="quantization_bits is 8 and fp8 is on"):
        Configuration(fp8=True, quantization_bits=8)


@pytest.mark.parametrize(("config", "gib"), [("lora_fp8.yaml", 24), ("lora_16gb.yaml", 16)])
def test_the_configurations_leave_no_decision_open_and_fit(config, gib):
    path = ROOT / "configs" / config
    assert read_finetune_config(path).notes == [] and read_finetune_config(path).base_format == "fp8"
    found = read_job(path, None, shape=ModelShape(), world_size=1, sequence_length=None)
    assert found.fp8 and found.fused_rounding
    assert predict(found).total < gib * 0.96 * GIB
    assert predict(found).total < predict(dataclasses.replace(found, fused_rounding=False)).total


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, small_checkpoint):
    """Train in this process with changes to the configuration; returns the output folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "draw_figures", lambda *_: None)
        monkeypatch.setattr(train.StopOnSignal, "install", lambda self: None)
        monkeypatch.setattr(train, "quiet_libraries", lambda: None)

        def stop(ranks, error):
            raise error

        monkeypatch.setattr(train.Ranks, "exit_with_error", stop)

        def run(*arguments, folder=None, speed=SPEED["speed"], **training):
            folder = folder or tmp_path_factory.mktemp("run")
            options = {"eval_strategy": "no", "use_cpu": True, "gradient_accumulation_steps": 2, **training}
            config = write_config(folder, speed=speed, max_eval_samples=1, training_args=options)
            output = folder / "output"
            train.main([str(data_dir), str(small_checkpoint), str(config), *arguments, "--output-dir", str(output)])
            return output

        yield run


@pytest.fixture(scope="module")
def run(trained):
    """Output folder of a run with fp8."""
    return trained()


def losses(output):
    return [record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record]


@pytest.mark.slow
def test_the_loss_is_nearly_that_without_fp8(run, trained):
    plain = trained(speed={})
    assert losses(run) == pytest.approx(losses(plain), rel=5e-3) and losses(run) != losses(plain)


@pytest.mark.slow
def test_a_run_that_was_stopped_continues_bit_for_bit_also_if_it_recomputes_layers_and_a_change_is_told(
    run, trained, tmp_path, data_dir, small_checkpoint
):
    shutil.copytree(run, tmp_path / "output")
    shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    again = trained("--resume", folder=tmp_path, gradient_checkpointing=True)
    assert largest_difference(adapter(run / "checkpoint-4"), adapter(again / "checkpoint-4")) == 0
    training = {"gradient_accumulation_steps": 2, "use_cpu": True}
    same, other = (
        prepare(
            data_dir, small_checkpoint, write_config(tmp_path, speed=speed, training_args=training), resume=True
        ).notes
        for speed in (SPEED["speed"], {})
    )
    assert "fp8 is none, and was true: used from here on" in other
    assert not any("used from here on" in note for note in same)


@pytest.mark.slow
def test_answers_are_of_the_fp8_base_and_the_export_of_the_original_one(
    run, tmp_path, small_checkpoint, monkeypatch, capsys
):
    def matrix(model):
        return model.get_base_model().model.layers[0].mlp.down_proj

    model, _ = load_for_inference(run, device="cpu")
    assert isinstance(matrix(model), Fp8Linear)
    original, _ = load_for_inference(small_checkpoint, device="cpu")
    export(run, tmp_path / "merged")
    merged, _ = load_for_inference(tmp_path / "merged", device="cpu")
    assert torch.equal(merged.model.layers[0].mlp.down_proj.weight, original.model.layers[0].mlp.down_proj.weight)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ids = torch.arange(3, 40)[None]
    assert "fp8" not in capsys.readouterr().err
    monkeypatch.setattr(loading, "obstacle_on", lambda device: "this GPU is too old")
    unrounded, _ = load_for_inference(run, device="cpu")
    line = "fp8, which does not work here: this GPU is too old; answers use the original matrices\n"
    assert line in capsys.readouterr().err
    assert type(matrix(unrounded)) is nn.Linear
    with torch.no_grad():
        exact, found = (each(input_ids=ids).logits for each in (merged, unrounded))
        assert (exact - found).abs().max() < 1e-4 < (exact - original(input_ids=ids).logits).abs().max()
        assert (model(input_ids=ids).logits - exact).norm() / exact.norm() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options"),
    [
        (evaluate, ["DATA", "--max-rows", "1", "--max-output-length", "3"]),
        (generate, ["--prompt", "裙", "--max-new-tokens", "3"]),
    ],
)
def test_the_commands_answer_with_the_base_that_was_trained_on(command, options, run, data_dir, monkeypatch):
    multiplied = []

    def watched(self, input, forward=Fp8Linear.forward):
        multiplied.append(input.shape)
        return forward(self, input)

    monkeypatch.setattr(Fp8Linear, "forward", watched)
    data = [str(data_dir / "dev.json") if option == "DATA" else option for option in options]
    monkeypatch.setattr("sys.argv", ["command", str(run / "checkpoint-4"), *data])
    command.main()
    assert len(multiplied) >= 12  # every matrix of both layers


def test_ddp_sends_neither_codes_nor_scales(rounded):
    exclude_frozen_from_ddp(rounded.requires_grad_(False))
    names = {name for tensors in (rounded.named_buffers(), rounded.named_parameters()) for name, _ in tensors}
    assert set(rounded._ddp_params_and_buffers_to_ignore) == names
