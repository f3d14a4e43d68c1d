"""Segments and blocks of a caching allocator: read from torch, or simulated without a GPU.

Real segments come from torch's snapshot. :class:`SimulatedAllocator` follows c10/cuda/CUDACachingAllocator.cpp (torch
2.11 to 2.13) for unlimited memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers.errors import UserError
from helpers.memory.allocator_pools import Piece, Pool, round_up
from helpers.memory.units import MIB

# Bytes, as in c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize, kSmallSize, kMinLargeAlloc, kSmallBuffer, kLargeBuffer,
# kRoundLarge.
MIN_BLOCK_SIZE = 512
SMALL_SIZE = MIB
MIN_LARGE_ALLOC = 10 * MIB
SMALL_BUFFER = 2 * MIB
LARGE_BUFFER = 20 * MIB
ROUND_LARGE = 2 * MIB
# Addresses that an expandable segment reserves, many times a GPU's memory.
ADDRESSES = LARGE_BUFFER * 2**24


def segment_share(size: int) -> int:
    """Return the bytes of a segment that a tensor of ``size`` bytes uses up (``get_allocation_size``).

    A tensor of 1 to 10 MiB gets a place in a segment of 20 MiB and shares it with as many of its size as fit.
    """
    size = round_up(size, MIN_BLOCK_SIZE)
    if size <= SMALL_SIZE:
        return size
    if size < MIN_LARGE_ALLOC:
        return LARGE_BUFFER // (LARGE_BUFFER // size)
    return round_up(size, ROUND_LARGE)


@dataclass(frozen=True)
class Block:
    """A part of a segment: free, or used by one tensor.

    Attributes:
        size: Bytes.
        used: Whether a tensor has it.
    """

    size: int
    used: bool


@dataclass(frozen=True)
class Segment:
    """Memory that the allocator got from the driver in one piece.

    Attributes:
        address: Where it starts.
        blocks: Its blocks in the order of their addresses.
    """

    address: int
    blocks: Sequence[Block]

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(block.size for block in self.blocks)

    @property
    def used(self) -> int:
        """Bytes of the blocks that tensors use."""
        return sum(block.size for block in self.blocks if block.used)


def reserved_bytes(segments: Sequence[Segment]) -> int:
    """Count the bytes that the allocator holds.

    Args:
        segments: All segments of the allocator.

    Returns:
        Bytes, used by tensors or free.
    """
    return sum(segment.size for segment in segments)


def allocated_bytes(segments: Sequence[Segment]) -> int:
    """Count the bytes that the allocator has given to tensors.

    Args:
        segments: All segments of the allocator.

    Returns:
        Bytes.
    """
    return sum(segment.used for segment in segments)


def from_snapshot(snapshot: Sequence[dict[str, Any]], device: int = 0) -> list[Segment]:
    """Read the segments of one GPU from torch's allocator.

    Args:
        snapshot: What ``torch.cuda.memory_snapshot()`` returned.
        device: Index of the GPU.

    Returns:
        The GPU's segments, in the order of the snapshot.
    """
    return [
        Segment(
            segment["address"],
            tuple(Block(block["size"], block["state"] == "active_allocated") for block in segment["blocks"]),
        )
        for segment in snapshot
        if segment["device"] == device
    ]


class SimulatedAllocator:
    """Place tensors as torch's caching allocator does, without a GPU.

    Sizes are rounded up to 512 bytes. Each stream has one pool for tensors of up to 1 MiB and one for larger ones. A
    tensor gets the smallest free block of its pool that is large enough. The rest of that block stays free if it has at
    least 512 bytes (small pool) or more than 1 MiB (large pool). If no block is large enough, the driver provides a new
    segment: 2 MiB for small tensors, 20 MiB for those below 10 MiB, otherwise the size rounded up to 2 MiB. A freed
    block merges with its free neighbours in the segment. Only :meth:`empty` returns memory to the driver.

    Args:
        expandable: Simulate ``expandable_segments:True``. Each pool then has one segment that grows by whole pages of
            2 MiB (small pool) or 20 MiB. A free block that could grow is used only if no other is large enough.
    """

    def __init__(self, expandable: bool = False) -> None:
        self._expandable = expandable
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._placed: dict[int, Piece] = {}
        self._next_address = 0
        self._next_tensor = 0

    @property
    def reserved(self) -> int:
        """Bytes that the allocator holds, used by tensors or free."""
        return sum(pool.reserved for pool in self._pools.values())

    def allocate(self, nbytes: int, stream: int = 0) -> int:
        """Give memory to a tensor.

        Args:
            nbytes: Size of the tensor in bytes.
            stream: Number of the stream that asks for it. No other stream can have the block afterwards.

        Returns:
            A handle for :meth:`free`.

        Raises:
            UserError: ``nbytes`` is below 1.
        """
        if nbytes < 1:
            raise UserError(f"SimulatedAllocator: a tensor of {nbytes} bytes; give a number above 0")
        size = round_up(nbytes, MIN_BLOCK_SIZE)
        small = size <= SMALL_SIZE
        pool = self._pools.setdefault((stream, small), Pool(SMALL_BUFFER if small else LARGE_BUFFER, self._expandable))
        piece = pool.best_fit(size) or self._grow(pool, size)
        rest = piece.size - size
        pool.free.discard(piece)
        if rest >= MIN_BLOCK_SIZE if small or self._expandable else rest > SMALL_SIZE:
            pool.free.add(piece.split(size))
        piece.used = True
        self._next_tensor += 1
        self._placed[self._next_tensor] = piece
        return self._next_tensor

    def free(self, tensor: int) -> None:
        """Free a tensor's memory.

        Args:
            tensor: The handle that :meth:`allocate` returned.
        """
        piece = self._placed.pop(tensor)
        piece.used = False
        piece.pool.merge(piece)

    def empty(self) -> None:
        """Return free memory to the driver (``torch.cuda.empty_cache``): whole segments, or pages that can grow."""
        for pool in self._pools.values():
            pool.empty()

    def segments(self) -> list[Segment]:
        """List the segments.

        Returns:
            All segments, sorted by address.
        """
        held = []
        for pool in self._pools.values():
            for first in pool.segments:
                blocks = tuple(Block(piece.size, piece.used) for piece in first.onwards() if piece.mapped)
                if blocks:
                    held.append(Segment(first.address, blocks))
        return sorted(held, key=lambda segment: segment.address)

    def _grow(self, pool: Pool, size: int) -> Piece:
        if self._expandable:
            if not pool.segments:
                pool.add_segment(self._next_address, ADDRESSES, mapped=False)
                self._next_address += ADDRESSES
            return pool.map(size)
        nbytes = pool.page if size < MIN_LARGE_ALLOC else round_up(size, ROUND_LARGE)
        self._next_address += nbytes
        return pool.add_segment(self._next_address - nbytes, nbytes, mapped=True)
