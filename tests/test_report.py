"""helpers.memory.report: left-overs and their names, what is compared with what, the table, bad input."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import UserError
from helpers.memory.categories import CATEGORIES, ITEMS
from helpers.memory.measured import RankMemory
from helpers.memory.report import SOURCES, Difference, RankReport, memory_table, rank_reports, totals_table
from helpers.memory.units import GIB, KIB, MIB, Unit, unit_for

ON_CPU = RankMemory(None, None, None, 3 * GIB)
PREDICTED = {"parameters": 10 * GIB, "activations": 4 * GIB, "logits and loss": GIB, "CUDA context": GIB // 2}
COUNTED = {"parameters": 10 * GIB, "activations": 3 * GIB, "buffers": 1000}


def report(allocated=15 * GIB, reserved=17 * GIB, nvml=19 * GIB, rank=0, predicted=PREDICTED, counted=COUNTED):
    return RankReport(rank, predicted, counted, RankMemory(allocated, reserved, nvml, 3 * GIB))


def cells(line):
    """The cells of an aligned line: they stand at least two blanks apart."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


# --- numbers


def test_left_overs_have_names_and_close_the_gap_between_the_sources():
    assert report().totals == {
        "predicted": 15 * GIB + GIB // 2,
        "counted": 13 * GIB + 1000,
        "allocated": 15 * GIB,
        "reserved": 17 * GIB,
        "NVML": 19 * GIB,
    }
    assert report().left_over == {
        "not counted: temporaries": 2 * GIB - 1000,
        "allocator cache": 2 * GIB,
        "CUDA context and NCCL": 2 * GIB,
    }


def test_without_a_gpu_nothing_is_made_up():
    on_cpu = RankReport(0, PREDICTED, COUNTED, ON_CPU)
    assert set(on_cpu.left_over.values()) == {None}
    assert [on_cpu.totals[source] for source in SOURCES[2:]] == [None] * 3
    assert [on_cpu.bars[source] for source in SOURCES[2:]] == [None] * 3
    rows = {cells(line)[0]: cells(line)[1:] for line in str(memory_table([on_cpu])).splitlines()}
    assert rows["allocator cache"] == ["not available"]
    assert rows["total"] == ["15.50", "13.00", *["not available"] * 3]


def test_without_an_nvidia_driver_torchs_numbers_stay():
    left = report(nvml=None).left_over
    assert (left["allocator cache"], left["CUDA context and NCCL"]) == (2 * GIB, None)
    assert report(nvml=None).bars["NVML"] is None


def test_a_prediction_is_compared_like_with_like():
    assert report(nvml=31 * GIB).difference == Difference("NVML", -50.0)
    assert report(allocated=12 * GIB, nvml=None).difference == Difference("allocated", 25.0)
    torch_only = {"parameters": 9 * GIB, "logits and loss": GIB}
    assert report(allocated=8 * GIB, predicted=torch_only).difference == Difference("allocated", 25.0)
    on_cpu = RankReport(0, torch_only | {"allocator allowance": GIB, "NCCL": GIB}, {"parameters": 10 * GIB}, ON_CPU)
    assert on_cpu.difference == Difference("counted", 0.0)
    assert report(predicted={}).difference is None
    assert RankReport(0, PREDICTED, {}, ON_CPU).difference is None


SIZES = st.integers(0, 2**40)


@given(
    st.dictionaries(st.sampled_from(ITEMS), SIZES),
    st.dictionaries(st.sampled_from(CATEGORIES), SIZES),
    st.none() | st.tuples(SIZES, SIZES),
    st.none() | SIZES,
)
def test_any_report_adds_up_can_be_saved_and_shown(predicted, counted, torchs, nvml):
    allocated, reserved = (torchs[0], sum(torchs)) if torchs else (None, None)
    made = RankReport(3, predicted, counted, RankMemory(allocated, reserved, nvml, 1))
    for source, parts in made.bars.items():
        total = made.totals[source]
        assert parts is None if total is None else sum(parts.values()) == total and min(parts.values(), default=0) >= 0
    record = json.loads(json.dumps(asdict(made)))
    assert RankReport(**record | {"measured": RankMemory(**record["measured"])}) == made
    shown = memory_table([made])
    assert len({len(row) for row in (shown.header, *shown.rows)}) == 1
    lengths = [line.count("|") for line in shown._repr_markdown_().splitlines()]
    assert set(lengths) == {len(shown.header) + 1} and len(lengths) == len(shown.rows) + 2


def test_what_a_prediction_tells_apart_outside_torch_is_one_part_as_in_a_measurement():
    bars = report(predicted=PREDICTED | {"NCCL": GIB}).bars
    assert bars["predicted"]["CUDA context and NCCL"] == GIB + GIB // 2
    assert set(bars["predicted"]) == {"parameters", "activations", "logits and loss", "CUDA context and NCCL"}
    assert bars["NVML"]["CUDA context and NCCL"] == 2 * GIB
    assert report(predicted={"parameters": GIB}).bars["predicted"] == {"parameters": GIB}
    assert report(predicted={}).bars["predicted"] is None


def test_a_negative_rest_is_shown_as_it_is_and_never_drawn():
    made = report(allocated=12 * GIB)
    assert made.left_over["not counted: temporaries"] == -GIB - 1000
    assert made.bars["allocated"] == {"not told apart": 12 * GIB}
    assert made.bars["reserved"] == {"not told apart": 12 * GIB, "allocator cache": 5 * GIB}
    assert "-1.00" in str(memory_table([made]))


# --- the table


