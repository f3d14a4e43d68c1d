"""The table and the bars are what the measurements say; the README shows the newest."""

import pytest

from helpers.errors import UserError
from helpers.finetune.results import BEGIN, END, RESULTS, ROOT, markdown_table, memory_parts, read_results, with_table
from helpers.memory.timeline import GIB


def test_the_parts_of_a_bar_add_up_to_what_nvml_counted():
    for run in read_results()["runs"].values():
        parts = memory_parts(run)
        used = max(p - b for p, b in zip(run["nvml_peak_gib"], run["nvml_before_gib"], strict=True))
        assert sum(parts.values()) == pytest.approx(used)
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
    assert with_table(text, markdown_table(read_results(RESULTS))) == text


def test_missing_files_and_markers_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no measurements"):
        read_results(tmp_path / "none.json")
    with pytest.raises(UserError, match="no place"):
        with_table("no markers", "table")
    assert with_table(f"a {BEGIN} old {END} b", "new") == f"a {BEGIN}\nnew\n{END} b"
