"""One dropout for the adapters of q, k and v: the same function with one mask, drawn once, and less saved."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from helpers.finetune.joined_adapters import join_adapters
from helpers.finetune.shared_dropout import share_dropout
from helpers.memory.predict import Configuration
from helpers.memory.predict.configuration import Lora
from helpers.memory.predict.saved_tensors import saved_by_layer

WIDTH, TOKENS, RATE = 64, 128, 0.5


class Attention(nn.Module):
    """Three matrices that read the same normed input, called as in attention."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, width) for width in (WIDTH, 16, 16))

    def forward(self, x):
        x = self.norm(x)
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def model(dropout=RATE, targets=("q_proj", "k_proj", "v_proj"), share=True, join=False, dora=False):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_dropout=dropout, target_modules=list(targets), init_lora_weights=False, use_dora=dora)
    adapted = get_peft_model(Attention(), config)
    network = adapted.base_model.model
    if share:
        share_dropout([network.q_proj, network.k_proj, network.v_proj])
    if join:
        join_adapters([network.q_proj, network.k_proj, network.v_proj])
    return adapted


def expected(network, x, mask):
    """Each matrix and its adapter by hand, with the same mask for all."""
    normed = network.norm(x)
    outputs = []
    for layer in (network.q_proj, network.k_proj, network.v_proj):
        adapter = layer.lora_B["default"](linear(normed * mask / (1 - RATE), layer.lora_A["default"].weight))
        outputs.append(layer.base_layer(normed) + layer.scaling["default"] * adapter)
    return torch.cat(outputs, dim=-1)


def gradients(adapted, x, output):
    output.square().sum().backward()
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad} | {"x": x.grad.clone()}
    adapted.zero_grad()
    x.grad = None
    return found


def check_gradient(found, right):
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))  # sums of many products


@pytest.mark.parametrize("join", [False, True])
def test_all_three_read_what_the_first_has_drawn_and_gradients_are_those_of_one_mask(join):
    adapted = model(join=join)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    for seed in (1, 2):  # nothing is left over from one step to the next
        torch.manual_seed(seed)
        mask = nn.functional.dropout(torch.ones(TOKENS, WIDTH), RATE) * (1 - RATE)
        right = expected(adapted.base_model.model, x, mask)
        torch.manual_seed(seed)
        found = adapted(x)
        torch.testing.assert_close(found, right)
        for a, b in zip(*(gradients(adapted, x, output).values() for output in (right, found)), strict=True):
            check_gradient(b, a)


def test_without_training_it_is_the_ordinary_model():
    x = torch.randn(TOKENS, WIDTH)
    assert torch.equal(model().eval()(x), model(share=False).eval()(x))
    torch.testing.assert_close(model(join=True).eval()(x), model().eval()(x))


def test_joined_adapters_are_one_product_under_the_names_they_had():
    separate, joined = model(), model(join=True)
    assert [(n, p.tolist()) for n, p in joined.named_parameters()] == [
        (n, p.tolist()) for n, p in separate.named_parameters()
    ]
    assert [name for name, _ in joined.named_modules()] == [name for name, _ in separate.named_modules()]
    products = []
    for adapted in (separate, joined):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            adapted(torch.randn(TOKENS, WIDTH))
        products.append(
            sum(entry.count for entry in profiler.key_averages() if entry.key in ("aten::mm", "aten::addmm"))
        )
    assert products == [9, 7]  # three matrices, three second matrices, and the first ones


@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"targets": ["k_proj"]}])
def test_what_has_nothing_to_share_stays_as_it_was(options):
    shared, plain = model(join=True, **options), model(share=False, **options)
    assert [type(m) for m in shared.modules()] == [type(m) for m in plain.modules()]


def test_dora_which_also_multiplies_the_identity_shares_its_dropout_and_is_not_joined():
    x = torch.randn(WIDTH, WIDTH)
    outputs = []
    for join in (False, True):
        adapted = model(join=join, dora=True)
        torch.manual_seed(1)
        outputs.append(adapted(x))
    assert torch.equal(*outputs)


def test_two_of_three_share_as_well():
    network = model(targets=["q_proj", "v_proj"]).base_model.model
    x = torch.randn(TOKENS, WIDTH)
    assert network.q_proj.lora_dropout["default"](x) is network.v_proj.lora_dropout["default"](x)


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_that_saves_one_mask_and_one_input_instead_of_three():
    # torch's partition of forward and backward, without generating code, which takes long.
    partition = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, **partition)
    bytes_of = []
    for share, join in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        adapted = model(share=share, join=join)
        x = torch.randn(TOKENS, WIDTH, requires_grad=True)
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = torch.compile(adapted, backend=backend, fullgraph=True)(x)
        bytes_of.append(sum(saved.values()))
        if share:
            assert all(module.drawn.value is None for module in adapted.modules() if hasattr(module, "drawn"))
            found = gradients(adapted, x, output)

            def by_hand(x, network=adapted.base_model.model):
                return expected(network, x, nn.functional.dropout(torch.ones_like(x), RATE) * (1 - RATE))

            torch.manual_seed(3)  # the compiler draws other numbers than eager torch: both are compiled
            right = gradients(adapted, x, torch.compile(by_hand, backend=backend, fullgraph=True)(x))
            for name, gradient in right.items():
                check_gradient(found[name], gradient)
    element = TOKENS * WIDTH
    assert bytes_of[0] - bytes_of[1] == 2 * (4 * element + element)  # two inputs in fp32, two masks
    assert bytes_of[2] <= bytes_of[1]


@pytest.mark.parametrize(("targets", "others"), [(("q_proj", "k_proj", "v_proj"), 2), (("q_proj", "o_proj"), 0)])
def test_the_predictor_counts_what_they_share_once(targets, others):
    sizes = []
    for shared in (False, True):
        c = Configuration(lora=Lora(targets=targets), compiled=True, shared_dropout=shared)
        sizes.append(sum(tensor.total for tensor in saved_by_layer(c)))
    assert sizes[0] - sizes[1] == others * c.tokens * c.shape.hidden * (1 + 2)  # a mask, and the input in 16 bit
