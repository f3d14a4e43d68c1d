"""Shard a complete ``GlmForCausalLM`` over the ranks of a group, and gather its weights again."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import GlmForCausalLM

from helpers.errors import UserError
from helpers.parallel.tensor.collectives import (
    Communication,
    all_gather_stacked,
    all_reduce,
    copy,
    gather,
    reduce,
    reduce_scatter,
)
from helpers.parallel.tensor.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_with_recompute,
)
from helpers.parallel.tensor.loss import vocab_parallel_causal_lm_loss
from helpers.parallel.tensor.shards import Shard, plan_key, shard_plan

_SHARD = "shard"  # attribute of a sharded parameter: its Shard


def parallelize(
    model: GlmForCausalLM,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    recompute_all_gather: bool = False,
) -> None:
    """Replace the model's parameters by this rank's shards, in place (Shoeybi et al. 2019, section 3).

    Every rank of the group calls it, with the same weights, and from then on computes with the same batch.
    ``model(...).loss`` is that of the full model, and each shard gets the gradient of its part; ``logits`` are this
    rank's part of the vocabulary. A parameter that is sharded has the attribute ``shard``. Norms are not sharded,
    and stay equal on all ranks.

    Parameters become new objects, so make the optimizer afterwards. ``clip_grad_norm_`` sees this rank's shards only
    and would let the norms of different ranks drift apart: sum the squares over the ranks first. Stages of a pipeline
    may be taken from the model afterwards. Generation and a key-value cache are not supported.

    Args:
        model: The model to shard.
        group: The ranks that share it; all ranks by default.
        sequence_parallel: Also shard the tokens between the blocks, for the same traffic (Korthikanti et al. 2022,
            section 4.2). The number of tokens per sequence must then divide by the number of ranks.
        recompute_all_gather: With ``sequence_parallel``, gather the inputs of attention and MLP a second time in
            backward instead of keeping them. A layer then sends 10 instead of 8 times bsh(t - 1)/t elements, with b
            sequences of s tokens, hidden size h and t ranks.

    Raises:
        UserError: The model does not divide evenly, or is sharded already. Nothing is changed then.
    """
    group = _resolve_group(group)
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    plan = shard_plan(model.config, world_size)
    if any(_shard_of(parameter) for parameter in model.parameters()):
        raise UserError("parallelize: the model is sharded already; build it again")
    if recompute_all_gather and not sequence_parallel:
        raise UserError(
            "parallelize: recompute_all_gather=True needs sequence_parallel=True: only then inputs are gathered"
        )
    ranks_with_same_keys = _neighbours(group, plan["k_proj.weight"].copies)
    for name, full in list(model.named_parameters()):
        shard = plan.get(plan_key(name))
        if shard:
            local = nn.Parameter(shard.to_local(full.detach(), rank, world_size), full.requires_grad)
            setattr(local, _SHARD, shard)
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, local)
            if shard.copies > 1:  # ranks with the same keys have different queries, and so parts of the gradient
                _all_reduce_gradient(local, ranks_with_same_keys)
        elif sequence_parallel:  # a norm: each rank has the gradient through its own tokens
            _all_reduce_gradient(full, group)
    _replace_modules(model, group, sequence_parallel, recompute_all_gather)


def _replace_modules(
    model: GlmForCausalLM, group: dist.ProcessGroup, sequence_parallel: bool, recompute_all_gather: bool
) -> None:
    enter: Communication = gather_with_recompute if recompute_all_gather else gather if sequence_parallel else copy
    leave: Communication = reduce_scatter if sequence_parallel else reduce
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _replace_block(attention, ("q_proj", "k_proj", "v_proj"), "o_proj", group, enter, leave)
        _replace_block(mlp, ("gate_up_proj",), "down_proj", group, enter, leave)
        # Query heads per key-value head on this rank, which transformers uses to repeat the keys.
        attention.num_key_value_groups = len(attention.q_proj.weight) // len(attention.k_proj.weight)
    embedding = model.model.embed_tokens
    # transformers derives positions and mask from the embedding's output, which must have all tokens. So sequence
    # parallelism sums and scatters it only when it enters the first layer.
    model.model.embed_tokens = VocabParallelEmbedding(
        embedding.weight, embedding.padding_idx, group, None if sequence_parallel else reduce
    )
    if sequence_parallel:
        _communicate_before(model.model.layers[0], reduce_scatter, group)
    model.lm_head = ColumnParallelLinear(model.lm_head.weight)
    _communicate_before(model.lm_head, enter, group)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        return vocab_parallel_causal_lm_loss(logits, labels, group, num_items_in_batch)

    model.loss_function = loss


def _replace_block(
    block: nn.Module,
    column_parallel: tuple[str, ...],
    row_parallel: str,
    group: dist.ProcessGroup,
    enter: Communication,
    leave: Communication,
) -> None:
    """Cut the first matrices by columns and the last by rows, so that the ranks send no bytes in between."""
    _communicate_before(block, enter, group)
    for name in column_parallel:
        block.register_module(name, ColumnParallelLinear(*_weight_and_bias(block, name)))
    block.register_module(row_parallel, RowParallelLinear(*_weight_and_bias(block, row_parallel), group, leave))


def _weight_and_bias(block: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    parameters = dict(block.get_submodule(name).named_parameters(recurse=False))
    return parameters["weight"], parameters.get("bias")


def full_weights(module: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Gather copies of the full parameters on the CPU of every rank; all ranks of the group call it.

    Args:
        module: A model that :func:`parallelize` sharded, or a part of it.
        group: The ranks that share it; all ranks by default.

    Returns:
        The parameters by name.
    """
    group, weights = _resolve_group(group), {}
    for name, parameter in module.named_parameters():
        local, shard = parameter.detach(), _shard_of(parameter)
        if shard is None:
            weights[name] = local.to("cpu", copy=True)
        else:
            weights[name] = shard.full_tensor(all_gather_stacked(local, group).cpu().unbind())
    return weights


def _shard_of(parameter: nn.Parameter) -> Shard | None:
    return getattr(parameter, _SHARD, None)


def _resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group or dist.group.WORLD
    if group is None:
        raise UserError("torch.distributed is not initialized; start ranks with run() or torchrun")
    return group


def _communicate_before(module: nn.Module, communication: Communication, group: dist.ProcessGroup) -> None:
    """Apply ``communication`` to the hidden states that enter ``module``."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (communication(args[0], group), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": communication(kwargs["hidden_states"], group)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _all_reduce_gradient(parameter: nn.Parameter, group: dist.ProcessGroup) -> None:
    """Sum the parameter's gradient over the group in every backward, before it is accumulated in ``grad``."""
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: all_reduce(gradient, group))


def _neighbours(group: dist.ProcessGroup, copies: int) -> dist.ProcessGroup:
    """Make the group of the ``copies`` neighbouring ranks that hold the same keys and values as this one."""
    if copies == 1:
        return group
    first = dist.get_rank(group) // copies * copies
    ranks = dist.get_process_group_ranks(group)[first : first + copies]
    # Ranks of other tensor-parallel groups do not take part in this call, so it must not wait for them.
    return dist.new_group(ranks, use_local_synchronization=True)
