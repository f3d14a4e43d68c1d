"""A whole ``GlmForCausalLM`` divided among the ranks of a group, and put together again."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import GlmForCausalLM

from helpers.errors import UserError
from helpers.parallel.tensor.collectives import all_gathered, all_reduced, copy, gather, reduce, reduce_scatter
from helpers.parallel.tensor.layers import (
    ColumnParallelLinear,
    Communication,
    RowParallelLinear,
    VocabularyParallelEmbedding,
    gather_again,
)
from helpers.parallel.tensor.loss import causal_loss
from helpers.parallel.tensor.shards import cuts, suffix


def parallelize(
    model: GlmForCausalLM,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    again: bool = False,
) -> None:
    """Turn ``model`` into this rank's part of it, in place.

    All ranks of ``group`` (all there are by default) call it, with the same weights.

    Afterwards all of them compute with the same batch. ``model(...).loss`` and the gradients are those of the whole
    model, on each rank of its parts; ``logits`` are this rank's part of the vocabulary. Parameters are new objects, so
    an optimizer is made after this. A norm's weight is on all ranks, and all keep it the same.

    ``sequence_parallel`` divides norms and residuals by tokens, for the same traffic; rows must then have a multiple
    of the group's ranks as tokens. It leaves two whole activations in a layer: the gathered inputs of attention and
    MLP. With ``again`` these are gathered a second time in backward instead of being kept, for 10 instead of 8 times
    bsh(t - 1)/t elements sent a layer.

    Stages of a pipeline may be cut from the model afterwards: what a module needs goes with it. Generation and a cache
    are not supported. A norm over all gradients, to clip them by, must be added up over the ranks; torch's
    ``clip_grad_norm_`` sees this rank's parts only, and would let the copies of norms drift apart.

    Raises :class:`UserError`, before anything is changed, where the network cannot be divided evenly (see ``cuts``).
    """
    group = group or dist.group.WORLD
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    plan = cuts(model.config, ranks)
    if any(hasattr(parameter, "cut") for parameter in model.parameters()):
        raise UserError("parallelize: the model is divided already; build it anew")
    if again and not sequence_parallel:
        raise UserError("parallelize: again=True is for sequence_parallel=True; without it nothing is gathered")
    sharing = _ranks_that_share(group, plan["k_proj.weight"].copies)
    for name, whole in list(model.named_parameters()):
        cut = plan.get(suffix(name))
        if cut:
            part = nn.Parameter(cut.part(whole.detach(), rank, ranks), whole.requires_grad)
            part.cut = cut
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, part)
            if cut.copies > 1:  # each of these ranks has the gradient of its own queries
                _sum_gradient(part, sharing)
        elif sequence_parallel:  # a norm, of which each rank has the gradient of its own tokens
            _sum_gradient(whole, group)
    _divide(model, group, sequence_parallel, again)


def _divide(model: GlmForCausalLM, group: dist.ProcessGroup, sequence_parallel: bool, again: bool) -> None:
    enter: Communication = gather_again if again else gather if sequence_parallel else copy
    leave: Communication = reduce_scatter if sequence_parallel else reduce
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _divide_block(attention, ("q_proj", "k_proj", "v_proj"), "o_proj", group, enter, leave)
        _divide_block(mlp, ("gate_up_proj",), "down_proj", group, enter, leave)
        # Query heads for each group of keys and values that is here.
        attention.num_key_value_groups = len(attention.q_proj.weight) // len(attention.k_proj.weight)
    embedding = model.model.embed_tokens
    # Positions and mask follow from the embedding's tokens, so these stay all together up to the first layer.
    model.model.embed_tokens = VocabularyParallelEmbedding(
        embedding.weight, embedding.padding_idx, group, None if sequence_parallel else reduce
    )
    if sequence_parallel:
        _before(model.model.layers[0], reduce_scatter, group)
    model.lm_head = ColumnParallelLinear(model.lm_head.weight)
    _before(model.lm_head, enter, group)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        return causal_loss(logits, labels, group, num_items_in_batch)

    model.loss_function = loss


def _divide_block(
    block: nn.Module,
    columns: tuple[str, ...],
    row: str,
    group: dist.ProcessGroup,
    enter: Communication,
    leave: Communication,
) -> None:
    _before(block, enter, group)
    for name in columns:
        old = block.get_submodule(name)
        block.register_module(name, ColumnParallelLinear(old.weight, old.bias))
    old = block.get_submodule(row)
    block.register_module(row, RowParallelLinear(old.weight, old.bias, group, leave))


def full_weights(module: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Copies of the whole parameters on the CPU, by name, on every rank of ``group``; all ranks call it.

    ``module`` is a model that :func:`parallelize` divided, or any part of it.
    """
    group, whole = group or dist.group.WORLD, {}
    for name, parameter in module.named_parameters():
        own, cut = parameter.detach(), getattr(parameter, "cut", None)
        if cut is None:
            whole[name] = own.to("cpu", copy=True)
            continue
        whole[name] = cut.join(all_gathered(own, group).cpu().unbind())
    return whole


def _before(module: nn.Module, communication: Communication, group: dist.ProcessGroup) -> None:
    """Apply ``communication`` to what enters ``module``."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (communication(args[0], group), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": communication(kwargs["hidden_states"], group)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _sum_gradient(parameter: nn.Parameter, group: dist.ProcessGroup) -> None:
    if parameter.requires_grad:
        # Of each backward by itself, before it is added to what earlier ones left.
        parameter.register_hook(lambda gradient: all_reduced(gradient, group))


def _ranks_that_share(group: dist.ProcessGroup, copies: int) -> dist.ProcessGroup:
    """The ``copies`` neighbouring ranks of ``group`` that hold the same keys and values, this one among them."""
    if copies == 1:
        return group
    first = dist.get_rank(group) // copies * copies
    ranks = dist.get_process_group_ranks(group)[first : first + copies]
    # Other groups of tensor parallelism, on other ranks, do not take part.
    return dist.new_group(ranks, use_local_synchronization=True)
