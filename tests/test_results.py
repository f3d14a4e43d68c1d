"""The table and the bars are what the measurements say; the README shows the newest."""

import pytest

from helpers.errors import UserError
from helpers.finetune.results import (
    END,
    ROOT,
    SPEED_RESULTS,
    memory_parts,
    nvml_used,
    read_results,
    speed_figure,
    with_table,
    with_tables,
)
from helpers.memory.units import GIB


def test_the_parts_of_a_bar_add_up_to_what_nvml_counted():
    for run in read_results()["runs"].values():
        parts = memory_parts(run)
        assert sum(parts.values()) == pytest.approx(nvml_used(run))
        assert min(parts.values()) >= 0


def test_zero_2_takes_hardly_more_memory_than_ddp():
    runs = read_results()["runs"]
    used = {label: sum(memory_parts(run).values()) for label, run in runs.items()}
    assert used["ZeRO-2"] - used["DDP"] < 200 / 1024
    assert max(runs["ZeRO-2"]["torch_allocated_gib"]) - max(runs["DDP"]["torch_allocated_gib"]) < 200 / 1024


def test_the_published_buckets_cost_no_more_than_their_size():
    ours, published = (read_results()["runs"][f"ZeRO-2{name}"] for name in ("", ", published 5e8 buckets"))
    added = max(published["torch_allocated_gib"]) - max(ours["torch_allocated_gib"])
    assert 0.5 < added < published["bucket_bytes"] / GIB


def test_the_readme_shows_the_newest_measurements():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(text) == text


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


def test_missing_files_and_markers_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no measurements"):
        read_results(tmp_path / "none.json")
    with pytest.raises(UserError, match="no place"):
        with_table("no markers", "some", "table")
    begin = "<!-- results: some -->"
    assert with_table(f"a {begin} old {END} b", "some", "new") == f"a {begin}\nnew\n{END} b"
