"""The table and the bars are what the measurements say; the pages show the newest."""

import json
import re

import pytest

from helpers.errors import UserError
from helpers.finetune.full_results import full_table
from helpers.finetune.readme import END, PAGES, with_table, with_tables
from helpers.finetune.results import (
    ROOT,
    SPEED_RESULTS,
    by_way,
    gpu_table,
    markdown_table,
    memory_figure,
    memory_parts,
    nvml_used,
    offload_table,
    read_results,
    run_figure,
    speed_figure,
    speed_table,
)
from helpers.memory.units import GIB


def test_the_parts_of_a_bar_add_up_to_what_nvml_counted():
    for run in read_results()["runs"].values():
        parts = memory_parts(run)
        assert sum(parts.values()) == pytest.approx(nvml_used(run))
        assert min(parts.values()) >= 0


@pytest.fixture(scope="module")
def ways():
    return by_way(read_results())


@pytest.mark.parametrize("gpus", [1, 2])
def test_zero_2_takes_hardly_more_memory_than_ddp(ways, gpus):
    zero_2, ddp = ways["ZeRO-2"][gpus], ways["DDP"][gpus]
    assert max(zero_2["torch_allocated_gib"]) - max(ddp["torch_allocated_gib"]) < 200 / 1024
    # On one GPU, DeepSpeed opens an NCCL communicator, which one process does not need.
    assert gpus == 1 or nvml_used(zero_2) - nvml_used(ddp) < 200 / 1024


def test_the_published_buckets_cost_no_more_than_their_size(ways):
    for gpus in (1, 2):
        ours, published = (ways[f"ZeRO-2{name}"][gpus] for name in ("", ", published 5e8 buckets"))
        added = max(published["torch_allocated_gib"]) - max(ours["torch_allocated_gib"])
        assert 0.5 < added < published["bucket_bytes"] / GIB


def test_zero_3_halves_the_weights_on_two_gpus(ways):
    weights = {gpus: memory_parts(run)["parameters"] for gpus, run in ways["ZeRO-3"].items()}
    assert weights[2] == pytest.approx(weights[1] / 2, rel=0.01)


def test_the_memory_table_was_made_in_one_run_of_the_benchmark():
    results = read_results()
    assert len(results["runs"]) >= 16 and not results["commit"].endswith("+")
    for run in results["runs"].values():
        assert max(run["nvml_before_gib"]) < 0.1  # nobody else was on the GPU


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_show_the_newest_measurements(page):
    assert with_tables(page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (page.parent / link).exists()]


