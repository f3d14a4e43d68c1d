"""Operations of a profiled step are told apart by name and shapes, and none is lost."""

import pytest

from helpers.finetune import step_kinds
from helpers.finetune.results import SPEED_RESULTS, read_results
from helpers.finetune.step_kinds import KINDS, kind_of, profiled_steps, step_parts

VOCAB = 65024


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[4096, 4096], [4096, 27392]], step_kinds.MATMULS),
        ("aten::_scaled_mm", [[4096, 13696], [13696, 4096], [4096, 1], [1, 4096], [], [], [], []], step_kinds.MATMULS),
        ("aten::mm", [[4096, 4096], [4096, 8]], step_kinds.ADAPTERS),
        ("aten::addmm", [[256], [4096, 8], [8, 256], [], []], step_kinds.ADAPTERS),
        ("aten::mm", [[1024, 4096], [4096, VOCAB]], step_kinds.LOSS),
        ("aten::_log_softmax", [[1024, VOCAB], [], []], step_kinds.LOSS),
        ("aten::embedding", [[VOCAB, 4096], [1, 4096]], step_kinds.REST),
        ("aten::_flash_attention_backward", [[4096, 32, 128]], step_kinds.ATTENTION),
        ("torch_attn::_varlen_attn", [], step_kinds.ATTENTION),
        ("triton_red_fused__to_copy_abs_add_amax_div_mean_mul_pow_rsqrt_3", [], step_kinds.NORMS),
        ("triton_red_fused__to_copy_amax_div_mul_silu_split_4", [[4096, 27392]], step_kinds.SWIGLU),
        ("_swiglu_gradient_rows_0", [[4096, 13696], [4096, 27392], [27392, 1]], step_kinds.SWIGLU),
        ("triton_poi_fused_native_dropout_0", [], step_kinds.NORMS),
        ("triton_red_fused_abs_amax_clamp_div_2", [], step_kinds.ROUNDING),
        ("triton_poi_fused_clone_t_7", [[27392, 4096]], step_kinds.TRANSPOSED),
        ("triton_poi_fused_cat_mul_neg_stack_1", [], step_kinds.ELEMENTWISE),
        ("aten::_fused_adamw_", [[[8, 4096], [4096, 8]]], step_kinds.OPTIMIZER),
        ("aten::_foreach_norm", [[[8, 4096]]], step_kinds.OPTIMIZER),
        ("aten::copy_", [[1, 4096], [1, 4096], []], step_kinds.REST),
        ("rest", [], step_kinds.REST),
    ],
)
def test_names_and_shapes_say_what_an_operation_is_for(name, shapes, kind):
    assert kind_of(name, shapes, VOCAB) == kind
    assert kind in KINDS


def test_parts_add_up_and_keep_their_order():
    profile = [["rest", [], 0.25, 0], ["aten::mm", [[64, 96], [96, 128]], 1.0, 2], ["aten::mm", [[96, 80]], 0.5, 1]]
    parts = step_parts(profile, vocab=VOCAB)
    assert parts == {step_kinds.ADAPTERS: 1.0, step_kinds.MATMULS: 0.5, step_kinds.REST: 0.25}
    assert list(parts) == sorted(parts, key=KINDS.index)


def test_files_with_and_without_profiles_can_be_read():
    speed = read_results(SPEED_RESULTS)
    for run in speed["runs"].values():
        run.pop("profile", None)
    assert profiled_steps(speed) == ({}, {})
    name, run = next(iter(speed["runs"].items()))
    run["profile"] = [["aten::mm", [[4096, 4096], [4096, 4096]], 0.1, 4]]
    assert profiled_steps(speed) == ({name: {step_kinds.MATMULS: 0.1}}, {name: run["step_seconds"]})
