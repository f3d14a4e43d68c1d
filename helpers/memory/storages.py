"""Tensors reduced to the memory that they occupy: storages, each with its place and its size, none twice."""

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
    """The storages of ``tensor``: the whole one of a view, the local ones of a DTensor or another wrapper.

    Nothing where there is no memory: on the meta device, in an empty tensor, in a storage that was given back.
    """
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # after torch 2.11 a DTensor's mesh is among them
                yield from storages(inner)
    elif tensor.layout == torch.sparse_coo:
        yield from storages(tensor._indices())
        yield from storages(tensor._values())
    elif tensor.device.type != "meta" and (storage := tensor.untyped_storage()).nbytes():
        yield Storage(tensor.device, storage.data_ptr(), storage.nbytes())


def tensors_in(value: Any, packages: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """Every tensor that is reachable from ``value`` through containers, and through objects of ``packages``' classes.

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
        # A list or a mapping of a package's own class may have attributes, too.
        if not isinstance(item, nn.Module | type) and type(item).__module__.startswith(packages):
            waiting.extend(getattr(item, "__dict__", {}).values())
