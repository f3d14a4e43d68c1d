"""Several short rows in one sequence of fixed length, a *pack*: no computation goes into padding, and shapes stay.

A row still sees itself alone: position ids begin at 0 in every row, and attention ends at its boundaries
(``helpers.finetune.packed_attention``). What is left of a pack is filled with padding, which is a row of its own.
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
    """Which rows go into which pack: row numbers, each once, at most ``capacity`` tokens a pack.

    *Best fit*: rows come in random order, so that a pack is no sample of one kind, and each goes into the fullest pack
    that has room. No two packs would fit into one. Raises UserError for a row longer than ``capacity``.
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
    room: list[tuple[int, int]] = []  # (tokens free, pack), sorted; full packs are not in it
    for row in order:
        place = bisect.bisect_left(room, (lengths[row], -1))
        if place == len(room):
            packs.append([row])
            free, number = capacity, len(packs) - 1
        else:
            free, number = room.pop(place)
            packs[number].append(row)
        if free > lengths[row]:
            bisect.insort(room, (free - lengths[row], number))
    return packs


def packed_features(features: Dataset, capacity: int, seed: int) -> Dataset:
    """Training features as packs: ``input_ids`` and ``labels`` of their rows one after another, and ``lengths``."""
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
    """Packs as a batch. Every batch of as many packs has the same shapes, for which a compiler is grateful.

    ``capacity`` is the length of a pack in tokens, ``most_rows`` how many rows a pack has at most, ``max_seqlen`` the
    tokens of the longest row.
    """

    pad_token_id: int
    capacity: int
    most_rows: int
    max_seqlen: int

    @classmethod
    def of(cls, packs: Dataset, capacity: int, pad_token_id: int) -> "PackCollator":
        """The collator for ``packs``, as :func:`packed_features` makes them."""
        lengths = packs["lengths"][:]
        # Padding is a row, too, and may be longer than any other; the pieces it is cut into take target_positions.
        return cls(pad_token_id, capacity, max(map(len, lengths)), max(chain.from_iterable(lengths)))

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``position_ids``, each [packs, capacity] int64; ``cu_seqlens`` int32 of fixed
        length and ``max_seqlen`` for the attention; ``target_positions`` [trained tokens] int64, where in the batch a
        token is predicted that counts; ``tokens`` without padding, and ``rows``.
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
            labels[number, starts] = IGNORE_INDEX  # the last token of another row does not predict it
            position_ids[number] = torch.cat([torch.arange(length) for length in lengths])
            ends += [number * self.capacity + start + length for start, length in zip(starts, lengths, strict=True)]
        cu_seqlens = torch.full((1 + self._most_pieces() * len(features),), len(features) * self.capacity)
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
        """Lengths of the pieces that padding is cut into: no longer than a row, or the kernel would stop early."""
        whole, rest = divmod(tokens, self.max_seqlen)
        return [self.max_seqlen] * whole + ([rest] if rest else [])

    def _most_pieces(self) -> int:
        return self.most_rows + -(-self.capacity // self.max_seqlen)
