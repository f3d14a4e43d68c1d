"""helpers.plots.movement, cluster and roofline: what the figures of numbers that move, of links and of rates show."""

import pytest
from matplotlib.patches import FancyArrowPatch, Rectangle

from helpers.errors import UserError
from helpers.plots import RANK_COLOURS
from helpers.plots.cluster import cluster_sketch
from helpers.plots.movement import movement, ring_all_reduce, ring_rounds
from helpers.plots.roofline import roofline

BEFORE = [[10.0 * rank + slot for slot in range(3)] for rank in (1, 2, 3)]
SUMS = [60.0, 63.0, 66.0]


def arrows(axes):
    """(sender's row, receiver's row) of every arrow."""
    found = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    return [(arrow._posA_posB[0][1], arrow._posA_posB[1][1]) for arrow in found]


def standing_out(axes):
    """The numbers that are not pale: their text is white."""
    return [text.get_text() for text in axes.texts if text.get_color() == "white"]


def test_arrows_lead_from_every_summand_to_the_rank_that_keeps_the_sum():
    after = [[total if slot == rank else None for slot, total in enumerate(SUMS)] for rank in range(3)]
    (axes,) = movement(BEFORE, after, "reduce-scatter", follow=1).axes
    assert arrows(axes) == [(0, 1), (1, 1), (2, 1)]
    assert standing_out(axes) == ["11", "21", "31", "63"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1", "rank 2"]


def test_a_number_that_moved_keeps_its_colour_and_has_one_arrow():
    (axes,) = movement(BEFORE, [BEFORE[2], BEFORE[0], BEFORE[1]], "to the next", follow=1).axes
    assert arrows(axes) == [(0, 1)]
    assert standing_out(axes) == ["10", "11", "12"] * 2
    colours = [patch.get_facecolor()[:3] for patch in axes.patches if isinstance(patch, Rectangle)]
    assert colours[:3] == colours[12:15]  # rank 0's before, rank 1's after


def test_an_empty_slot_is_outlined_and_has_no_number():
    before = [[1.0, None], [None, 2.0]]
    (axes,) = movement(before, [[1.0, 2.0]] * 2, "all-gather").axes
    outlined = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_facecolor()[3] == 0]
    assert len(outlined) == 2
    assert [text.get_text() for text in axes.texts] == ["1", "2", "1", "2", "1", "2", "before", "after"]


@pytest.mark.parametrize(("after", "follow"), [(BEFORE[:2], 0), (BEFORE, 3), (BEFORE, -1)])
def test_ranks_that_do_not_exist_are_named(after, follow):
    with pytest.raises(UserError, match=f"3 ranks before, {len(after)} after, follow={follow}"):
        movement(BEFORE, after, "", follow)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_a_ring_sums_in_the_first_half_and_gathers_in_the_second(world_size):
    rounds = ring_rounds(world_size)
    assert len(rounds) == 2 * (world_size - 1) + 1
    complete = frozenset(range(world_size))
    half, end = rounds[world_size - 1][0], rounds[-1][0]
    # After half of the rounds every rank has one complete sum, each rank another; at the end it has all.
    owned = [[slot for slot, ranks in enumerate(row) if ranks == complete] for row in half]
    assert sorted(slot for row in owned for slot in row) == list(range(world_size))
    assert all(len(row) == 1 for row in owned)
    assert all(ranks == complete for row in end for ranks in row)
    for _, arrived in rounds[1:]:
        assert sorted(rank for rank, _ in arrived) == list(range(world_size))  # each rank receives one slot per round


def test_the_rounds_of_a_ring_are_drawn_with_what_arrived_framed():
    (axes,) = ring_all_reduce(2, "ring").axes
    assert [text.get_text() for text in axes.texts] == ["start", "round 1", "round 2", "reduce-scatter", "all-gather"]
    frames = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(frames) == 2 * 2
    with pytest.raises(UserError, match="1 ranks make no ring"):
        ring_all_reduce(1, "")


def test_every_link_of_the_sketch_has_its_rate():
    rates = {"GPU memory": "1 GB/s", "NVLink": "2 GB/s", "PCIe": "3 GB/s", "InfiniBand": "4 GB/s"}
    (axes,) = cluster_sketch(rates, "two nodes").axes
    texts = [text.get_text() for text in axes.texts]
    for link in ("NVLink, 2 GB/s", "PCIe, 3 GB/s"):
        assert texts.count(link) == 2
    assert texts.count("InfiniBand, 4 GB/s") == 1 and texts.count("1 GB/s") == texts.count("GPU 0") * 4


def test_the_roof_bends_where_both_limits_meet():
    (axes,) = roofline({10.0: 5e12, 1000.0: 90e12}, peak=100e12, bandwidth=1e12, title="roof").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["memory bound"].get_xydata()[1].tolist() == [100, 100]
    assert lines["memory bound"].get_ydata()[0] == lines["memory bound"].get_xdata()[0]  # slope: 1 byte/ps
    assert lines["compute bound"].get_ydata().tolist() == [100, 100]
    assert lines["measured matmul"].get_xydata().tolist() == [[10, 5], [1000, 90]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("arithmetic intensity (FLOP per byte)", "TFLOP/s")
    assert lines["measured matmul"].get_color() not in (RANK_COLOURS[1], RANK_COLOURS[2])
    for rates, peak in (({}, 1.0), ({1.0: 0.0}, 1.0), ({1.0: 1.0}, 0.0)):
        with pytest.raises(UserError, match="roofline"):
            roofline(rates, peak, 1.0, "")
