"""helpers.plots: what the figures show, with which units, for ordinary and for odd input."""

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from fake_nvml import GIB
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from helpers.errors import UserError
from helpers.memory.allocator import Block, Segment
from helpers.memory.phases import Phase
from helpers.memory.timeline import GpuCurve, Timeline
from helpers.plots import (
    CATEGORY_COLOURS,
    RANK_COLOURS,
    Span,
    allocator_history,
    bars_by_rank,
    bytes_over_step,
    codebook_histogram,
    collective,
    collective_rounds,
    format_errors,
    lanes,
    layout_times,
    loss_and_memory,
    loss_differences,
    matmul_parts,
    matrix_parts,
    measured_against_formula,
    megatron_block,
    memory_bars,
    memory_sources,
    memory_steps,
    memory_timeline,
    mesh_cube,
    message_orders,
    model_sizes,
    model_states,
    offload_lanes,
    offload_memories,
    overlap,
    partition_lanes,
    predicted_and_measured,
    prediction_errors,
    save_figure,
    saved_tensor_bars,
    schedule_lanes,
    score_bars,
    smoothed,
    stacked_seconds,
    techniques,
    token_lengths,
    trade_off,
    transfer_times,
)
from helpers.plots.style import TECHNIQUE_COLOURS


def record(step, loss=None, nvml=(None, None), resident=(1.0, 1.25), **more):
    return {"step": step, "loss": loss, "nvml_used_gib": list(nvml), "resident_gib": list(resident), **more}


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


# --- loss and memory


def test_a_short_run_shows_every_point_with_units():
    metrics = [record(10, 4.5), record(20, 4.0), {"step": 20, "eval_loss": 4.2}, record(30, 3.5)]
    fig = loss_and_memory(metrics, "LoRA on two ranks")
    loss, memory = fig.axes
    assert fig.get_suptitle() == "LoRA on two ranks"
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    assert lines(loss)["loss"].get_xydata().tolist() == [[10, 4.5], [20, 4.0], [30, 3.5]]
    assert lines(loss)["loss"].get_marker() == "o"
    assert lines(loss)["dev loss"].get_xydata().tolist() == [[20, 4.2]]
    assert legend(loss) == ["loss", "dev loss"]
    assert memory.get_xlabel() == "optimizer step"


def test_without_nvml_the_resident_memory_is_shown_and_called_so():
    memory = loss_and_memory([record(1, 2.0), record(2, 1.9, resident=(1.5, 1.75))], "CPU").axes[1]
    assert memory.get_ylabel() == "resident set in host memory (GiB)"
    assert memory.get_title() == "Memory of each rank's process"
    assert lines(memory)["rank 1, at most 1.8 GiB"].get_ydata().tolist() == [1.25, 1.75]
    assert memory.get_ylim()[0] == 0


def test_with_nvml_its_figures_are_shown_and_a_missing_one_is_a_gap():
    metrics = [record(1, 2.0, nvml=(30.0, None)), record(2, 1.9, nvml=(32.5, 31.0))]
    memory = loss_and_memory(metrics, "GPU").axes[1]
    assert memory.get_ylabel() == "used, read from NVML (GiB)"
    assert lines(memory)["rank 0, at most 32.5 GiB"].get_ydata().tolist() == [30.0, 32.5]
    second = lines(memory)["rank 1, at most 31.0 GiB"].get_ydata()
    assert math.isnan(second[0]) and second[1] == 31.0


def test_a_long_run_is_smoothed_over_its_raw_loss():
    metrics = [record(step, 5 - step / 400 + 0.2 * math.sin(step)) for step in range(1, 801)]
    loss = loss_and_memory(metrics, "long").axes[0]
    assert legend(loss) == ["loss", "loss, smoothed"]
    assert lines(loss)["loss"].get_linewidth() < lines(loss)["loss, smoothed"].get_linewidth()
    assert lines(loss)["loss, smoothed"].get_ydata() == pytest.approx(
        [5 - step / 400 for step in range(1, 801)], abs=0.1
    )


def test_loss_that_is_not_finite_is_a_gap_with_a_mark():
    metrics = [record(step, math.nan if step in (7, 8) else math.inf if step == 9 else 3.0) for step in range(1, 61)]
    loss = loss_and_memory(metrics, "fp16 without loss scaling").axes[0]
    assert lines(loss)["not finite (3x)"].get_xdata().tolist() == [7, 8, 9]
    assert np.isnan(lines(loss)["loss"].get_ydata()[6:9]).all()
    assert np.isnan(lines(loss)["loss, smoothed"].get_ydata()[6:9]).all()


def test_a_run_that_is_nan_throughout_shows_only_the_marks():
    loss = loss_and_memory([record(1, math.nan), record(2, math.nan)], "nan").axes[0]
    assert legend(loss) == ["not finite (2x)"]
    assert list(loss.get_yticks()) == []


def test_one_record_is_visible():
    loss, memory = loss_and_memory([record(10, 3.0)], "one").axes
    assert lines(loss)["loss"].get_marker() == lines(memory)["rank 0, at most 1.0 GiB"].get_marker() == "o"
    assert loss.get_xlim()[0] < 10 < loss.get_xlim()[1]


def test_eight_ranks_have_eight_colours_and_none_is_hidden():
    values = [30.0] * 8
    memory = loss_and_memory([record(step, 3.0, nvml=values, resident=values) for step in (1, 2)], "8").axes[1]
    assert len({line.get_color() for line in memory.lines}) == 8
    assert all(below.get_linewidth() > above.get_linewidth() for below, above in pairwise(memory.lines))


def test_after_a_resume_the_later_record_of_a_step_counts():
    metrics = [record(10, 4.0), record(20, 3.9), record(30, 9.9), record(20, 3.8), record(30, 3.7)]
    loss = loss_and_memory(metrics, "resumed").axes[0]
    assert lines(loss)["loss"].get_xydata().tolist() == [[10, 4.0], [20, 3.8], [30, 3.7]]


def test_no_record_is_one_clear_line():
    with pytest.raises(UserError, match="no metrics to draw"):
        loss_and_memory([], "empty")


