"""Tensor parallelism: every matrix of the network is divided among the ranks of a group (Shoeybi et al. 2019).

    parallelize(model, group)                       # this rank keeps its parts of a GlmForCausalLM
    loss = model(**batch).loss                      # the same batch on every rank of the group
    loss.backward()
    full_weights(model, group)                      # the whole parameters again, by name

What is where: ``shards`` which part of which parameter a rank holds, ``collectives`` the communications, ``layers`` the
modules that compute with a part, ``loss`` the cross-entropy over a divided vocabulary, ``network`` the whole model.
"""

from helpers.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, VocabularyParallelEmbedding
from helpers.parallel.tensor.loss import vocabulary_parallel_cross_entropy
from helpers.parallel.tensor.parallelize import full_weights, parallelize
from helpers.parallel.tensor.shards import Cut, cuts

__all__ = [
    "ColumnParallelLinear",
    "Cut",
    "RowParallelLinear",
    "VocabularyParallelEmbedding",
    "cuts",
    "full_weights",
    "parallelize",
    "vocabulary_parallel_cross_entropy",
]
