"""Work around what DeepSpeed does by default when it starts; nothing here imports it before that."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

# 32 MiB in fp64.
NORM_ELEMENTS = 4 * 2**20


def skip_cpu_collectives() -> None:
    """Leave collectives on the CPU to gloo.

    Otherwise DeepSpeed compiles its own, through shared memory, at its first start: a minute or two, if the machine has
    a compiler at all.
    """
    import deepspeed.ops  # here, because its import already looks for a GPU

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def share_world_group() -> None:
    """Let DeepSpeed reduce over torch's world group instead of a copy of it.

    With NCCL the copy is a second communicator with its own buffers, which take many times what ZeRO-2 can save for a
    LoRA adapter. DeepSpeed made the copy because torch once could not translate the ranks of its world group.
    """
    from deepspeed.utils import groups

    groups._clone_world_group = lambda: dist.group.WORLD


def use_cpu_accelerator() -> None:
    """Make DeepSpeed use the CPU, even if it found a GPU when it was imported."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    set_accelerator(CPU_Accelerator())


def forget_inputs_of_frozen_layers() -> None:
    """Let ZeRO-3's linear layers keep their input for backward only if their weight is trained.

    torch's own layer does so. DeepSpeed replaces it under ZeRO-3 by one that keeps the input in any case: for a LoRA
    fine-tune of ChatGLM3, whose matrices are all frozen, a quarter of the activations.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3 as Linear

    save_all = Linear.setup_context
    if getattr(save_all, "forgets_inputs", False):
        return

    def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save_all(context, inputs, output)
        weight_is_trained = context.needs_input_grad[1]
        if not weight_is_trained:
            context.save_for_backward(None, *inputs[1:], *[None] * (3 - len(inputs)))  # replaces what was saved

    setattr(setup_context, "forgets_inputs", True)  # noqa: B010 (mypy: a function has no such attribute)
    Linear.setup_context = staticmethod(setup_context)


def skip_nvtx_ranges() -> None:
    """Keep DeepSpeed from marking its functions for Nsight Systems.

    Under ZeRO-3 it does so thousands of times a step, a fifth of what Python needs for a step of 28 compiled layers
    (measured with two ranks on a CPU). A GPU that computes such a layer in 7 ms waits for Python.
    """
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


def compute_norms_in_parts() -> None:
    """Let ZeRO-3 with an offloaded optimizer compute a gradient's norm a few million elements at a time.

    DeepSpeed converts up to 250 million elements to fp64 at once, and no key limits it: for the embedding of ChatGLM3,
    266 million elements, a gibibyte on each of two GPUs.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    DeepSpeedZeroOptimizer_Stage3._constant_buffered_norm2.__defaults__ = (NORM_ELEMENTS,)


def gather_whole_layers(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather each layer as one, instead of every matrix in a hook of its own.

    Compiled layers need it, because the compiler sees through the modules inside of a layer and their hooks. It also
    means fewer and larger messages. Call it before ``deepspeed.initialize``.

    Args:
        model: The network with the layers.
        layers: Its layers.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)
    _keep_torch_linear()
    _remember_parameters()
    # DeepSpeed frees a layer in backward when the gradient of its input is there. If the embedding is frozen, the first
    # layer's input has none, and the layer would be freed before its backward begins.
    model.enable_input_require_grads()


def _keep_torch_linear() -> None:
    """Keep DeepSpeed from replacing ``torch.nn.functional.linear`` by its own function, and undo it if it has.

    Compiled, torch's own frees a gathered weight as well: the compiler saves parameters, not views of them. DeepSpeed's
    asks in backward which parameter it got, so each layer is compiled anew, until the compiler gives up after 8. It
    also adds biases in place; the compiler of torch 2.11 lets no gradient through such a result, and reports no error.
    """
    from deepspeed.runtime.zero import partition_parameters

    original = getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)
    partition_parameters.zero3_linear_wrap = functional.linear = original


def _remember_parameters() -> None:
    """Let ZeRO-3 list the parameters of a module once, and not four times per step and layer.

    It goes through the 25 modules of a layer each time: a sixth of what Python needs for a step of 28 compiled layers
    (measured with two ranks on a CPU).
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    known: WeakKeyDictionary[nn.Module, dict[bool, list[nn.Parameter]]] = WeakKeyDictionary()

    def iter_params(module: Any, recurse: bool = False) -> Iterator[nn.Parameter]:
        lists = known.setdefault(module, {})
        if recurse not in lists:
            lists[recurse] = list(module.parameters(recurse=recurse))
        return itertools.chain(lists[recurse], (parameter for _, parameter in module.ds_external_parameters()))

    parameter_offload.iter_params = partitioned_param_coordinator.iter_params = iter_params


def configure_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed use this rank's device and process group, and log only errors.

    Call it before ``deepspeed.initialize``, in an initialised process group. It also calls ``skip_cpu_collectives``,
    ``share_world_group`` and ``skip_nvtx_ranges``.

    Args:
        device: This rank's device.
    """
    skip_cpu_collectives()
    share_world_group()
    skip_nvtx_ranges()
    forget_inputs_of_frozen_layers()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        use_cpu_accelerator()
    # Without this, zero.Init reads its configuration before it knows the number of ranks.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
