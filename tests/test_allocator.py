"""helpers.memory.allocator: the allocator's rules, by examples and for any order of tensors."""

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.memory.allocator import (
    Block,
    Segment,
    SimulatedAllocator,
    allocated_bytes,
    from_snapshot,
    reserved_bytes,
    segment_share,
)

KIB, MIB = 2**10, 2**20


def held(allocator):
    return [[(block.size, block.used) for block in segment.blocks] for segment in allocator.segments()]


def test_segments_have_the_sizes_of_the_rules():
    for nbytes, size in ((1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)):
        allocator = SimulatedAllocator()
        allocator.allocate(nbytes)
        assert [segment.size for segment in allocator.segments()] == [size]


def test_a_tensor_is_rounded_up_and_the_rest_of_its_block_stays_free():
    allocator = SimulatedAllocator()
    allocator.allocate(513)
    assert held(allocator) == [[(1024, True), (2 * MIB - 1024, False)]]
    allocator.allocate(3 * MIB)
    assert held(allocator)[1] == [(3 * MIB, True), (17 * MIB, False)]


def test_a_rest_of_up_to_1_mib_is_not_split_off_in_the_large_pool():
    allocator = SimulatedAllocator()
    allocator.allocate(11 * MIB)
    assert held(allocator) == [[(12 * MIB, True)]]


def test_the_smallest_block_that_fits_is_taken():
    allocator = SimulatedAllocator()
    first, second = allocator.allocate(40 * MIB), allocator.allocate(30 * MIB)
    allocator.free(first)
    allocator.free(second)
    allocator.allocate(30 * MIB)
    assert held(allocator) == [[(40 * MIB, False)], [(30 * MIB, True)]]


def test_free_neighbours_join_within_a_segment_and_not_across():
    allocator = SimulatedAllocator()
    tensors = [allocator.allocate(5 * MIB) for _ in range(8)]  # four to a segment of 20 MiB
    for tensor in (tensors[0], tensors[2], tensors[1], tensors[4]):
        allocator.free(tensor)
    assert held(allocator)[0] == [(15 * MIB, False), (5 * MIB, True)]
    for tensor in (tensors[3], *tensors[5:]):
        allocator.free(tensor)
    assert held(allocator) == [[(20 * MIB, False)]] * 2
    allocator.allocate(40 * MIB)
    assert reserved_bytes(allocator.segments()) == 80 * MIB


def grow(allocator):
    """Temporaries that grow, and a small tensor that stays in the place of each."""
    most = 0
    for step in range(10):
        temporary = allocator.allocate((20 + 4 * step) * MIB)
        most = max(most, allocated_bytes(allocator.segments()))
        allocator.free(temporary)
        allocator.allocate(2 * MIB)
    return most


def test_growing_temporaries_leave_holes_and_expandable_segments_do_not():
    default, expandable = SimulatedAllocator(), SimulatedAllocator(expandable=True)
    assert grow(default) == grow(expandable) == (56 + 9 * 2) * MIB
    # A keeper lies in the freed temporary, so that the next one, larger, needs a new segment.
    assert reserved_bytes(default.segments()) == sum(20 + 4 * step for step in range(10)) * MIB
    assert len(expandable.segments()) == 1
    assert reserved_bytes(expandable.segments()) == 80 * MIB  # 74, in pages of 20


def test_the_end_of_an_expandable_segment_is_taken_last():
    allocator = SimulatedAllocator(expandable=True)
    hole, wall = allocator.allocate(30 * MIB), allocator.allocate(10 * MIB)
    tail = allocator.allocate(16 * MIB)
    allocator.free(hole)
    allocator.free(tail)
    allocator.allocate(12 * MIB)  # the tail, of 20, is nearer to its size
    assert held(allocator) == [[(12 * MIB, True), (18 * MIB, False), (10 * MIB, True), (20 * MIB, False)]]
    allocator.free(wall)
    assert held(allocator) == [[(12 * MIB, True), (48 * MIB, False)]]