FLOATS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), FLOATS, FLOATS, st.lists(FLOATS, max_size=3)), min_size=1, max_size=30))
def test_any_records_can_be_drawn(rows):
    metrics = [
        {"step": step, "loss": loss, "eval_loss": dev, "nvml_used_gib": gpus, "resident_gib": [1.0]}
        for step, loss, dev, gpus in rows
    ]
    loss_and_memory(metrics, "any").draw_without_rendering()


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=200))
def test_smoothing_keeps_straight_lines_and_stays_finite(values):
    assert np.isfinite(smoothed(values)).all()
    line = [3.0 - 0.25 * place for place in range(len(values))]
    assert smoothed(line) == pytest.approx(line)
    line[1] = math.nan
    assert np.isnan(smoothed(line)).tolist() == np.isnan(line).tolist()


# --- timeline


def timeline(gpus, duration=100.0, note=None):
    curves = [
        GpuCurve(index, "NVIDIA H100", 80 * GIB, [0.0, 40.0, 100.0], [GIB, (30 + index) * GIB, 2 * GIB])
        for index in range(gpus)
    ]
    return Timeline(1000.0, duration, curves, note)


def boxes(band):
    """(row name, start, end) of every bar in the band of phases."""
    names = [label.get_text() for label in band.get_yticklabels()]
    found = []
    for collection in band.collections:
        for path in collection.get_paths():
            box = path.get_extents()
            found.append((names[round((box.y0 + box.y1) / 2)], box.x0, box.x1))
    return found


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_every_gpu_has_its_curve_in_gib_with_baseline_and_peak(gpus):
    fig = memory_timeline(timeline(gpus), [], "a run")
    assert len(fig.axes) == gpus
    for index, axes in enumerate(fig.axes):
        assert axes.lines[0].get_xydata().tolist() == [[0, 1], [40, 30 + index], [100, 2]]
        assert axes.get_ylabel() == "GiB"
        assert axes.texts[0].get_text() == f"GPU {index}\n● before 1.0 GiB\n▲ peak {30 + index}.0 GiB"
        assert [tuple(line.get_xydata()[0]) for line in axes.lines[1:]] == [(0, 1), (40, 30 + index)]
        assert axes.get_ylim() == fig.axes[0].get_ylim()
    assert fig.axes[-1].get_xlabel() == "seconds since the start"
    assert fig.axes[-1].get_xlim() == (0, 100)
    assert fig.axes[0].get_title(loc="left") == "used memory of each GPU, read from NVML"


def test_phases_stand_in_a_band_above_and_shade_the_curves():
    phases = [Phase("load model", rank, 1000 + rank, 1020 + rank) for rank in (0, 1)]
    phases += [Phase("train", 0, 1022, None), Phase("evaluate", 0, 1050, 1055), Phase("evaluate", 0, 1080, 1085)]
    fig = memory_timeline(timeline(1), phases, "a run")
    band, curve = fig.axes
    assert boxes(band) == [
        ("load model", 0, 21),
        ("train", 22, 100),
        ("evaluate", 50, 55),
        ("evaluate", 80, 85),
    ]
    assert len(curve.patches) == 4


def test_phases_are_cut_to_the_timeline_and_short_ones_stay_visible():
    phases = [Phase("before", 0, 900, 990), Phase("early", 0, 990, 1010), Phase("blink", 0, 1050, 1050.001)]
    band = memory_timeline(timeline(1), [*phases, Phase("after", 0, 1200, 1300)], "a run").axes[0]
    early, blink = boxes(band)
    assert early == ("early", 0, 10)
    assert blink[2] - blink[1] == pytest.approx(0.4)


@pytest.mark.parametrize("gpus", [1, 8])
def test_no_text_overlaps_another(gpus):
    names = ["start processes", "load model", "DeepSpeed initialize", "first all-reduce", "train", "evaluate", "save"]
    phases = [Phase(name, 0, 1050 + number / 100, 1050.005 + number / 100) for number, name in enumerate(names)]
    fig = memory_timeline(timeline(gpus), phases, "a run with many short phases")
    fig.draw_without_rendering()
    texts = [fig.texts[0], fig.axes[1]._left_title]
    for axes in fig.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        low, high = sorted(axes.get_ylim())
        # Ticks beyond the limits have labels, too, which are never drawn.
        texts += [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += fig.axes[-1].get_xticklabels()
    extents = [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]
    assert len(extents) > 10
    for number, box in enumerate(extents):
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
        assert not any(box.overlaps(other) for other in extents[number + 1 :])


def test_without_curves_the_figure_says_why_and_keeps_the_phases():
    fig = memory_timeline(timeline(0, note="NVML: not available"), [Phase("train", 0, 1010, 1090)], "CPU")
    band, empty = fig.axes
    assert [text.get_text() for text in empty.texts] == ["NVML: not available"]
    assert boxes(band) == [("train", 10, 90)]
    assert list(empty.get_yticks()) == []


def test_a_timeline_of_one_sample_can_be_drawn(tmp_path):
    one = Timeline(1000.0, 0.0, [GpuCurve(0, "x", GIB, [0.0], [GIB])], None)
    save_figure(memory_timeline(one, [Phase("train", 0, 1000.0, 1000.0)], "short"), tmp_path / "one.png")


# --- scores

BASE = {"rouge-1": 24.1, "rouge-2": 5.2, "rouge-l": 18.6, "bleu-4": 0.0}
TUNED = {"bleu-4": 20.2, "rouge-1": 45.9, "rouge-2": 24.5, "rouge-l": 41.0}


def test_scores_stand_side_by_side_with_their_numbers():
    [axes] = score_bars(BASE, TUNED).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU-4"]
    assert [bar.get_height() for bar in axes.patches] == [24.1, 5.2, 18.6, 0.0, 45.9, 24.5, 41.0, 20.2]
    assert [text.get_text() for text in axes.texts][-1] == "20.2"
    assert legend(axes) == ["base", "tuned"]
    assert axes.get_ylabel() == "score (0-100, higher is better)"
    assert axes.get_ylim()[0] == 0


def test_other_spellings_of_a_metric_have_the_same_name():
    [axes] = score_bars({"rougeL": 1.0, "bleu_4": 2.0}, {"rougeL": 1.0, "bleu_4": 2.0}).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ROUGE-L", "BLEU-4"]


@pytest.mark.parametrize(
    ("base", "tuned", "says"),
    [
        ({"rouge-1": 1.0}, {"bleu-4": 1.0}, "scores of different metrics"),
        ({}, {}, "scores of different metrics"),
        ({"rouge-1": 0.4}, {"rouge-1": 140.0}, "rouge-1 of the tuned model is 140"),
        ({"rouge-1": math.nan}, {"rouge-1": 1.0}, "rouge-1 of the base model is nan"),
    ],
)
def test_wrong_scores_are_named(base, tuned, says):
    with pytest.raises(UserError, match=says):
        score_bars(base, tuned)


# --- models, predictions, steps


def test_models_are_drawn_from_weights_to_states_beside_the_cards():
    fig = model_sizes({"small": 2**30, "large": 100 * 2**30}, {"24 GiB": 24 * GIB, "80 GiB": 80 * GIB}, "sizes")
    axes = fig.axes[0]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "GiB, logarithmic")
    drawn = [line.get_xdata().tolist() for line in axes.lines if line.get_linestyle() == "-"]
    assert drawn == [[2, 16], [200, 1600]]
    assert [text.get_text().strip() for text in axes.texts] == ["16 GiB", "1,600 GiB"]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [24, 80]


