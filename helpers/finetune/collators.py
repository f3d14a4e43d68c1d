"""Training examples as padded batches, with the labels already shifted to the position that predicts them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpers.activations.chunked_loss import IGNORE_INDEX


def shift_labels(labels: Tensor) -> Tensor:
    """Move each label to the position that predicts it, one to the left.

    Training shifts labels only here. Batches carry both keys, and transformers' loss and Trainer prefer
    ``shift_labels``.

    Args:
        labels: The token ids to learn, aligned with the input; ``IGNORE_INDEX`` elsewhere, [rows, tokens].

    Returns:
        What each position should predict, [rows, tokens]; ``IGNORE_INDEX`` for the last of each row.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def find_target_positions(shifted: Tensor) -> Tensor:
    """Return the indices into the flattened ``shifted`` [rows, tokens] that are not ``IGNORE_INDEX``, int64.

    The collator looks for them on the host. On the GPU, the host would have to wait for the answer in every step.
    """
    return (shifted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)


@dataclass(frozen=True)
class TrainingCollator:
    """Pad training features on the right, to the longest of the batch.

    Positions count from each row's first token and attention is causal, so padding changes no logit of a real token.

    Args:
        pad_token_id: Token id to pad with.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor | int]:
        """Make a batch of ``features``, each with ``input_ids`` and ``labels``.

        Returns:
            ``input_ids``, ``labels``, ``shift_labels`` and ``attention_mask``, [rows, longest row] int64;
            ``target_positions``, [targets] int64; ``tokens``, the number of tokens without padding.
        """
        input_ids = [torch.tensor(f["input_ids"], dtype=torch.int64) for f in features]
        labels = pad_sequence(
            [torch.tensor(f["labels"], dtype=torch.int64) for f in features],
            batch_first=True,
            padding_value=IGNORE_INDEX,
        )
        shifted = shift_labels(labels)
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": labels,
            "shift_labels": shifted,
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "target_positions": find_target_positions(shifted),
            "tokens": sum(map(len, input_ids)),
        }
