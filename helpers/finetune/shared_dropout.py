"""One dropout for all adapters that read the same input: less memory, and fewer passes over it.

PEFT gives each matrix's adapter a dropout of its own. q, k and v read the same input, so it exists three times, each
time with other elements dropped, until backward. ChatGLM3's published recipe adapts them as the one matrix
``query_key_value``, with one dropout. This does so with three adapters.
"""

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass
class _Drawn:
    """The dropped input that the first of several adapters has drawn, until the last one has taken it."""

    value: Tensor | None = None


class _First(nn.Module):
    def __init__(self, dropout: nn.Module, drawn: _Drawn) -> None:
        super().__init__()
        self.dropout, self.drawn = dropout, drawn

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(x)
        self.drawn.value = dropped
        return dropped


class _Again(nn.Module):
    def __init__(self, drawn: _Drawn, last: bool) -> None:
        super().__init__()
        self.drawn, self.last = drawn, last

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.drawn.value
        assert dropped is not None and dropped.shape == x.shape, "adapters are called in another order than they share"
        if self.last:  # a compiled layer would otherwise return it
            self.drawn.value = None
        return dropped


def share_dropout(modules: list[nn.Module]) -> None:
    """Let the adapters of ``modules`` share the dropout of the first one that has one.

    Args:
        modules: Matrices that read the same input, in the order in which they are called. Those without an adapter, or
            with one without dropout, are left as they are.
    """
    adapted = [module for module in modules if isinstance(module, LoraLayer)]
    for name in dict.fromkeys(name for module in adapted for name in module.lora_dropout):
        dropouts = [module.lora_dropout for module in adapted if name in module.lora_dropout]
        holders = [dropout for dropout in dropouts if isinstance(dropout[name], nn.Dropout)]
        if len(holders) < 2:
            continue
        drawn = _Drawn()
        holders[0][name] = _First(holders[0][name], drawn)
        for holder in holders[1:]:
            holder[name] = _Again(drawn, last=holder is holders[-1])


def shares_dropout(module: LoraLayer, name: str) -> bool:
    """Tell whether the adapter ``name`` of ``module`` shares its dropout."""
    return isinstance(module.lora_dropout[name], (_First, _Again))