def test_the_table_has_a_row_per_item_and_a_column_per_source():
    lines = str(memory_table([report()])).splitlines()
    assert cells(lines[0]) == ["GiB", "predicted", "counted", "allocated", "reserved", "NVML", "left over"]
    rows = {cells(line)[0]: cells(line)[1:] for line in lines[1:]}
    assert rows == {
        "parameters": ["10.00", "10.00"],
        "buffers": ["0.00", "<0.01"],
        "activations": ["4.00", "3.00"],
        "logits and loss": ["1.00"],
        "CUDA context": ["0.50"],
        "not counted: temporaries": ["2.00"],
        "allocator cache": ["2.00"],
        "CUDA context and NCCL": ["2.00"],
        "total": ["15.50", "13.00", "15.00", "17.00", "19.00"],
        "predicted against NVML": ["-18.4 %"],
    }
    for name in ("allocator cache", "total"):  # numbers end where their column does
        [line] = [line for line in lines if line.startswith(name)]
        end = "left over" if name == "allocator cache" else "NVML"
        assert len(line) == lines[0].index(end) + len(end)


def test_runs_are_compared_in_one_table():
    runs = {"plain": report(), "in\ntwo lines": report(allocated=GIB, predicted={})}
    table = totals_table(runs, {"on the host": {"plain": None, "in\ntwo lines": 2 * GIB}})
    assert [*table.header] == ["GiB", *SOURCES, "on the host", "prediction"]
    totals = ["15.50", "13.00", "15.00", "17.00", "19.00"]
    assert table.rows[0] == ["plain", *totals, "not available", "-18.4 %"]
    assert table.rows[1] == ["in two lines", "not available", "13.00", "1.00", *totals[3:], "2.00", ""]
    with pytest.raises(UserError, match="for each run"):
        totals_table({}, {})


def test_ranks_with_one_prediction_have_a_report_each():
    first, second = rank_reports(PREDICTED, [COUNTED, {}], [report().measured, ON_CPU])
    assert first == report() and second == RankReport(1, PREDICTED, {}, ON_CPU)


def test_every_rank_has_its_rows_in_the_same_unit():
    text = str(memory_table([report(), report(rank=1, nvml=20 * GIB)]))
    assert text.count("GiB") == 1 and "MiB" not in text
    assert [line for line in text.splitlines() if line.startswith("rank")] == ["rank 0", "rank 1"]
    assert [cells(line)[-1] for line in text.splitlines() if line.startswith("total")] == ["19.00", "20.00"]


def ranks_of(*reports):
    return [line for line in str(memory_table(reports)).splitlines() if line.startswith("rank")]


def test_a_rank_like_the_first_has_one_row_with_the_largest_difference():
    like = [report(), report(rank=1), report(rank=2, nvml=19 * GIB + GIB // 20)]
    assert ranks_of(*like) == ["rank 0", "rank 1: same as rank 0", "rank 2: same as rank 0, within 0.05 GiB"]
    assert str(memory_table(like)).count("total") == 1


def test_a_rank_that_differs_in_one_number_has_all_its_rows():
    other_items = report(rank=1, predicted=PREDICTED | {"parameters": 9 * GIB, "activations": 5 * GIB})
    assert ranks_of(report(), other_items) == ["rank 0", "rank 1"]
    assert ranks_of(report(), report(rank=1, nvml=None)) == ["rank 0", "rank 1"]
    assert ranks_of(report(rank=3), report(rank=4)) == ["rank 3", "rank 4: same as rank 3"]


def test_a_notebook_shows_markdown():
    first, second, *_, last = memory_table([report()])._repr_markdown_().splitlines()
    assert first == "| GiB | predicted | counted | allocated | reserved | NVML | left over |"
    assert second == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert last == "| predicted against NVML | -18.4 % |  |  |  |  |  |"


@pytest.mark.parametrize(
    ("sizes", "unit"),
    [
        ([GIB, 5], Unit("GiB", GIB)),
        ([GIB - 1], Unit("MiB", MIB)),
        ([MIB - 1], Unit("KiB", KIB)),
        ([], Unit("KiB", KIB)),
    ],
)
def test_the_unit_follows_the_largest_number(sizes, unit):
    assert unit_for(sizes) == unit


@given(st.integers(-(2**45), 2**45))
def test_an_amount_is_never_rounded_to_nothing(size):
    text = Unit("GiB", GIB).amount(size)
    assert (text == "0.00") == (size == 0)
    if "0.01" not in text:
        assert float(text.replace(",", "")) == pytest.approx(size / GIB, abs=0.0051)


# --- bad input


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"predicted": {"logits": 1}}, "predicted of rank 7: unknown item 'logits'; give some of parameters, "),
        ({"counted": {"NCCL": 1}}, "counted of rank 7: unknown item 'NCCL'"),
        ({"counted": {"parameters": -1}}, "'parameters' is -1; give a whole number of bytes"),
        ({"predicted": {"NCCL": 0.5}}, "'NCCL' is 0.5; give a whole number of bytes"),
        ({"predicted": {"NCCL": True}}, "'NCCL' is True"),
        ({"nvml": -5}, "measured of rank 7: 'NVML' is -5"),
        ({"reserved": GIB}, f"measured of rank 7: {15 * GIB} bytes allocated of {GIB} reserved"),
    ],
)
def test_bad_input_is_one_clear_line(change, says):
    with pytest.raises(UserError) as caught:
        report(rank=7, **change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_of_nothing_is_refused():
    with pytest.raises(UserError, match="no report to show"):
        memory_table([])
