"""helpers.plots: every figure is legible on a screen of 1280 x 720 pixels, and its texts keep apart."""

from itertools import combinations

import numpy as np
import pytest
from fake_nvml import GIB
from matplotlib.text import Text

from helpers.memory.phases import Phase
from helpers.memory.timeline import GpuCurve, Timeline
from helpers.plots import (
    CATEGORY_COLOURS,
    cluster_sketch,
    layout_times,
    loss_and_memory,
    matmul_parts,
    matrix_parts,
    measured_against_formula,
    megatron_block,
    memory_bars,
    memory_sources,
    memory_timeline,
    model_sizes,
    model_states,
    offload_memories,
    predicted_and_measured,
    prediction_errors,
    ring_all_reduce,
    saved_tensor_bars,
    scaling,
    stacked_seconds,
    techniques,
    trace_lanes,
    transfer_times,
)
from helpers.plots.style import DPI

SCREEN = (1280, 720)  # pixels
SMALLEST = 12.0  # pixels of a text that is legible in the last row

NAMES = [f"full fine-tune, autocast, ZeRO-{stage}, published buckets" for stage in range(12)]
PARTS = {category: (number + 2) * GIB for number, category in enumerate(CATEGORY_COLOURS)}
SOURCES = dict.fromkeys(("predicted", "counted", "allocated", "reserved", "NVML"), PARTS)
WAYS = dict.fromkeys(("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-2, DeepSpeed"), PARTS)
CURVES = {f"{name}: down, ordinary memory": {2**k: 2.0**k for k in range(14, 27, 3)} for name in "abc"}
WIDE, TALL = np.ones((96, 512), bool), np.ones((512, 256), bool)
FACTORS = [("X", [WIDE] * 2), ("A", [TALL] * 2), ("Y, all-reduced", [WIDE] * 2)]
CAUSES = {"compute": 1.0, "tensor": 2.0, "pipeline": 0.1, "data": 0.1, "bubble": 1.0}
TIMES = {f"data {n} x pipeline 1 x tensor {8 // n}": CAUSES for n in range(1, 9)}
RECORDS = [{"step": n, "loss": 2.0, "eval_loss": 2.1, "nvml_used_gib": [30.0, 31.0]} for n in range(9)]

FIGURES = {
    "cluster": lambda: cluster_sketch(
        dict.fromkeys(("GPU memory", "NVLink", "PCIe", "InfiniBand"), "3,350 GB/s"), "Two nodes"
    ),
    "layouts": lambda: layout_times(TIMES, dict.fromkeys(TIMES, 0.3), "Every mesh of 8 ranks"),
    "losses": lambda: loss_and_memory(RECORDS, "LoRA"),
    "matmuls": lambda: matmul_parts({"column parallel": FACTORS, "row parallel": FACTORS}, "Two ways to cut A"),
    "matrices": lambda: matrix_parts(
        {f"heads, gated MLP {n}": [WIDE] * 2 for n in range(5)}, "Tensor parallel; with sequence parallelism"
    ),
    "two fused matrices": lambda: matrix_parts(
        dict.fromkeys(("obvious", "both halves"), [TALL] * 2),
        "gate_up_proj, output x input",
        {"obvious": ("gate", "up")},
    ),
    "scaling": lambda: scaling(
        {"LoRA, bf16": {1: 2e4, 2: 2e4, 8: 1.9e4}, "full fine-tuning, published recipe": {4: 900.0}},
        {"LoRA, bf16": {1: 27.0, 2: 27.5, 8: 28.0}, "full fine-tuning, published recipe": {4: 47.0}},
        "ChatGLM3-6B, the same number of tokens per step on every number of GPUs",
    ),
    "formulas": lambda: measured_against_formula(CURVES, CURVES, "Bytes of model states", "ranks", "bytes", log=True),
    "Megatron": lambda: megatron_block(4, "One layer on 4 ranks"),
    "memory": lambda: memory_bars(dict.fromkeys(NAMES, dict.fromkeys(CATEGORY_COLOURS, 2.5)), "Twelve ways"),
    "sources": lambda: memory_sources({"rank 0": SOURCES, "rank 1": SOURCES}, "One step, by source"),
    "alternatives": lambda: memory_sources({"rank 0": WAYS, "rank 1": WAYS}, "What each stage takes away"),
    "models": lambda: model_sizes({"GPT-2, 1.5 B": 10**9, "GPT-3": 10**11}, {"24 GiB": 24 * GIB}, "Sizes"),
    "states": lambda: model_states(
        {"data parallel": (), "ZeRO-2": ("gradients",)}, 4, "ZeRO-2: a part of the gradients as well"
    ),
    "offload": lambda: offload_memories("ZeRO-Offload"),
    "pairs": lambda: predicted_and_measured({f"chunked loss {n}": SOURCES for n in range(6)}, "Six ways"),
    "errors": lambda: prediction_errors(dict.fromkeys(NAMES, (9 * GIB, 10 * GIB)), "Twelve configurations"),
    "ring": lambda: ring_all_reduce(4, "An all-reduce in a ring"),
    "saved tensors": lambda: saved_tensor_bars(
        {
            f"bar {n}": {"inside the blocks": 120, "norms and residuals": n, "block inputs": n / 2, "q": 3}
            for n in range(8, 32, 4)
        },
        "What a layer keeps",
        "MiB",
    ),
    "seconds": lambda: stacked_seconds(
        {"24 GiB budget": CAUSES, "least memory": CAUSES}, {"least memory": 4.3}, "Time of a step"
    ),
    "techniques": lambda: techniques("Who stores what, and who sends what"),
    "transfers": lambda: transfer_times(CURVES, "Copies between device and host"),
}


