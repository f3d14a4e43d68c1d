"""Reduce tensors to the memory that they occupy: storages with device, address and size, none twice."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Storage(NamedTuple):
    """Memory behind tensors: two tensors share it exactly when ``device`` and ``address`` are the same."""

    device: torch.device
    address: int
    nbytes: int


def storages(tensor: Tensor) -> Iterator[Storage]:
    """Yield the storages of a tensor.

    Args:
        tensor: Any tensor. A view yields its complete storage, a DTensor or another wrapper its local ones.

    Yields:
        The storages; none for a tensor without memory: on the meta device, empty, or with a freed storage.
    """
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # after torch 2.11 a DTensor's mesh is one of them
                yield from storages(inner)
    elif tensor.layout == torch.sparse_coo:
        yield from storages(tensor._indices())
        yield from storages(tensor._values())
    elif tensor.device.type != "meta" and (storage := tensor.untyped_storage()).nbytes():
        yield Storage(tensor.device, storage.data_ptr(), storage.nbytes())


def tensors_in(value: Any, packages: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """Yield every tensor reachable from ``value`` through containers, and through objects of ``packages``' classes.

    Modules are not entered: what belongs to a model is found through the model.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            continue
        if isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting.extend(item)
        # A list or a mapping of a package's own class may have attributes as well.
        if not isinstance(item, nn.Module | type) and type(item).__module__.startswith(packages):
            waiting.extend(getattr(item, "__dict__", {}).values())
