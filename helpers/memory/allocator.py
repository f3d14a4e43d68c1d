"""What a caching allocator holds: segments, and the blocks that they are cut into, in use or free.

Real ones are read from torch's allocator. For machines without a GPU there is :class:`SimulatedAllocator`, which
follows the rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13) for one stream and memory without end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers.errors import UserError
from helpers.memory.predict.constants import BLOCK, LARGE, LARGE_BUFFER, ROUND_LARGE, SMALL, SMALL_BUFFER


@dataclass(frozen=True)
class Block:
    """``size`` bytes of a segment; a tensor has them where ``used``."""

    size: int
    used: bool


@dataclass(frozen=True)
class Segment:
    """Memory that the allocator got from the driver in one piece: ``blocks`` in the order of their addresses."""

    address: int
    blocks: Sequence[Block]

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(block.size for block in self.blocks)

    @property
    def used(self) -> int:
        """Bytes of the blocks that tensors have."""
        return sum(block.size for block in self.blocks if block.used)


def reserved(segments: Sequence[Segment]) -> int:
    """Bytes that the allocator holds."""
    return sum(segment.size for segment in segments)


def allocated(segments: Sequence[Segment]) -> int:
    """Bytes that it has given to tensors."""
    return sum(segment.used for segment in segments)


def from_snapshot(snapshot: Sequence[dict[str, Any]], device: int = 0) -> list[Segment]:
    """The segments in the answer of ``torch.cuda.memory_snapshot()`` that lie on one device."""
    return [
        Segment(
            segment["address"],
            tuple(Block(block["size"], block["state"] == "active_allocated") for block in segment["blocks"]),
        )
        for segment in snapshot
        if segment["device"] == device
    ]


class SimulatedAllocator:
    """Torch's caching allocator, without a GPU: where a tensor would lie, and what stays when it is freed.

    Sizes are rounded up to 512 bytes. There is a pool for tensors of up to 1 MiB, and one for others. The smallest free
    block of the pool that is large enough is taken, and its rest stays free, if it has at least 512 bytes (small pool)
    or more than 1 MiB (large pool). Where there is none, the driver is asked for a segment: 2 MiB for small tensors, 20
    for those below 10 MiB, else the size in whole 2 MiB. A freed block joins its free neighbours in the segment.

    ``expandable``: each pool has one segment that grows at its end, by whole pages of 2 MiB (small) or 20 MiB. A free
    block at that end is taken only where no other is large enough. Nothing is ever given back to the driver.
    """

    def __init__(self, expandable: bool = False) -> None:
        self._expandable = expandable
        self._pools: dict[bool, list[list[_Piece]]] = {True: [], False: []}
        self._placed: dict[int, _Piece] = {}
        self._next_address = 0
        self._next_tensor = 0

    def allocate(self, nbytes: int) -> int:
        """Give memory to a tensor of ``nbytes``; the number to free it with."""
        if nbytes < 1:
            raise UserError(f"SimulatedAllocator: a tensor of {nbytes} bytes; give a number above 0")
        size = -(-nbytes // BLOCK) * BLOCK
        small = size <= SMALL
        segment, piece = self._free_piece(size, small) or self._new_piece(size, small)
        rest = piece.size - size
        if rest >= BLOCK if small or self._expandable else rest > SMALL:
            segment.insert(segment.index(piece) + 1, _Piece(piece.address + size, rest))
            piece.size = size
        piece.used = True
        self._next_tensor += 1
        self._placed[self._next_tensor] = piece
        return self._next_tensor

    def free(self, tensor: int) -> None:
        """Take back what ``allocate`` gave."""
        piece = self._placed.pop(tensor)
        piece.used = False
        segment = next(s for pool in self._pools.values() for s in pool if any(p is piece for p in s))
        place = segment.index(piece)
        for first in (place, place - 1):
            if 0 <= first and first + 1 < len(segment) and not (segment[first].used or segment[first + 1].used):
                segment[first].size += segment.pop(first + 1).size

    def segments(self) -> list[Segment]:
        """What is held now, by address."""
        held = [
            Segment(segment[0].address, tuple(Block(piece.size, piece.used) for piece in segment))
            for pool in self._pools.values()
            for segment in pool
        ]
        return sorted(held, key=lambda segment: segment.address)

    def _free_piece(self, size: int, small: bool) -> "tuple[list[_Piece], _Piece] | None":
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

    def _new_piece(self, size: int, small: bool) -> "tuple[list[_Piece], _Piece]":
        pool = self._pools[small]
        if self._expandable and pool:
            segment = pool[0]
            if segment[-1].used:
                segment.append(_Piece(segment[-1].address + segment[-1].size, 0))
            last = segment[-1]
            last.size += _whole(size - last.size, SMALL_BUFFER if small else LARGE_BUFFER)
            return segment, last
        if self._expandable:
            taken = _whole(size, SMALL_BUFFER if small else LARGE_BUFFER)
        elif small:
            taken = SMALL_BUFFER
        else:
            taken = LARGE_BUFFER if size < LARGE else _whole(size, ROUND_LARGE)
        segment = [_Piece(self._next_address, taken)]
        # Expandable segments reserve addresses for all memory that there is, long before they use it.
        self._next_address += 2**50 if self._expandable else taken
        pool.append(segment)
        return segment, segment[0]


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class _Piece:
    """A block on its way: it shrinks where it is split and grows where it is joined."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.used = False