def test_predictions_stand_beside_what_was_measured_with_their_error():
    fig = prediction_errors({"a": (9 * GIB, 10 * GIB), "b": (22 * GIB, 20 * GIB)}, "predicted")
    sizes, errors = fig.axes
    assert sizes.get_xlabel() == "GPU memory (GiB)" and errors.get_xlabel() == "percent of what was measured"
    assert [bar.get_width() for bar in sizes.patches] == [10, 20]
    assert lines(sizes)["predicted"].get_xdata().tolist() == [9, 22]
    assert [bar.get_width() for bar in errors.patches] == pytest.approx([-10, 10])
    assert [text.get_text() for text in errors.texts] == [" -10.0 ", " +10.0 "]


@pytest.mark.parametrize(
    ("configurations", "says"), [({}, "no configuration"), ({"a": (1, 1), "b": (5, 0)}, "'b' measured 0 bytes")]
)
def test_predictions_that_cannot_be_compared_are_named(configurations, says):
    with pytest.raises(UserError, match=says):
        prediction_errors(configurations, "none")


@pytest.mark.parametrize(
    ("held", "texts"),
    [
        ([2.5, 4.0], [" 2.50  (+2.50)", " 4.00  (+1.50)"]),
        ([100, 90], [" 100.0  (+100.0)", " 90.0  (-10.0)"]),
        ([512, 600], [" 512  (+512)", " 600  (+88)"]),
    ],
)
def test_steps_show_what_each_added_and_leave_out_what_is_never_there(held, texts):
    first, second = (int(size * GIB) for size in held)
    steps = {"built": {"parameters": first, "gradients": 0}, "forward": {"parameters": second, "gradients": 0}}
    fig = memory_steps(steps, "steps", "counted")
    assert [text.get_text() for text in fig.axes[0].texts] == texts
    assert len(fig.axes[0].containers) == 1
    assert fig.axes[0].get_xlabel() == "counted (GiB; in brackets what the step added)"


def test_items_of_steps_keep_their_order_whichever_appears_first():
    steps = {
        "forward": {"parameters": GIB, "gradients": 0, "activations": GIB},
        "backward": {"parameters": GIB, "gradients": GIB, "activations": 0},
    }
    bars = memory_steps(steps, "steps", "counted").axes[0].containers
    assert [bar.get_label() for bar in bars] == ["parameters", "gradients", "activations"]


def test_no_steps_is_one_clear_line():
    with pytest.raises(UserError, match="no steps"):
        memory_steps({}, "none", "counted")


# --- files, style, notebooks


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    fig = score_bars(BASE, TUNED)
    target = tmp_path / "figures" / "scores.png"
    save_figure(fig, target)
    first = target.read_bytes()
    assert first.startswith(b"\x89PNG")

    def fails(path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fig, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        save_figure(fig, target)
    assert target.read_bytes() == first
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["figure.txt", "figure"])
def test_an_unknown_picture_format_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"ends in \.png"):
        save_figure(score_bars(BASE, TUNED), tmp_path / name)


def test_notebooks_get_a_png_of_modest_size():
    picture, described = memory_timeline(timeline(8), [], "a run")._repr_png_()
    assert described == {"alt": "figure: a run"}
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_colours_are_distinct():
    assert len(set(RANK_COLOURS)) == len(RANK_COLOURS) == 8
    assert len(set(CATEGORY_COLOURS.values())) == len(CATEGORY_COLOURS) == 15


def test_a_technique_has_its_own_colour_whatever_stands_beside_it():
    line = {1: 1.0, 2: 2.0}
    for names in (["ZeRO-1", "ZeRO-2"], ["DDP", "ZeRO-2", "something else", "ZeRO-1"]):
        [axes] = measured_against_formula({name: line for name in names}, {}, "title", "x", "y").axes
        colours = {name: lines(axes)[f"{name}, measured"].get_color() for name in names}
        assert {name: colours[name] for name in TECHNIQUE_COLOURS if name in names} == {
            name: colour for name, colour in TECHNIQUE_COLOURS.items() if name in names
        }
        assert len(set(colours.values())) == len(names)


