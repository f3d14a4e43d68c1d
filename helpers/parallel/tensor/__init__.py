"""Tensor parallelism: shard every matrix of the network over the ranks of a group (Shoeybi et al. 2019).

    parallelize(model, group)                       # this rank keeps its shards of a GlmForCausalLM
    loss = model(**batch).loss                      # the same batch on every rank of the group
    loss.backward()
    full_weights(model, group)                      # the full parameters, gathered, by name

``shards`` defines which shard of which parameter a rank holds, ``collectives`` the communications as operations of
autograd, ``layers`` the modules that compute with a shard, ``loss`` the cross-entropy over a sharded vocabulary, and
``parallelize`` puts them together.
"""

from helpers.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from helpers.parallel.tensor.loss import vocab_parallel_causal_lm_loss, vocab_parallel_cross_entropy
from helpers.parallel.tensor.parallelize import full_weights, parallelize
from helpers.parallel.tensor.shards import Shard, shard_plan

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "Shard",
    "VocabParallelEmbedding",
    "full_weights",
    "parallelize",
    "shard_plan",
    "vocab_parallel_causal_lm_loss",
    "vocab_parallel_cross_entropy",
]
