"""Packing: several short rows in one sequence of fixed length, so that no computation goes into padding.

A row still sees only itself: position ids restart at 0 in every row, and attention ends at its boundaries
(``helpers.finetune.packed_attention``). The rest of a pack is filled with padding, which counts as rows of its own.
"""

import bisect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value

from helpers.activations.chunked_loss import IGNORE_INDEX
from helpers.errors import UserError
from helpers.finetune.collators import find_target_positions, shift_labels

_FEATURES = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "lengths": List(Value("int32"))}
)


def best_fit_packing(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Assign rows to packs by *best fit*: each row goes into the fullest pack that has room.

    Rows come in random order, so that a pack is not filled with one kind of row. In the result, no two packs would fit
    into one.

    Args:
        lengths: Tokens of each row.
        capacity: Tokens of a pack.
        seed: Of the random order.

    Returns:
        The indices of each pack's rows; every row is in one pack.

    Raises:
        UserError: A row is longer than ``capacity``.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise UserError(
            f"speed: packing {capacity} is shorter than the longest row of {longest} tokens; give at least that, or "
            "lower max_input_length or max_output_length"
        )
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted; without the packs that are full
    for row in order:
        # The first entry with enough room is the fullest pack that the row fits into.
        best = bisect.bisect_left(room, (lengths[row], -1))
        if best == len(room):
            packs.append([row])
            free, pack = capacity, len(packs) - 1
        else:
            free, pack = room.pop(best)
            packs[pack].append(row)
        if free > lengths[row]:
            bisect.insort(room, (free - lengths[row], pack))
    return packs


def packed_features(features: Dataset, capacity: int, seed: int) -> Dataset:
    """Pack training features.

    Args:
        features: As :func:`helpers.finetune.dataset.training_features` makes them.
        capacity: Tokens of a pack.
        seed: Of the order in which rows are packed.

    Returns:
        Per pack ``input_ids`` and ``labels`` of its rows, one after another, and ``lengths``, the tokens of each row.

    Raises:
        UserError: A row is longer than ``capacity``.
    """
    rows = features.with_format("numpy")
    ids, labels = rows["input_ids"][:], rows["labels"][:]
    packs = best_fit_packing([len(row) for row in ids], capacity, seed)
    columns = {
        "input_ids": [np.concatenate([ids[row] for row in rows]) for rows in packs],
        "labels": [np.concatenate([labels[row] for row in rows]) for rows in packs],
        "lengths": [[len(ids[row]) for row in rows] for rows in packs],
    }
    return Dataset.from_dict(columns, features=_FEATURES)


@dataclass(frozen=True)
class PackCollator:
    """Make batches of packs. Batches of as many packs all have the same shapes, so layers compile once.

    Args:
        pad_token_id: Token id to pad with.
        capacity: Tokens of a pack.
        max_rows: Rows of a pack, at most.
        max_seqlen: Tokens of the longest row.
    """

    pad_token_id: int
    capacity: int
    max_rows: int
    max_seqlen: int

    @classmethod
    def of(cls, packs: Dataset, capacity: int, pad_token_id: int) -> "PackCollator":
        """Make the collator for given packs.

        Args:
            packs: As :func:`packed_features` returns them.
            capacity: Tokens of a pack.
            pad_token_id: Token id to pad with.

        Returns:
            The collator.
        """
        lengths = packs["lengths"][:]
        return cls(pad_token_id, capacity, max(map(len, lengths)), max(chain.from_iterable(lengths)))

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """Make a batch of ``features``, each a pack.

        Returns:
            ``input_ids``, ``labels``, ``shift_labels`` and ``position_ids``, [packs, capacity] int64; ``cu_seqlens``
            (int32, of fixed length) and ``max_seqlen`` for the attention; ``target_positions``, [targets] int64;
            ``tokens`` without padding, and ``rows``.
        """
        shape = (len(features), self.capacity)
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE_INDEX)
        position_ids = torch.empty(shape, dtype=torch.int64)
        ends: list[int] = []
        for number, feature in enumerate(features):
            tokens = len(feature["input_ids"])
            lengths = [*feature["lengths"], *self._padding(self.capacity - tokens)]
            starts = [0, *accumulate(lengths)][:-1]
            input_ids[number, :tokens] = torch.as_tensor(feature["input_ids"])
            labels[number, :tokens] = torch.as_tensor(feature["labels"])
            labels[number, starts] = IGNORE_INDEX  # no row's first token is predicted by the last of another row
            position_ids[number] = torch.cat([torch.arange(length) for length in lengths])
            ends += [number * self.capacity + start + length for start, length in zip(starts, lengths, strict=True)]
        # Filled up with the end: rows without tokens, which the attention skips.
        cu_seqlens = torch.full((1 + self._max_pieces() * len(features),), len(features) * self.capacity)
        cu_seqlens[: len(ends) + 1] = torch.tensor([0, *ends])
        shifted = shift_labels(labels)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "shift_labels": shifted,
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens.int(),
            "max_seqlen": self.max_seqlen,
            "target_positions": find_target_positions(shifted),
            "tokens": sum(len(feature["input_ids"]) for feature in features),
            "rows": sum(len(feature["lengths"]) for feature in features),
        }

    def _padding(self, tokens: int) -> list[int]:
        """Split padding into pieces of at most ``max_seqlen``, beyond which the attention kernel does not look."""
        full_pieces, rest = divmod(tokens, self.max_seqlen)
        return [self.max_seqlen] * full_pieces + ([rest] if rest else [])

    def _max_pieces(self) -> int:
        return self.max_rows + -(-self.capacity // self.max_seqlen)
