"""Segments and blocks of a caching allocator: read from torch, or simulated without a GPU.

Real segments come from torch's snapshot. :class:`SimulatedAllocator` follows c10/cuda/CUDACachingAllocator.cpp (torch
2.11 to 2.13) for one stream and unlimited memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers.errors import UserError
from helpers.memory.units import MIB

# Bytes, as in c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize, kSmallSize, kMinLargeAlloc, kSmallBuffer, kLargeBuffer,
# kRoundLarge.
MIN_BLOCK_SIZE = 512
SMALL_SIZE = MIB
MIN_LARGE_ALLOC = 10 * MIB
SMALL_BUFFER = 2 * MIB
LARGE_BUFFER = 20 * MIB
ROUND_LARGE = 2 * MIB


def segment_share(size: int) -> int:
    """Return the bytes of a segment that a tensor of ``size`` bytes uses up (``get_allocation_size``).

    A tensor of 1 to 10 MiB gets a place in a segment of 20 MiB and shares it with as many of its size as fit.
    """
    size = _round_up(size, MIN_BLOCK_SIZE)
    if size <= SMALL_SIZE:
        return size
    if size < MIN_LARGE_ALLOC:
        return LARGE_BUFFER // (LARGE_BUFFER // size)
    return _round_up(size, ROUND_LARGE)


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

    Sizes are rounded up to 512 bytes. Tensors of up to 1 MiB have a pool of their own. A tensor gets the smallest free
    block of its pool that is large enough. The rest of that block stays free if it has at least 512 bytes (small pool)
    or more than 1 MiB (large pool). If no block is large enough, the driver provides a new segment: 2 MiB for small
    tensors, 20 MiB for those below 10 MiB, otherwise the size rounded up to 2 MiB. A freed block merges with its free
    neighbours in the segment. Nothing is ever returned to the driver.

    Args:
        expandable: Simulate ``expandable_segments:True``. Each pool then has one segment that grows at its end by whole
            pages of 2 MiB (small pool) or 20 MiB. The free block at that end is used only if no other is large enough.
    """

    def __init__(self, expandable: bool = False) -> None:
        self._expandable = expandable
        self._pools: dict[bool, list[list[_Piece]]] = {True: [], False: []}
        self._placed: dict[int, _Piece] = {}
        self._next_address = 0
        self._next_tensor = 0

    def allocate(self, nbytes: int) -> int:
        """Give memory to a tensor.

        Args:
            nbytes: Size of the tensor in bytes.

        Returns:
            A handle for :meth:`free`.

        Raises:
            UserError: ``nbytes`` is below 1.
        """
        if nbytes < 1:
            raise UserError(f"SimulatedAllocator: a tensor of {nbytes} bytes; give a number above 0")
        size = _round_up(nbytes, MIN_BLOCK_SIZE)
        small = size <= SMALL_SIZE
        segment, piece = self._find_free(size, small) or self._grow(size, small)
        rest = piece.size - size
        if rest >= MIN_BLOCK_SIZE if small or self._expandable else rest > SMALL_SIZE:
            segment.insert(segment.index(piece) + 1, _Piece(piece.address + size, rest))
            piece.size = size
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
        segment = next(s for pool in self._pools.values() for s in pool if any(p is piece for p in s))
        index = segment.index(piece)
        # Merge with the next piece, then the previous one with both.
        for first in (index, index - 1):
            if 0 <= first and first + 1 < len(segment) and not (segment[first].used or segment[first + 1].used):
                segment[first].size += segment.pop(first + 1).size

    def segments(self) -> list[Segment]:
        """List the segments.

        Returns:
            All segments, sorted by address.
        """
        held = [
            Segment(segment[0].address, tuple(Block(piece.size, piece.used) for piece in segment))
            for pool in self._pools.values()
            for segment in pool
        ]
        return sorted(held, key=lambda segment: segment.address)

    def _find_free(self, size: int, small: bool) -> "tuple[list[_Piece], _Piece] | None":
        fitting = [
            (segment, piece)
            for segment in self._pools[small]
            for piece in segment
            if not piece.used and piece.size >= size
        ]

        def order(found: "tuple[list[_Piece], _Piece]") -> tuple[bool, int, int]:
            segment, piece = found
            return self._expandable and piece is segment[-1], piece.size, piece.address

        return min(fitting, key=order, default=None)

    def _grow(self, size: int, small: bool) -> "tuple[list[_Piece], _Piece]":
        pool = self._pools[small]
        if self._expandable and pool:
            segment = pool[0]
            if segment[-1].used:
                segment.append(_Piece(segment[-1].address + segment[-1].size, 0))
            last = segment[-1]
            last.size += _round_up(size - last.size, SMALL_BUFFER if small else LARGE_BUFFER)
            return segment, last
        if self._expandable:
            nbytes = _round_up(size, SMALL_BUFFER if small else LARGE_BUFFER)
        elif small:
            nbytes = SMALL_BUFFER
        else:
            nbytes = LARGE_BUFFER if size < MIN_LARGE_ALLOC else _round_up(size, ROUND_LARGE)
        segment = [_Piece(self._next_address, nbytes)]
        # An expandable segment reserves addresses for the whole GPU, long before it uses them.
        self._next_address += 2**50 if self._expandable else nbytes
        pool.append(segment)
        return segment, segment[0]


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class _Piece:
    """A mutable block: it shrinks when it is split and grows when it merges."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.used = False
