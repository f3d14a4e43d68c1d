"""Partition ChatGLM3's layers into pipeline stages that take about the same time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GlmForCausalLM

from helpers.errors import UserError
from helpers.memory.predict import ModelShape


def flops_per_token(shape: ModelShape, sequence_length: int) -> dict[str, int]:
    """Count the FLOPs per token of a forward pass: of the embedding, of one layer and of the head.

    A matrix costs two FLOPs per element. The two matmuls of attention cost 4 x sequence_length x query width (Narayanan
    et al. 2021, appendix), for the full square of the scores, as torch's fp32 kernels compute it. The embedding is a
    look-up and multiplies nothing. Backward costs twice as much in every part, so it does not change the ratios.

    Args:
        shape: The model.
        sequence_length: Tokens per sequence.

    Returns:
        FLOPs by part: "embedding", "layer" (a single one) and "head".
    """
    return {
        "embedding": 0,
        "layer": 2 * shape.layer_matrices + 4 * sequence_length * shape.query,
        "head": 2 * shape.embedding,
    }


def partition_layers(shape: ModelShape, num_stages: int, sequence_length: int) -> list[range]:
    """Distribute the layers so that the slowest stage is as fast as possible; the last stage also runs the head.

    All layers cost the same, so a greedy rule finds the optimum: give the layers out one by one, each to the stage with
    the least work so far. Ties go to the later stage, because early stages keep more micro-batches alive.

    Args:
        shape: The model.
        num_stages: Number of stages.
        sequence_length: Tokens per sequence; attention gets more expensive with it.

    Returns:
        The layer numbers of each stage.

    Raises:
        UserError: There is not at least one layer per stage.
    """
    if not 1 <= num_stages <= shape.layers:
        raise UserError(
            f"partition_layers: {num_stages} stages of {shape.layers} layers; choose 1 to {shape.layers} stages"
        )
    flops = flops_per_token(shape, sequence_length)
    counts, work = [1] * num_stages, [flops["layer"]] * num_stages
    work[0] += flops["embedding"]
    work[-1] += flops["head"]
    for _ in range(shape.layers - num_stages):
        lightest = min(range(num_stages), key=lambda stage: (work[stage], -stage))
        counts[lightest] += 1
        work[lightest] += flops["layer"]
    ends = [sum(counts[: stage + 1]) for stage in range(num_stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


class _StageModel(nn.Module):
    """The modules of a stage, under the names that they have in ``GlmModel``; a middle stage has only the layers."""

    embed_tokens: nn.Module
    layers: nn.ModuleDict
    rotary_emb: nn.Module
    norm: nn.Module


class Stage(nn.Module):
    """Run some layers of a model; the first stage also runs the embedding, the last one the final norm and the head.

    The stage holds the modules of ``full_model`` itself, not copies, and parameters keep their names. Drop
    ``full_model`` afterwards to free the layers of the other stages.

    Args:
        full_model: The model to take the layers from.
        layers: Numbers of the layers of this stage.
    """

    lm_head: nn.Module

    def __init__(self, full_model: GlmForCausalLM, layers: range) -> None:
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == len(full_model.model.layers)
        self.hidden = full_model.config.hidden_size
        self.model = _StageModel()
        if self.first:
            self.model.embed_tokens = full_model.model.embed_tokens
        self.model.layers = nn.ModuleDict({str(number): full_model.model.layers[number] for number in layers})
        self.model.rotary_emb = full_model.model.rotary_emb  # it has no parameters, so every stage can hold it
        if self.last:
            self.model.norm = full_model.model.norm
            self.lm_head = full_model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage.

        Args:
            x: Hidden states of the previous stage [sequences, tokens, hidden]; for the first stage token ids
                [sequences, tokens].

        Returns:
            Hidden states [sequences, tokens, hidden]; of the last stage logits [sequences, tokens, vocabulary].
        """
        hidden = self.model.embed_tokens(x) if self.first else x
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]  # [1, tokens]
        rotary = self.model.rotary_emb(hidden, position_ids=positions)
        for layer in self.model.layers.values():
            # Without a mask transformers selects SDPA's causal attention.
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return self.lm_head(self.model.norm(hidden)) if self.last else hidden


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy of predicting each next token, in fp32.

    Args:
        logits: [sequences, tokens, vocabulary].
        labels: Token ids [sequences, tokens], not shifted; -100 is ignored.

    Returns:
        The loss, a scalar.
    """
    # The logits of a token predict the token after it: the last logits and the first label have no partner.
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def build_stages(
    full_model: GlmForCausalLM, partition: Sequence[range], stage_numbers: Iterable[int]
) -> dict[int, Stage]:
    """Build the stages of one rank.

    Args:
        full_model: The model to take the layers from.
        partition: The layer numbers of every stage, from :func:`partition_layers`.
        stage_numbers: Which stages to build.

    Returns:
        The stages by number.
    """
    return {number: Stage(full_model, partition[number]) for number in sorted(stage_numbers)}
