"""Pools of blocks, as torch's caching allocator keeps them: the rules behind SimulatedAllocator (allocator.py).

Follows c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13).
"""

from collections.abc import Iterator

from helpers.errors import UserError


def round_up(size: int, unit: int) -> int:
    """Round up.

    Args:
        size: A number of bytes.
        unit: What the result shall be a multiple of, in bytes.

    Returns:
        Bytes.
    """
    return -(-size // unit) * unit


class Pool:
    """Keep the segments of one stream for small or for large tensors.

    Args:
        page: Bytes that the driver adds at least.
        expandable: Whether a segment can grow.

    Attributes:
        page: As given.
        reserved: Bytes that the driver has provided.
        free: The pieces that nobody uses.
        segments: The first piece of each segment.
    """

    def __init__(self, page: int, expandable: bool) -> None:
        self.page = page
        self.reserved = 0
        self.free: set[Piece] = set()
        self.segments: list[Piece] = []
        self._expandable = expandable

    def add_segment(self, address: int, nbytes: int, *, mapped: bool) -> "Piece":
        """Add a segment of one piece.

        Args:
            address: Where it starts.
            nbytes: Its size in bytes.
            mapped: Whether the driver provides its memory now. If not, :meth:`map` does, page by page.

        Returns:
            The piece.
        """
        piece = Piece(self, address, nbytes, mapped)
        self.segments.append(piece)
        if mapped:
            self.reserved += nbytes
            self.free.add(piece)
        return piece

    def best_fit(self, size: int) -> "Piece | None":
        """Find the smallest free piece that is large enough; one that could grow counts with what it could get.

        Args:
            size: Bytes that are needed.

        Returns:
            The piece; None if no piece is large enough.
        """
        fitting = sorted((p for p in self.free if p.size >= size), key=lambda piece: (piece.size, piece.address))
        best = None
        for piece in fitting:
            if best is not None and piece.room >= best.room:
                break
            best = piece
        return best

    def merge(self, piece: "Piece") -> "Piece":
        """Join a piece that nobody uses with its neighbours of the same kind.

        Args:
            piece: The piece.

        Returns:
            The whole.
        """
        for first in (piece, piece.previous):
            if first and first.next and first.mergeable_with(first.next):
                self.free.discard(first.next)
                first.absorb_next()
                piece = first
        if piece.mapped:
            self.free.add(piece)
        return piece

    def map(self, size: int) -> "Piece":
        """Get pages from the driver, at the lowest address that has room, until a free piece is large enough.

        Args:
            size: Bytes that are needed.

        Returns:
            The piece.

        Raises:
            UserError: The segment's addresses do not suffice.
        """
        piece = self._growable(size)
        if not piece.mapped:
            piece = self._map(piece, size)
        while piece.size < size:
            assert piece.next is not None  # the last piece of a segment is never used up
            piece = self._map(piece.next, size - piece.size)
        return piece

    def _growable(self, size: int) -> "Piece":
        for piece in self.segments[0].onwards():
            if piece.mapped:
                continue
            start = piece.previous if piece.previous and piece.previous.available else piece
            room = 0
            for following in start.onwards():
                if following.used:
                    break
                room += following.size
            if room >= size:
                return start
        raise UserError(f"SimulatedAllocator: a tensor of {size} bytes; no GPU is that large")

    def _map(self, piece: "Piece", size: int) -> "Piece":
        nbytes = min(round_up(size, self.page), piece.size)
        if nbytes < piece.size:
            piece.split(nbytes)
        piece.mapped = True
        self.reserved += nbytes
        return self.merge(piece)

    def empty(self) -> None:
        """Return whole free segments, or whole free pages of a segment that can grow, to the driver."""
        for piece in list(self.free):
            if self._expandable:
                self._unmap(piece)
            elif piece.previous is None and piece.next is None:
                self.segments.remove(piece)
                self.free.discard(piece)
                self.reserved -= piece.size

    def _unmap(self, piece: "Piece") -> None:
        before = -piece.address % self.page
        whole = (piece.size - before) // self.page * self.page
        if whole <= 0:
            return
        middle = piece
        if before:
            middle = piece.split(before)
        else:
            self.free.discard(piece)
        if middle.size > whole:
            self.free.add(middle.split(whole))
        middle.mapped = False
        self.reserved -= whole
        self.merge(middle)


class Piece:
    """Be a mutable block, which shrinks when it is split and grows when it merges.

    Args:
        pool: Where it belongs.
        address: Where it starts.
        size: Bytes.
        mapped: Whether there is memory at its addresses.

    Attributes:
        pool: As given.
        address: As given.
        size: Bytes.
        mapped: Whether there is memory at its addresses.
        used: Whether a tensor has it.
        previous: The piece before it in the segment; None if it is the first.
        next: The piece after it; None if it is the last.
    """

    def __init__(self, pool: Pool, address: int, size: int, mapped: bool) -> None:
        self.pool = pool
        self.address, self.size = address, size
        self.used, self.mapped = False, mapped
        self.previous: Piece | None = None
        self.next: Piece | None = None

    @property
    def available(self) -> bool:
        """Whether a tensor could have it."""
        return self.mapped and not self.used

    @property
    def room(self) -> int:
        """Bytes that it would have with the pages behind it."""
        return self.size + (self.next.size if self.next and not self.next.mapped else 0)

    def onwards(self) -> "Iterator[Piece]":
        """Yield this piece and those behind it."""
        piece: Piece | None = self
        while piece:
            yield piece
            piece = piece.next

    def mergeable_with(self, other: "Piece") -> bool:
        """Return whether nobody uses this piece and ``other``, and both have memory or both have none."""
        return not self.used and not other.used and self.mapped == other.mapped

    def split(self, size: int) -> "Piece":
        """Keep the first bytes.

        Args:
            size: Number of bytes to keep.

        Returns:
            The rest.
        """
        rest = Piece(self.pool, self.address + size, self.size - size, self.mapped)
        rest.previous, rest.next = self, self.next
        if self.next:
            self.next.previous = rest
        self.size, self.next = size, rest
        return rest

    def absorb_next(self) -> None:
        """Take in the piece behind this one."""
        assert self.next is not None
        self.size += self.next.size
        self.next = self.next.next
        if self.next:
            self.next.previous = self