def test_a_block_belongs_to_the_stream_that_asked_for_it():
    for expandable in (False, True):
        allocator = SimulatedAllocator(expandable)
        allocator.free(allocator.allocate(40 * MIB))
        allocator.allocate(40 * MIB, stream=1)
        assert allocator.reserved == reserved_bytes(allocator.segments()) == 80 * MIB
        allocator.allocate(40 * MIB)
        assert allocator.reserved == 80 * MIB


def test_an_empty_cache_returns_segments_that_are_free_and_no_others():
    allocator = SimulatedAllocator()
    gone, half = allocator.allocate(40 * MIB), allocator.allocate(5 * MIB)
    allocator.allocate(5 * MIB)
    allocator.free(gone)
    allocator.free(half)
    allocator.empty()
    assert held(allocator) == [[(5 * MIB, False), (5 * MIB, True), (10 * MIB, False)]]
    assert allocator.reserved == 20 * MIB


def test_an_empty_cache_returns_whole_pages_and_later_tensors_fill_the_gap():
    allocator = SimulatedAllocator(expandable=True)
    low, gone, high = (allocator.allocate(size * MIB) for size in (10, 70, 30))  # pages of 20, to 120
    allocator.free(gone)
    allocator.empty()
    # Of 10 to 80, the page that the first tensor shares stays, and behind the last one nothing is left.
    assert held(allocator) == [[(10 * MIB, True), (10 * MIB, False), (30 * MIB, True), (10 * MIB, False)]]
    assert allocator.reserved == 60 * MIB
    allocator.allocate(25 * MIB)  # 10 are there, one page is added
    assert allocator.reserved == 80 * MIB
    allocator.free(low)
    allocator.free(high)
    allocator.allocate(60 * MIB)
    assert allocator.reserved == 120 * MIB


@given(
    steps=st.lists(st.tuples(st.integers(1, 50 * MIB), st.integers(0, 10)), min_size=1, max_size=40),
    expandable=st.booleans(),
)
@settings(deadline=None)
def test_nothing_is_lost_and_nothing_is_given_twice(steps, expandable):
    allocator, alive = SimulatedAllocator(expandable), {}
    for nbytes, victim in steps:
        before = reserved_bytes(allocator.segments())
        tensor = allocator.allocate(nbytes)
        assert tensor not in alive
        alive[tensor] = nbytes
        if victim < len(alive):
            gone = list(alive)[victim]
            allocator.free(gone)
            del alive[gone]
        segments = allocator.segments()
        assert reserved_bytes(segments) >= before
        used = [block for segment in segments for block in segment.blocks if block.used]
        assert len(used) == len(alive)
        assert sum(alive.values()) <= allocated_bytes(segments) <= sum(alive.values()) + len(alive) * (MIB + 512)
        for segment in segments:
            assert all(block.size > 0 and block.size % 512 == 0 for block in segment.blocks)
            assert not any(not a.used and not b.used for a, b in zip(segment.blocks, segment.blocks[1:], strict=False))


@given(st.integers(1, 60 * MIB))
def test_the_predictor_and_the_simulation_share_their_rules(nbytes):
    allocator = SimulatedAllocator()
    allocator.allocate(nbytes)
    (segment,) = allocator.segments()
    share = segment_share(nbytes)
    assert share <= segment.size
    if nbytes >= 10 * MIB:
        assert share == segment.size


def test_torchs_snapshot_is_read():
    """The keys are those of torch.cuda.memory_snapshot() in torch 2.11 and 2.13."""
    block = {"size": 512, "requested_size": 4, "address": 1024, "state": "active_allocated", "frames": []}
    free = block | {"size": 2 * MIB - 512, "address": 1536, "state": "inactive"}
    pending = block | {"state": "active_pending_free"}
    segment = {"device": 0, "address": 1024, "total_size": 2 * MIB, "blocks": [block, free], "is_expandable": False}
    found = from_snapshot([segment, segment | {"device": 1}, segment | {"address": 0, "blocks": [pending]}])
    assert found == [
        Segment(1024, (Block(512, True), Block(2 * MIB - 512, False))),
        Segment(0, (Block(512, False),)),
    ]
    assert (reserved_bytes(found), allocated_bytes(found)) == (2 * MIB + 512, 512)