@pytest.mark.slow
def test_pyplot_and_its_backends_are_left_alone():
    script = (
        "import sys, helpers.plots as plots; plots.score_bars({'bleu-4': 1.0}, {'bleu-4': 2.0})._repr_png_(); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_memory_bars_stack_to_the_sum_that_stands_beside_them():
    bars = {"DDP": {"parameters": 11.6, "activations": 4.0, "other": 1.0}, "ZeRO-3": {"parameters": 5.8, "other": 1.5}}
    axes = memory_bars(bars, "title").axes[0]
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == pytest.approx([11.6, 5.8, 4.0, 0.0, 1.0, 1.5])
    assert axes.patches[2].get_x() == 11.6 and axes.patches[5].get_x() == pytest.approx(5.8)
    assert [text.get_text().strip() for text in axes.texts] == ["16.60", "7.30"]
    assert "GiB" in axes.get_xlabel()
    with pytest.raises(UserError, match="negative"):
        memory_bars({"DDP": {"parameters": -1.0}}, "title")
    with pytest.raises(UserError, match="no bars"):
        memory_bars({}, "title")


# --- what every source says


def sources(nvml=True):
    counted = {"parameters": 12 * GIB, "activations": 3 * GIB}
    allocated = counted | {"not counted: temporaries": GIB}
    return {
        "predicted": counted | {"logits and loss": GIB // 2, "CUDA context": GIB // 2},
        "counted": counted,
        "allocated": allocated,
        "reserved": allocated | {"allocator cache": GIB},
        "NVML": allocated | {"allocator cache": GIB, "CUDA context and NCCL": 2 * GIB} if nvml else None,
    }


def test_sources_stand_side_by_side_each_with_its_sum():
    [axes] = memory_sources({"rank 0": sources()}, "title").axes
    assert (axes.get_title(), axes.get_ylabel()) == ("rank 0", "memory (GiB)")
    assert [label.get_text() for label in axes.get_xticklabels()] == list(sources())
    assert [text.get_text() for text in axes.texts] == ["16.00", "15.00", "16.00", "17.00", "19.00"]
    tops = [0.0] * 5
    for bar in axes.patches:
        place = round(bar.get_x() + bar.get_width() / 2)
        assert bar.get_y() == pytest.approx(tops[place])  # on the one below
        tops[place] += bar.get_height()
    assert tops == pytest.approx([16, 15, 16, 17, 19])
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 19


def test_ranks_hold_their_parts_of_what_is_sharded_and_all_of_the_rest():
    fig = model_states({"data parallel": (), "ZeRO-1": ("optimizer states",)}, 4, "title")
    assert [axes.get_title() for axes in fig.axes] == ["data parallel", "ZeRO-1"]
    for axes, total in zip(fig.axes, ("16", "7"), strict=True):
        assert [text.get_text() for text in axes.texts].count(total) == 4
    green = [
        (patch.get_x(), patch.get_y(), patch.get_height())
        for patch in fig.axes[1].patches
        if to_hex(patch.get_facecolor()).upper() == CATEGORY_COLOURS["optimizer states"]
    ]
    # One quarter of the 12 bytes on each rank, each beginning where the one before it ends.
    assert [(y, height) for _, y, height in sorted(green)] == [(4, 3), (7, 3), (10, 3), (13, 3)]
    with pytest.raises(UserError, match="model_states"):
        model_states({"ZeRO-1": ("activations",)}, 4, "title")
    with pytest.raises(UserError, match="model_states"):
        model_states({}, 4, "title")


def test_an_allowance_is_hatched_in_the_bars_and_in_the_legend():
    parts = {"parameters": 3 * GIB, "allocator allowance": GIB}
    fig = memory_sources({"rank 0": {"predicted": parts}}, "title")
    assert [bar.get_hatch() for bar in fig.axes[0].patches] == [None, "///"]
    assert [patch.get_hatch() for patch in fig.legends[0].get_patches()] == [None, "///"]
    assert memory_bars({"predicted": {name: 1.0 for name in parts}}, "title").axes[0].patches[1].get_hatch() == "///"


def test_a_source_without_a_number_says_so():
    [axes] = memory_sources({"rank 0": sources(nvml=False)}, "no driver").axes
    assert [text.get_text() for text in axes.texts][-1] == "not\navailable"
    small = {"predicted": None, "counted": {"parameters": 3 * 2**20}}
    [axes] = memory_sources({"rank 0": small}, "CPU").axes
    assert axes.get_ylabel() == "memory (MiB)" and [text.get_text() for text in axes.texts][1] == "3.00"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_an_axis_and_no_label_overlaps_another(ranks):
    largest = {item: 1000 * GIB for item in CATEGORY_COLOURS}
    shown = {f"rank {rank}": {name: largest for name in sources()} for rank in range(ranks)}
    fig = memory_sources(shown, "everything at once, with long numbers")
    fig.draw_without_rendering()
    panels = [axes for axes in fig.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(shown)
    assert len({axes.get_ylim() for axes in panels}) == 1
    [key] = fig.legends
    assert [text.get_text() for text in key.get_texts()] == list(CATEGORY_COLOURS)
    texts = [fig.texts[0], *key.get_texts()]
    for axes in panels:
        low, high = axes.get_ylim()
        texts += [axes.title, *axes.texts, *axes.get_xticklabels(), axes.yaxis.label]
        texts += [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    extents = [text.get_window_extent() for text in texts]
    for number, box in enumerate(extents):
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
        assert not any(box.overlaps(other) for other in extents[number + 1 :])


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ({}, "no rank"),
        ({"rank 0": {"counted": {"parameters": -1}}}, "memory cannot be negative"),
        ({"rank 0": {"counted": {"weights": 1}}}, "memory_sources: 'weights' has no colour"),
    ],
)
def test_what_cannot_be_drawn_is_named(ranks, says):
    with pytest.raises(UserError, match=says):
        memory_sources(ranks, "title")


def test_token_lengths_shows_the_limit_only_where_it_is_near():
    near = token_lengths([10, 20, 30], 25, "title").axes[0]
    far = token_lengths([10, 20, 30], 700, "title").axes[0]
    assert sum(patch.get_height() for patch in near.patches) == 3
    assert [line.get_label() for line in near.lines] == ["mean, 20 tokens", "cut at 25 tokens"]
    assert [line.get_label() for line in far.lines] == ["mean, 20 tokens"]


def test_a_number_keeps_the_colour_of_the_rank_that_had_it():
    fig = collective([[1, 2], [3, 4]], [[1, 3], [2, 9]], "all-to-all, nearly")
    before, after = fig.axes

    def colours(axes):
        texts = [text.get_text() for text in axes.texts]
        return dict(zip(texts, (patch.get_facecolor() for patch in axes.patches), strict=True))

    was = colours(before)
    assert was["1"] == was["2"] != was["3"] == was["4"]
    now = colours(after)
    assert {name: now[name] for name in "123"} == {name: was[name] for name in "123"}
    assert now["9"] not in was.values()  # computed on the way
    assert [label.get_text() for label in after.get_yticklabels()] == ["rank 0", "rank 1"]


def test_ranks_may_hold_nothing_after_a_collective():
    fig = collective([[1.5], [2]], [[3.5], []], "reduce to rank 0")
    assert [text.get_text() for text in fig.axes[1].texts] == ["3.5"]


def test_a_place_that_a_rank_does_not_hold_is_empty():
    before, after = collective([[1, math.nan], [math.nan, 2]], [[1, 2], [1, 2]], "all-gather").axes
    assert [text.get_text() for text in before.texts] == ["1", "2"]
    assert [bar.get_facecolor()[3] for bar in before.patches] == [1, 0, 0, 1]
    assert before.patches[0].get_facecolor() != before.patches[3].get_facecolor()
    assert [bar.get_facecolor() for bar in after.patches[:2]] == [
        before.patches[0].get_facecolor(),
        before.patches[3].get_facecolor(),
    ]


def test_finished_numbers_are_black_in_every_round():
    fig = collective_rounds({"before": [[1], [2]], "round 1": [[3], [2]], "round 2": [[3], [5]]}, "ring", finished={5})
    assert [axes.get_title() for axes in fig.axes] == ["before", "round 1", "round 2"]
    assert [[text.get_text() for text in axes.texts] for axes in fig.axes] == [["1", "2"], ["3", "2"], ["3", "5"]]
    first, second, last = ([patch.get_facecolor()[:3] for patch in axes.patches] for axes in fig.axes)
    assert last[1] == (0, 0, 0) not in first + second
    assert last[0] == second[0] not in first  # computed on the way


def test_overlap_shows_backward_and_waiting_above_the_messages():
    fig = overlap({"rank 0": (0.03, 0.05, [(0.01, 0.02), (0.04, 0.05)])}, "buckets")
    (axes,) = fig.axes
    lane = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in axes.patches]
    assert lane == [pytest.approx(bar) for bar in ((0, 30, 0), (30, 20, 0), (10, 10, 1), (40, 10, 1))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0, computes", "rank 0, sends"]
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["backward", "waits", "all-reduce"]


def test_transfer_times_are_in_milliseconds_over_sizes_with_units():
    fig = transfer_times({"two": {1024: 1e-4, 2**22: 3e-3}, "four": {1024: 2e-4}}, "all-reduce")
    (axes,) = fig.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([0.1, 3.0]), pytest.approx([0.2])]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 KiB", "4 MiB"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_the_bend_of_a_curve_is_marked_on_it_if_it_was_measured():
    curves = {"gloo": {2**10: 1e-3, 2**20: 4e-3}, "nccl": {2**10: 1e-5, 2**20: 2e-5}}
    (axes,) = transfer_times(curves, "all-reduce", {"gloo": 2**15, "nccl": 2**30}).axes
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [line.get_xydata().tolist() for line in rings] == [[[2**15, pytest.approx(2.0)]]]  # on the line, in log-log
    assert legend(axes) == ["gloo", "nccl", "bend"]
    assert axes.yaxis.get_major_formatter()(0.5) == "0.5"


def test_memory_steps_say_what_each_added_and_what_was_measured():
    steps = {"context": {"CUDA context and NCCL": 500 * 2**20}, "tensor": {"CUDA context and NCCL": 500 * 2**20}}
    steps["tensor"]["allocated"] = 4 * 2**20
    fig = memory_steps(steps, "first steps", "used memory, read from NVML")
    (axes,) = fig.axes
    assert [text.get_text().strip() for text in axes.texts] == ["500  (+500)", "504  (+4)"]
    assert axes.get_xlabel() == "used memory, read from NVML (MiB; in brackets what the step added)"
    (axes,) = memory_steps(steps, "sources", "memory", "the difference").axes
    assert axes.get_xlabel() == "memory (MiB; in brackets the difference)"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["CUDA context and NCCL", "allocated"]


# --- lanes of a schedule


def bars(axes):
    return [
        (bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in axes.patches if bar.get_width()
    ]


def test_lanes_begin_with_the_first_span_and_say_their_unit():
    rows = {
        "rank 0": [Span("forward", 10.0, 10.02, "0"), Span("idle", 10.02, 10.03)],
        "rank 1": [Span("forward", 10.03, 10.04)],
    }
    fig = lanes(rows, "two ranks")
    (axes,) = fig.axes
    assert axes.get_xlabel() == "milliseconds"
    assert bars(axes) == [pytest.approx(bar) for bar in [(0, 20, 0), (20, 10, 0), (30, 10, 1)]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["forward", "idle"]
    assert [text.get_text() for text in axes.texts] == ["0"]


def test_lanes_of_an_ideal_schedule_count_in_its_unit_and_kinds_keep_their_colours():
    fig = lanes(
        {"stage 0": [Span("a", 0, 1), Span("b", 1, 3)], "stage 1": [Span("b", 1, 2)]}, "", {"b": "#123456"}, "steps"
    )
    (axes,) = fig.axes
    assert axes.get_xlabel() == "steps" and axes.get_xlim() == (0, 3)
    a, first_b, second_b = (patch.get_facecolor() for patch in axes.patches[:3])
    assert first_b == second_b != a


def test_a_text_without_room_is_left_out_and_no_span_at_all_is_an_error():
    (axes,) = lanes({"r": [Span("a", 0, 0.001, "forward 12"), Span("b", 0.001, 1)]}, "").axes
    assert not axes.texts
    with pytest.raises(UserError, match="no spans"):
        lanes({"rank 0": []}, "")


def test_schedules_have_a_lane_per_rank_and_each_clock_starts_with_the_first_action():
    ideal = [[(("F", 0, 0), 0.0, 1.0), (("B", 2, 1), 1.0, 3.0)], [(("I", 1, 0), 1.0, 2.0), (("W", 1, 0), 2.0, 3.0)]]
    real = [[(action, start + 50, end + 50) for action, start, end in actions] for actions in ideal]
    fig = schedule_lanes({"ideal, rank": ideal, "real, rank": real}, "1F1B", unit="steps")
    (axes,) = fig.axes
    names = ["ideal, rank 0", "ideal, rank 1", "real, rank 0", "real, rank 1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert bars(axes)[:2] == [(0, 1, 0), (1, 2, 0)] and bars(axes)[4:6] == [(0, 1, 2), (1, 2, 2)]
    kinds = ["forward", "backward, second chunk", "backward: input", "backward: weights"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == kinds
    assert [text.get_text() for text in axes.texts][:4] == ["0", "1", "0", "0"]
    assert axes.get_xlabel() == "steps"


def test_the_last_stage_of_a_partition_also_runs_the_output_layer():
    (axes,) = partition_lanes({"by count": [range(2), range(2, 4)]}, 1.2, "").axes
    assert bars(axes) == [pytest.approx(bar) for bar in [(0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1), (2, 1.2, 1)]]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3", "head"]


def test_arrows_lead_from_each_send_to_its_receive_and_are_dashed_where_nothing_arrives():
    there, back = (("F", 0, 1), 0, 1), (("B", 1, 0), 1, 0)
    fig = message_orders({"crossed": [[there, back], [back, there]], "common": [[there, back]] * 2}, {there, back}, "")
    crossed, common = fig.axes
    assert [text.get_text() for text in crossed.texts if text.get_text()] == [
        "send F1", "receive B0", "send B0", "receive F1",
    ]  # fmt: skip
    for axes, style, ends in ((crossed, "--", [(0, 1), (0, 1)]), (common, "-", [(0, 0), (1, 1)])):
        arrows = [text for text in axes.texts if not text.get_text()]
        assert [(arrow.xyann[0], arrow.xy[0]) for arrow in arrows] == ends
        assert {arrow.arrow_patch.get_linestyle() for arrow in arrows} == {style}
    assert [axes.get_title() for axes in fig.axes] == ["crossed", "common"]


# --- measured points beside a formula


def test_points_and_the_line_of_their_formula_have_one_colour():
    fig = measured_against_formula(
        {"1F1B": {2: 0.4, 1: 0.6}}, {"1F1B": {1: 0.5, 2: 0.33}, "ideal": {1: 0, 2: 0}}, "idle", "m", "%"
    )
    (axes,) = fig.axes
    line, ideal, points, entry = axes.lines
    assert points.get_xydata().tolist() == [[1, 0.6], [2, 0.4]]
    assert points.get_linestyle() == "None" and line.get_linestyle() == entry.get_linestyle() == "--"
    assert points.get_marker() == entry.get_marker() and not len(entry.get_xdata())
    assert points.get_color() == line.get_color() == entry.get_color() != ideal.get_color()
    assert axes.get_ylim()[0] == 0 and (axes.get_xlabel(), axes.get_ylabel()) == ("m", "%")
    assert legend(axes) == ["ideal, formula", "1F1B: formula, measured"]  # one entry for the line and its points
    (axes,) = measured_against_formula({"2 ranks": {64: 1.0, 1024: 0.1}}, {}, "", "h", "bytes", log=True).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    with pytest.raises(UserError, match="no measured points"):
        measured_against_formula({"a": {}}, {"a": {1: 1}}, "", "", "")


# --- parts of matrices


def test_each_part_of_a_matrix_has_the_colour_and_number_of_its_rank():
    rows = [np.arange(4)[:, None] // 2 == rank for rank in (0, 1)]
    columns = [np.arange(6)[None] // 3 == rank for rank in (0, 1)]
    shapes = {"column": (4, 6), "row": (4, 6)}
    held = {
        name: [np.broadcast_to(mask, shapes[name]) for mask in masks]
        for name, masks in (("column", rows), ("row", columns))
    }
    (axes,) = matrix_parts(held, "cuts").axes
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["column\n4 x 6", "0", "1", "row\n4 x 6", "0", "1"]
    first, second, left, right = axes.patches
    assert first.get_y() < second.get_y() and first.get_x() == second.get_x()
    assert left.get_x() < right.get_x() and left.get_y() == right.get_y()
    assert first.get_facecolor() == left.get_facecolor() != second.get_facecolor()
    assert first.get_width() == pytest.approx(2 * left.get_width())


def test_fused_parts_alternate_and_shared_ones_bear_all_their_numbers():
    fused = [(np.arange(8)[:, None] // 2 % 2 == rank).repeat(2, 1) for rank in (0, 1)]
    shared = [(np.arange(4)[:, None] // 2 == rank // 2).repeat(2, 1) for rank in range(4)]
    everyone = [np.ones((2, 2), bool)] * 2
    (axes,) = matrix_parts({"gate and up": fused, "keys": shared, "norm": everyone}, "").axes
    labels = [text.get_text() for text in axes.texts if "\n" not in text.get_text()]
    assert labels == ["0", "1", "0", "1", "0, 1", "2, 3", "all"]


def test_fused_matrices_are_named_and_parted():
    masks = [np.ones((4, 2), bool)] * 2
    (axes,) = matrix_parts({"gate and up": masks}, "", {"gate and up": ("gate", "up")}).axes
    (gate,), (up,) = ([t for t in axes.texts if t.get_text() == name] for name in ("gate", "up"))
    (line,) = axes.lines
    assert gate.get_position()[1] < line.get_ydata()[0] < up.get_position()[1]


def test_a_matmul_shows_three_matrices_to_one_scale():
    rows, columns = np.arange(8)[:, None] // 4 + np.zeros((1, 2)), np.zeros((8, 1)) + np.arange(2)
    halves = {"A": [rows == rank for rank in (0, 1)], "B": [columns == rank for rank in (0, 1)]}
    everyone = [np.ones((8, 2), bool)] * 2
    fig = matmul_parts({"first": [("X", everyone), ("A", halves["A"]), ("Y", halves["B"])]}, "")
    (axes,) = fig.axes
    assert [t.get_text() for t in axes.texts if t.get_text() in "01all×="] == ["all", "×", "0", "1", "=", "0", "1", ""]
    assert len({patch.get_width() * patch.get_height() for patch in axes.patches[1:]}) == 1
    assert axes.get_title(loc="left") == "first"


@pytest.mark.parametrize("held", [{}, {"a": [np.ones((2, 2)), np.ones((2, 3))]}, {"a": [np.ones(4)]}])
def test_matrices_that_cannot_be_drawn(held):
    with pytest.raises(UserError):
        matrix_parts(held, "")


def test_bars_by_rank_stand_side_by_side_with_the_formula_across():
    fig = bars_by_rank({"GPipe": [4.0, 4.0], "1F1B": [2.0, 1.0]}, {"1F1B": [2.5, 1.5]}, "kept", "KiB")
    (axes,) = fig.axes
    assert [patch.get_height() for patch in axes.patches] == [4, 4, 2, 1]
    lines = [line for line in axes.lines if len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in lines] == [[2.5, 2.5], [1.5, 1.5]]
    for patch, line in zip(axes.patches[2:], lines, strict=True):
        assert sum(line.get_xdata()) / 2 == pytest.approx(patch.get_x() + patch.get_width() / 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rank 0", "rank 1"]
    assert axes.get_ylabel() == "KiB"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["GPipe", "1F1B", "formula"]


def test_bars_for_different_numbers_of_ranks_are_refused():
    for measured, expected in (({}, {}), ({"a": []}, {}), ({"a": [1.0]}, {"a": [1.0, 2.0]})):
        with pytest.raises(UserError, match="one value per rank"):
            bars_by_rank(measured, expected, "", "")


def test_a_mesh_is_a_cube_whose_edges_have_the_colour_of_their_axis():
    groups = {"tensor": [(0, 1), (2, 3)], "data": [(0,), (1,), (2,), (3,)], "pipeline": [(0, 2), (1, 3)]}
    (axes,) = (fig := mesh_cube(groups, 2, "mesh")).axes
    edges = [line for line in axes.lines if line.get_linewidth() == 5 and len(line.get_xdata()) == 2]
    colours = [line.get_color() for line in edges]
    assert len(edges) == 4 and colours[0] == colours[1] != colours[2] == colours[3]
    # Tensor neighbours stand above each other, the stages of a pipeline beside each other.
    assert edges[0].get_xdata()[0] == edges[0].get_xdata()[1] and edges[2].get_ydata()[0] == edges[2].get_ydata()[1]
    assert {t.get_text() for t in axes.texts} == {"0", "1", "2", "3", "node 0", "node 1"}
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["tensor", "data", "pipeline"]
    first, second = axes.patches
    assert first.get_bbox().x1 < second.get_bbox().x0


def test_layouts_show_shares_of_the_prediction_and_both_times_with_their_ratio():
    fig = layout_times({"a": {"compute": 1.0, "tensor": 3.0}, "b": {"compute": 8.0, "tensor": 0}}, {"b": 8, "a": 8}, "")
    left, right = fig.axes
    assert [(p.get_x(), p.get_width()) for p in left.patches] == [(0, 0.25), (0.25, 0.75), (0, 1), (1, 0)]
    assert [t.get_text() for t in right.texts] == ["× 2.0", "× 1.0"] and right.get_xscale() == "log"
    points = [line.get_xdata()[0] for line in right.lines if line.get_marker() in "oD"]
    assert points == [4, 8, 8, 8] and right.get_xlabel() == "seconds per step"
    for predicted, measured in (({}, {}), ({"a": {"compute": 1.0}}, {"b": 1.0})):
        with pytest.raises(UserError, match="give both for each"):
            layout_times(predicted, measured, "")


def test_predicted_seconds_are_stacked_and_a_diamond_is_what_was_measured():
    fig = stacked_seconds({"a": {"compute": 1.0, "bubble": 0.5}, "b": {"compute": 2.0}}, {"b": 2.5}, "step")
    (axes,) = fig.axes
    assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(0, 1), (0, 2), (1, 0.5), (2, 0)]
    assert axes.lines[0].get_xydata().tolist() == [[2.5, 1]] and axes.get_xlim()[1] > 2.5
    assert axes.get_xlabel() == "seconds per step"
    assert stacked_seconds({"a": {"x": 1.0}}, {}, "step", "per token").axes[0].get_xlabel() == "per token"
    assert [t.get_text() for t in axes.texts] == ["1.5", "2, measured 2.5"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["measured", "compute", "bubble"]
    with pytest.raises(UserError, match="nothing to draw"):
        stacked_seconds({}, {}, "")


def test_offload_has_three_lanes_and_a_window_cuts_the_spans():
    work = [("device", Span("backward", 0, 2)), ("bus", Span("gradients down", 1, 3)), ("host", Span("Adam", 3, 5))]
    (axes,) = offload_lanes(work, "a step").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["device", "bus", "host"]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 2), (1, 2), (3, 2)]
    (axes,) = offload_lanes(work, "a step", window=(1.5, 4)).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 0.5), (0, 1.5), (1.5, 1)]
    with pytest.raises(UserError, match="no lane disk"):
        offload_lanes([("disk", Span("read", 0, 1))], "a step")
    with pytest.raises(UserError, match="no spans"):
        offload_lanes(work, "a step", window=(6, 7))


# --- bytes over a step


def test_bytes_over_a_step_have_two_samples_per_unit_and_a_line_between_the_passes():
    passes = {"forward": ["embedding", "layer"], "backward": ["layer"]}
    curves = {"one": [0, 2**20, 0, 2**20, 2**20, 0], "all": [3 * 2**20] * 6}
    (axes,) = bytes_over_step(curves, passes, "Held").axes
    assert axes.get_ylabel() == "MiB"
    assert lines(axes)["one"].get_ydata().tolist() == [0, 1, 0, 1, 1, 0]
    assert lines(axes)["all"].get_xdata().astype(int).tolist() == [0, 0, 1, 1, 2, 2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embedding", "layer", "layer"]
    assert [text.get_text() for text in axes.texts] == ["forward", "backward"]
    for wrong in ({}, {"one": [0, 1]}):
        with pytest.raises(UserError, match="give curves with 2 for each of 3 units"):
            bytes_over_step(wrong, passes, "Held")


def test_levels_stand_in_the_histogram_of_what_they_represent():
    fig = codebook_histogram([0.1, 0.2, -0.3], {"even": [-1, 0, 1], "nf": [-1, 1]}, "levels", "weight")
    assert [axes.get_title() for axes in fig.axes] == ["even: 3 levels", "nf: 2 levels"]
    assert [line.get_xdata()[0] for line in fig.axes[0].lines] == [-1, 0, 1]
    assert fig.axes[1].get_xlabel() == "weight" and not fig.axes[0].get_xlabel()


def test_levels_without_values_are_refused():
    for values, levels in (([], {"even": [0]}), ([1.0], {})):
        with pytest.raises(UserError, match="no formats, or no values"):
            codebook_histogram(values, levels, "levels", "weight")


# --- activations


def test_kept_tensors_stand_one_after_another_with_one_colour_each():
    fig = saved_tensor_bars(
        {"GPT": {"input": 60.0, "mask": 0.5}, "ChatGLM3": {"input": 80.0}}, "A layer", "bytes a token"
    )
    (axes,) = fig.axes
    assert axes.get_xlabel() == "bytes a token"
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches]
    assert bars == [(0, 60, 0), (60, 0.5, 0), (0, 80, 1)]
    assert axes.patches[0].get_facecolor() == axes.patches[2].get_facecolor() != axes.patches[1].get_facecolor()
    assert {"input", " 60", " 80"} <= {text.get_text() for text in axes.texts}
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["mask"]  # too narrow for its name


def test_twelve_kinds_of_tensors_have_twelve_colours():
    axes = saved_tensor_bars({"layer": {f"tensor {n}": 1.0 for n in range(12)}}, "A layer", "bytes").axes[0]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 12


@pytest.mark.parametrize("bars", [{}, {"layer": {}}, {"layer": {"input": -1.0}}])
def test_kept_tensors_without_a_part_or_with_a_negative_one_are_refused(bars):
    with pytest.raises(UserError, match=r"no parts|amounts of 0 or more"):
        saved_tensor_bars(bars, "A layer", "bytes")


def test_a_trade_off_shows_every_way_from_zero():
    fig = trade_off({"plain": (1.0, 8.0), "recomputed": (1.4, 2.0)}, "Two ways", "seconds", "GiB")
    (axes,) = fig.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1.0, 8.0]], [[1.4, 2.0]]]
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["plain", "recomputed"]
    with pytest.raises(UserError, match="no points"):
        trade_off({}, "None", "s", "GiB")


def test_in_a_trade_off_a_point_that_another_beats_is_hollow():
    fig = trade_off({"plain": (1.0, 8.0), "slow": (2.0, 8.0), "recomputed": (1.4, 2.0)}, "Ways", "seconds", "GiB")
    faces = [line.get_markerfacecolor() for line in fig.axes[0].lines[:3]]
    assert [face == "none" for face in faces] == [False, True, False]
    assert fig.legends[0].get_texts()[-1].get_text() == "hollow: beaten on both axes"


def test_predicted_and_measured_stand_side_by_side_for_every_configuration():
    measured = {"parameters": 4 * GIB, "allocator cache": 3 * GIB, "CUDA context and NCCL": GIB, "buffers": 1}
    predicted = {"parameters": 4 * GIB, "CUDA context and NCCL": 2 * GIB, "allocator allowance": 2 * GIB}
    sources = {"predicted": predicted, "counted": {"parameters": 4 * GIB}, "NVML": measured}
    without = {"predicted": None, "counted": {"parameters": 2 * GIB}, "NVML": None}
    fig = predicted_and_measured({"plain": sources, "offloaded": without}, "Two ways")
    (axes,) = fig.axes
    assert axes.get_ylabel() == "memory (GiB)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["predicted", "NVML", "predicted", "counted"]
    assert [text.get_text() for text in axes.texts] == [
        *("8.00", "8.00", "not\navailable", "2.00"),
        *("plain", "offloaded"),
    ]
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["parameters", "allocator allowance", "allocator cache", "CUDA context and NCCL"]
    with pytest.raises(UserError, match="no configuration"):
        predicted_and_measured({}, "None")


def test_format_errors_name_the_block_size_at_each_point():
    fig = format_errors({"even": {4096: (4.0, 15.8), 64: (4.5, 10.8)}, "NF4": {64: (4.5, 9.2)}}, "t", "bits", "%")
    (axes,) = fig.axes
    assert [text.get_text() for text in axes.texts] == ["4,096", "64", "64"]
    assert axes.get_ylim()[0] == 0 and legend(axes) == ["even", "NF4"]
    with pytest.raises(UserError, match="no points"):
        format_errors({"even": {}}, "t", "bits", "%")


def test_loss_differences_are_to_the_reference():
    fig = loss_differences({"32 bits": [2.0, 1.0], "4 bits": [2.5, 1.25]}, "32 bits", "t")
    losses, apart = fig.axes
    assert legend(losses) == ["32 bits", "4 bits"] and legend(apart) == ["4 bits"]
    assert lines(apart)["4 bits"].get_ydata().tolist() == [0.5, 0.25]
    with pytest.raises(UserError, match="no run is called '16 bits'"):
        loss_differences({"32 bits": [1.0]}, "16 bits", "t")
    with pytest.raises(UserError, match="differ in length"):
        loss_differences({"32 bits": [1.0], "4 bits": []}, "32 bits", "t")


def test_a_memory_history_keeps_each_segment_in_its_place():
    mib = 2**20
    small = Segment(0, (Block(mib, True), Block(mib, False)))
    large = Segment(5000, (Block(3 * mib, False), Block(1 * mib, True)))
    fig = allocator_history({"default": [[small], [small, large]], "other": [[large]]}, "History")
    left, right = fig.axes
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == ("default", "moment", "segments (MiB)")
    bars = sorted((bar.get_x() + 0.5, bar.get_y(), bar.get_height()) for bar in left.patches)
    assert bars == [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 2, 3), (1, 5, 1)]
    used = {(bar.get_y(), bar.get_height()) for bar in left.patches if bar.get_facecolor()[0] != bar.get_facecolor()[1]}
    assert used == {(0, 1), (5, 1)}
    assert sorted(bar.get_y() for bar in right.patches) == [0, 3]
    assert left.get_ylim() == right.get_ylim()
    with pytest.raises(UserError, match="no segments"):
        allocator_history({"default": [[]]}, "Nothing")


# --- diagrams


def colours_of(axes):
    return {to_hex(patch.get_facecolor()) for patch in axes.patches}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_megatron_block_has_a_lane_with_its_shapes_for_each_rank(ranks):
    fig = megatron_block(ranks, "A layer")
    for axes, shape in zip(fig.axes, (f"[b, s, h / {ranks}]", f"[b, s, i / {ranks}]"), strict=True):
        words = [text.get_text() for text in axes.texts]
        assert sum(shape in text for text in words) == ranks
        assert words.count("f") == words.count("g") == 1
        assert TECHNIQUE_COLOURS["tensor parallel"].lower() in colours_of(axes)


def test_a_megatron_block_of_one_rank_or_five_is_refused():
    for ranks in (1, 5):
        with pytest.raises(UserError, match=f"ranks={ranks}; give 2 to 4"):
            megatron_block(ranks, "")


def test_the_ranks_of_each_technique_hold_all_model_states_together():
    axes = techniques("All").axes[0]
    colour = {to_hex(CATEGORY_COLOURS[state]): state for state in ("parameters", "gradients", "optimizer states")}
    areas = {}
    for patch in axes.patches:
        state = colour.get(to_hex(patch.get_facecolor()))
        if state and patch.get_x() > 1:  # the bars further left are the techniques' colours
            key = int(patch.get_y()), state
            areas[key] = areas.get(key, 0) + patch.get_width() * patch.get_height()
    whole = areas[1, "parameters"]  # four ranks with a slice each
    copies = [[round(areas[row, state] / whole) for state in colour.values()] for row in range(6)]
    assert copies == [[4, 4, 4], [1, 1, 1], [1, 1, 1], [4, 4, 1], [4, 1, 1], [1, 1, 1]]


def test_the_two_memories_have_the_colours_of_their_categories():
    kept = ("parameters", "gradients", "optimizer states", "activations")
    assert {CATEGORY_COLOURS[category].lower() for category in kept} <= colours_of(offload_memories("").axes[0])


def test_a_narrow_range_of_step_times_has_plain_numbers_on_its_axis():
    fig = layout_times({"a": {"compute": 0.26}, "b": {"compute": 0.37}}, {"a": 0.28, "b": 0.38}, "")
    axis, (low, high) = fig.axes[1].xaxis, fig.axes[1].get_xlim()
    shown = [place for place in axis.get_majorticklocs() if low <= place <= high]
    assert axis.get_major_formatter().format_ticks(shown) == ["0.3", "0.4", "0.5", "0.6"]
    assert not any(axis.get_minor_formatter().format_ticks(axis.get_minorticklocs()))