def shown_texts(fig):
    """Return all texts that are drawn; ticks beyond the limits of an axis have labels, too, which are not."""
    hidden = set()
    for axes in fig.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (axes.axison and low <= tick.get_loc() <= high):
                    hidden |= {tick.label1, tick.label2}
    return [text for text in fig.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_legible_inside_the_figure_and_apart(name):
    fig = FIGURES[name]()
    fig.draw_without_rendering()
    width, height = fig.get_size_inches() * DPI
    texts = {text: text.get_window_extent() for text in shown_texts(fig)}
    for text, box in texts.items():
        assert text.get_fontsize() * DPI / 72 * min(SCREEN[0] / width, SCREEN[1] / height) >= SMALLEST, text
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, text
        assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, text
    for (one, box), (other, beside) in combinations(texts.items(), 2):
        assert not box.shrunk(1, 0.9).overlaps(beside.shrunk(1, 0.9)), (one, other)


def test_names_of_parts_stay_inside_their_parts():
    fig = FIGURES["saved tensors"]()
    fig.draw_without_rendering()
    (axes,) = fig.axes
    boxes = [bar.get_window_extent() for bar in axes.patches]
    inside = [text.get_window_extent() for text in axes.texts if not text.get_text().startswith(" ")]
    assert len(inside) >= 12
    assert all(any(box.x0 < text.x0 and text.x1 < box.x1 for box in boxes) for text in inside)


def test_numbers_on_axes_have_thousands_apart_and_no_powers():
    curve = {2048 * n: 3_000_000 * n for n in range(1, 5)}
    (axes,) = (fig := measured_against_formula({"a": curve}, {}, "", "tokens", "bytes")).axes
    fig.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2,048", "4,096", "6,144", "8,192"]
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["0", "2,000,000"]
    assert not axes.yaxis.offsetText.get_text()


@pytest.mark.parametrize("xs", [range(20), [1, 2, 3, 500], [1, 2, 3]])
def test_ticks_are_regular_if_the_measured_places_are_dense_or_span_a_part_of_the_axis(xs):
    fig = measured_against_formula({"a": dict.fromkeys(xs, 1.0)}, {"a": {1: 1.0, 600: 1.0}}, "", "ranks", "bytes")
    (axes,) = fig.axes
    assert axes.get_xticks().tolist() != list(xs) and np.ptp(np.diff(axes.get_xticks())) == 0


def test_the_legend_leaves_out_parts_that_nobody_can_see():
    parts = {"parameters": 1000, "gradients": 9, "activations": 20}
    for fig in (memory_bars({"a": parts}, ""), memory_sources({"rank 0": {"counted": parts}}, "")):
        assert [text.get_text() for text in fig.legends[0].get_texts()] == ["parameters", "activations"]


def test_a_timeline_names_unused_gpus_and_begins_shortly_before_the_first_phase():
    used, unused = ([GIB, GIB, 9 * GIB], [GIB] * 3)
    gpus = [GpuCurve(index, "x", 80 * GIB, [0.0, 50.0, 100.0], gib) for index, gib in enumerate((unused, used))]
    phases = [Phase("train", 0, 1050, 1100), Phase("evaluate", 0, 1060, 1070)]
    axes = memory_timeline(Timeline(1000.0, 100.0, gpus, None), phases, "").axes[-1]
    assert axes.get_title(loc="left").endswith("(GPU 0: not used)")
    assert axes.get_xlim() == (45, 100)
    assert axes.lines[1].get_xydata().tolist() == [[45, 1]]  # the memory before
    assert all(patch.get_alpha() is None for patch in axes.patches) and len(axes.patches) == 2


def test_a_window_of_a_trace_is_cut_and_narrow_bars_have_no_white_edge_that_looks_like_waiting():
    spans = [("copies", 0.0, 1.0), ("communication", 1.0, 1.001), ("copies", 1.001, 2.0), ("copies", 3.0, 4.0)]
    (axes,) = trace_lanes({"a": {"computes": spans}}, "", window=(0.5, 2.5)).axes
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([0.0, 0.5, 0.501])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.5, 0.001, 0.999])
    assert [bar.get_linewidth() > 0 for bar in axes.patches] == [True, False, True]