def test_the_front_page_is_short():
    text = re.sub(r"```.*?```|[|`#*]", " ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(text.split()) <= 900


def test_the_fast_configurations_are_as_fast_and_as_small_as_the_course_says():
    runs = read_results(SPEED_RESULTS)["runs"]
    published, fast = (runs[name] for name in ("published recipe", "lora_fast.yaml: packing, compiled layers"))
    assert fast["tokens_per_second_per_gpu"] > 10 * published["tokens_per_second_per_gpu_range"][1]
    assert nvml_used(runs["lora_24gb.yaml"]) < 22 and nvml_used(runs["lora_14gb.yaml"]) < 13.4
    # The same rows in the same order, whatever makes them faster: the losses of packed runs agree.
    one, every = (runs[f"8 packs a step, {gpus}"]["loss"] for gpus in ("one GPU", "every GPU"))
    assert one == pytest.approx(every, abs=5e-3)


def test_the_speed_figure_has_a_bar_for_each_run_on_one_gpu():
    runs = read_results(SPEED_RESULTS)["runs"]
    left, right = speed_figure(read_results(SPEED_RESULTS)).axes
    alone = [name for name, run in runs.items() if run["ranks"] == 1]
    assert [label.get_text() for label in left.get_yticklabels()] == alone
    assert [bar.get_width() for bar in right.patches] == pytest.approx([nvml_used(runs[name]) for name in alone])


def measured(name, config, ranks, nvml, rate, **changes):
    return {
        "name": name,
        "config": config,
        "ranks": ranks,
        "zero_stage": 0,
        "bucket_bytes": 0,
        "trainable_parameters": 2**20,
        "frozen_parameters": 2**32,
        "loaded_gib": 4.0,
        "tokens_per_second_per_gpu": rate,
        "tokens_per_second_per_gpu_range": [rate - 10, rate + 10],
        "nvml_before_gib": [0.0] * ranks,
        "nvml_peak_gib": nvml,
        "torch_allocated_gib": [value - 2 for value in nvml],
        "torch_reserved_gib": [value - 1 for value in nvml],
    } | changes


def test_the_speed_table_has_the_headlines_that_were_measured():
    results = read_results(SPEED_RESULTS)
    fast, rounded = results["runs"]["lora_fast.yaml: packing, compiled layers"], "lora_fp8.yaml: frozen matrices in fp8"
    results["runs"].pop(rounded, None)
    table = speed_table(results)
    assert "lora_fast.yaml" in table and "fp8" not in table
    faster = [2 * rate for rate in fast["tokens_per_second_per_gpu_range"]]
    results["runs"][rounded] = fast | {"tokens_per_second_per_gpu_range": faster}
    fastest_published = results["runs"]["published recipe"]["tokens_per_second_per_gpu_range"][1]
    assert speed_table(results).startswith(f"At least {faster[0] / fastest_published:.0f} times as fast")
    assert f"| {rounded} | 1 |" in speed_table(results)


def test_the_table_of_full_trainings_has_a_line_for_each(one_and_two_gpus):
    run = measured("24 GiB budget", "sft_24gb.yaml", 2, [23.0, 22.5], 5900)
    run |= {"deepspeed": "ds_zero_3_offload_full.json", "tokens_per_gpu_and_step": 65536.0}
    lines = full_table(one_and_two_gpus | {"runs": {"24 GiB budget": run}}).splitlines()
    files = "`sft_24gb.yaml` with `ds_zero_3_offload_full.json`"
    assert lines[2] == f"| 24 GiB budget: {files} | 2 | 65,536 | 5,900 (5,890 to 5,910) | 23.00 |"


@pytest.fixture
def one_and_two_gpus():
    runs = [
        measured("small", "qlora.yaml", 1, [7.0], 100),
        measured("small", "qlora.yaml", 2, [7.5, 7.25], 90),
        measured("fast", "lora_fast.yaml", 1, [30.0], 9000),
        measured("middle", "lora_24gb.yaml", 1, [15.5], 5000),
        measured("sharded", "lora.yaml", 2, [20.0, 19.0], 300),
    ]
    return {
        "random_weights": True,
        "mean_tokens": 133.0,
        "machine": {
            "gpus": [{"name": "GPU"}] * 2,
            "versions": dict.fromkeys(("torch", "transformers", "deepspeed"), "1"),
        },
        "runs": {f"{run['name']}, {run['ranks']}": run for run in runs},
    }


def test_the_table_puts_one_and_two_gpus_into_one_line(one_and_two_gpus):
    lines = markdown_table(one_and_two_gpus).splitlines()
    assert lines[2] == "| small | 100 (90 to 110) | 7.00 | 90 (80 to 100) | 7.50 / 7.25 |"
    assert lines[3] == "| fast | 9,000 (8,990 to 9,010) | 30.00 |  |  |"
    assert {line.count("|") for line in lines[:6]} == {6}


def test_the_gpu_table_has_the_fastest_run_that_fits_each_size(one_and_two_gpus):
    lines = gpu_table(one_and_two_gpus).splitlines()[2:]
    assert lines[:6] == [
        "| 8 GB | small | 7.00 | 100 (90 to 110) |",
        "| 12 GB | small | 7.00 | 100 (90 to 110) |",
        "| 16 GB | small | 7.00 | 100 (90 to 110) |",  # 15.5 of 16 would be more than 95 %
        "| 24 GB | middle | 15.50 | 5,000 (4,990 to 5,010) |",
        "| 2 x 24 GB | sharded | 20.00 | 300 (290 to 310) |",
        "| 80 GB | fast | 30.00 | 9,000 (8,990 to 9,010) |",
    ]
    assert lines[7].startswith("2 x GPU, random weights of the full size, examples of 133 tokens")


def test_the_gpu_table_has_a_second_line_where_fp8_is_the_fastest(one_and_two_gpus):
    rounded = {"fp8": measured("rounded", "lora_fp8.yaml", 1, [15.0], 8000, fp8=True)}
    lines = gpu_table(one_and_two_gpus | {"runs": one_and_two_gpus["runs"] | rounded}).splitlines()[2:]
    assert lines[2:6] == [
        "| 16 GB | small | 7.00 | 100 (90 to 110) |",
        "| 16 GB, compute capability 8.9 or later | rounded | 15.00 | 8,000 (7,990 to 8,010) |",
        "| 24 GB | middle | 15.50 | 5,000 (4,990 to 5,010) |",
        "| 24 GB, compute capability 8.9 or later | rounded | 15.00 | 8,000 (7,990 to 8,010) |",
    ]
    assert sum("8.9" in line for line in lines) == 2


def test_the_offload_table_has_a_line_per_setting():
    run = {"setting": {"deepspeed": "ds.json"}, "tokens_per_gpu_and_step": 8192, "tokens_per_second_per_gpu": 489.1}
    run |= {"nvml_peak": [2 * GIB, 3.5 * GIB], "host_bytes": 148 * GIB}
    lines = offload_table({"parameters": 6_243_584_000, "settings": {"small": run}}).splitlines()
    assert lines[0].startswith("| all 6.24 billion parameters |")
    assert lines[2:] == ["| small, `ds.json` | 8,192 | 489 | 3.50 | 148 |"]


def test_weights_are_what_was_loaded_without_the_adapter(one_and_two_gpus):
    parts = memory_parts(one_and_two_gpus["runs"]["small, 2"])
    assert parts["parameters"] == 4.0 - 4 * 2**20 / GIB and sum(parts.values()) == pytest.approx(7.5)
    labels = [label.get_text() for label in memory_figure(one_and_two_gpus).axes[0].get_yticklabels()]
    assert labels == ["small, 1 GPU", "small, 2 GPUs", "fast, 1 GPU", "middle, 1 GPU", "sharded, 2 GPUs"]


def test_the_figure_of_a_run_has_a_row_per_gpu_and_its_phases(tmp_path):
    path = tmp_path / "timeline.json"
    gpu = {"index": 0, "name": "GPU", "total_bytes": 80 * GIB, "seconds": [0.0, 5.0], "used": [0, GIB]}
    phases = [{"name": "load model", "rank": 0, "start": 101.0, "end": 103.0}]
    content = {"start": 100.0, "duration": 5.0, "gpus": [gpu, gpu | {"index": 1}], "note": None, "phases": phases}
    path.write_text(json.dumps(content | {"random_weights": True}))
    figure = run_figure(path)
    assert len(figure.axes) == 3 and "random weights, full size" in figure.get_suptitle()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["load model"]


def test_missing_files_and_markers_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no measurements"):
        read_results(tmp_path / "none.json")
    with pytest.raises(UserError, match="no place"):
        with_table("no markers", "some", "table")
    begin = "<!-- results: some -->"
    assert with_table(f"a {begin} old {END} b", "some", "new") == f"a {begin}\nnew\n{END} b"
