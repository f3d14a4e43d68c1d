"""Teach transformers to round matrices to fp8 while it reads a checkpoint, one at a time.

So the 16-bit copy of all matrices never exists: each is read to its device, rounded there, and freed.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from helpers.quantization.fp8 import Fp8Linear, stored_rows

METHOD = "e4m3_rows"


@register_quantization_config(METHOD)
class Fp8Config(QuantizationConfigMixin):
    """The argument ``quantization_config`` of ``from_pretrained``: the layers' matrices become :class:`Fp8Linear`.

    Embedding and output layer keep their type: the first is looked up and not multiplied; the second is multiplied
    inside the chunked loss, which reads its weight, and its rounding errors would reach the loss directly.
    """

    def __init__(self, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an Enum, for transformers' own methods


@register_quantizer(METHOD)
class Fp8Quantizer(HfQuantizer):
    """What transformers calls while it reads a checkpoint with :class:`Fp8Config`."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        output = model.get_output_embeddings()  # type: ignore[operator]
        for parent in list(model.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is nn.Linear and linear is not output:
                    rounded = Fp8Linear(
                        linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype
                    )
                    setattr(parent, name, rounded)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), Fp8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Round()

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # an adapter on it


class _Round(ConversionOps):
    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return codes and scales of each weight; ``query_key_value`` comes as three."""
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            codes, scale_bits = stored_rows(value[0] if isinstance(value, list) else value)
            result[name] = nn.Parameter(codes, requires_grad=False)
            result[f"{name.removesuffix('weight')}scale_bits"] = scale_bits
        return result
