"""ChatGLM3's layers cut into pipeline stages that take about the same time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GlmForCausalLM

from helpers.errors import UserError
from helpers.memory.predict import ModelShape


def part_costs(shape: ModelShape, length: int) -> dict[str, int]:
    """FLOP of a forward pass per token of a row of ``length``: "embedding", one "layer", "head".

    Two for each element of a matrix, and in a layer 4 x length x width of the queries for the attention's two products
    (Narayanan 2021, appendix; the whole square, as torch's kernels for fp32 compute it). The embedding is a look-up:
    it multiplies nothing. A backward pass costs twice as much in every part, so it does not shift the balance.
    """
    return {
        "embedding": 0,
        "layer": 2 * shape.layer_matrices + 4 * length * shape.query,
        "head": 2 * shape.embedding,
    }


def cut(shape: ModelShape, stages: int, length: int) -> list[range]:
    """The layers of each stage, so that the slowest stage is as fast as possible; the last one has the head as well.

    All layers cost the same, so it is enough to hand them out one by one, each to the stage with the least work so
    far (of equals, to the last: early stages keep the most micro-batches alive).

    Raises :class:`UserError` where there is not one layer for each stage.
    """
    if not 1 <= stages <= shape.layers:
        raise UserError(f"{stages} stages of {shape.layers} layers: choose 1 to {shape.layers} stages")
    costs = part_costs(shape, length)
    counts, work = [1] * stages, [costs["layer"]] * stages
    work[0] += costs["embedding"]
    work[-1] += costs["head"]
    for _ in range(shape.layers - stages):
        lightest = min(range(stages), key=lambda stage: (work[stage], -stage))
        counts[lightest] += 1
        work[lightest] += costs["layer"]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


class Stage(nn.Module):
    """The layers ``layers`` of ``whole``; the first stage has the embedding before them, the last norm and head after.

    The parts are those of ``whole``, not copies, and their parameters have the same names as there. What ``whole`` has
    besides goes when it is dropped.
    """

    def __init__(self, whole: GlmForCausalLM, layers: range) -> None:
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == len(whole.model.layers)
        self.hidden = whole.config.hidden_size
        self.model = nn.Module()
        if self.first:
            self.model.embed_tokens = whole.model.embed_tokens
        self.model.layers = nn.ModuleDict({str(number): whole.model.layers[number] for number in layers})
        self.model.rotary_emb = whole.model.rotary_emb  # without parameters: every stage has one
        if self.last:
            self.model.norm = whole.model.norm
            self.lm_head = whole.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [rows, length, hidden] from those of the stage before, or logits [rows, length, vocab].

        The first stage takes token ids [rows, length].
        """
        hidden = self.model.embed_tokens(x) if self.first else x
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.model.rotary_emb(hidden, position_ids=positions)
        for layer in self.model.layers.values():
            # Without a mask torch's attention is causal by itself.
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return self.lm_head(self.model.norm(hidden)) if self.last else hidden


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each next token; ``logits`` [rows, length, vocab], ``labels`` [rows, length]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def stages_of(whole: GlmForCausalLM, layers: Sequence[range], numbers: Iterable[int]) -> dict[int, Stage]:
    """The stages ``numbers`` by number; ``layers[s]`` are the layers of stage ``s``, from :func:`cut`."""
    return {number: Stage(whole, layers[number]) for number in sorted(numbers)}
