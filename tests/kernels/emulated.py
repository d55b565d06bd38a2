"""Gluon kernels on the CPU, program by program, for Triton's interpreter has none of Gluon: each operation in torch, in
the order in which the kernel names it. Numbers are those of a program; layouts, barriers and what travels by itself are
not there, so that races show on a GPU alone. Shared memory is NaN until it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Tile(torch.Tensor):
    """A program's tensor."""

    type: Any = SimpleNamespace(layout=None)


def tile(x: Tensor) -> Tile:
    return x.as_subclass(Tile)


class Pointer:
    """To elements of a tensor: one, or a tile of them."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        assert bitcast and isinstance(self.offset * self.base.element_size() % dtype.itemsize, int | Tensor)
        return Pointer(self.base.view(dtype), self.offset * self.base.element_size() // dtype.itemsize)


class Described:
    """What a descriptor describes: blocks of a tensor, zeros beyond its edge."""

    def __init__(self, x: Tensor, block: Sequence[int]) -> None:
        self.x, self.block, self.dtype = x, block, x.dtype

    def part(self, at: Sequence[Any]) -> tuple[slice, ...]:
        return tuple(slice(int(i), int(i) + n) for i, n in zip(at, self.block, strict=True))


class Shared:
    """Shared memory, and views of it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def store(self, x: Tensor) -> None:
        self.data.copy_(x)

    def load(self, layout: Any) -> Tile:
        return tile(self.data.clone())

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        flat = self.data.view(-1).view(dtype)
        return Shared(flat[: torch.Size(shape).numel()].view(*shape))


def _shared(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
    return Shared(torch.full(tuple(shape), float("nan") if dtype.is_floating_point else -(2**30), dtype=dtype))


def _load(at: Pointer, mask: Any = None, other: Any = 0) -> Tile:
    offset = torch.as_tensor(at.offset)
    if mask is None:
        return tile(at.base.view(-1)[offset])
    offset, mask = torch.broadcast_tensors(offset, mask)
    found = at.base.view(-1)[torch.where(mask, offset, 0).long()]
    return tile(torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(at: Pointer, x: Tensor, mask: Any = None) -> None:
    offset, x = torch.broadcast_tensors(torch.as_tensor(at.offset), torch.as_tensor(x))
    mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.broadcast_to(mask, offset.shape)
    at.base.view(-1)[offset[mask].long()] = x[mask].to(at.base.dtype)


def _along(x: Any, axis: int, combine: Callable[..., Any], keep: bool) -> Any:
    """A scan, or what is at its end, of a tensor or several."""
    parts = x if isinstance(x, tuple) else (x,)
    parts = torch.broadcast_tensors(*parts)
    so_far = [part.select(axis, 0) for part in parts]
    line = [so_far]
    for i in range(1, parts[0].shape[axis]):
        found = combine(*so_far, *(part.select(axis, i) for part in parts))
        so_far = list(found) if isinstance(found, tuple) else [found]
        line.append(so_far)
    ends = [torch.stack(column, axis) for column in zip(*line, strict=True)] if keep else so_far
    return tuple(ends) if isinstance(x, tuple) else ends[0]


def _to_shared(what: Described, at: Sequence[Any], bar: Any, where: Shared, pred: Any = True) -> None:
    block = torch.zeros(*what.block, dtype=what.dtype)
    part = what.x[what.part(at)]
    block[tuple(slice(0, n) for n in part.shape)] = part
    where.store(block.view(where.data.shape))


def _to_global(what: Described, at: Sequence[Any], where: Shared) -> None:
    part = what.x[what.part(at)]
    part.copy_(where.data[tuple(slice(0, n) for n in part.shape)])


def _multiplied(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tile:
    a = a.data if isinstance(a, Shared) else a
    found = a.float() @ b.data.float()
    assert found.shape == acc.shape
    return tile(found + acc if use_acc else found)


def _waited(count: int, deps: list[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else deps


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _of_two(operation: Callable[..., Tensor]) -> Callable[..., Tile]:
    return lambda a, b: tile(operation(torch.as_tensor(a), torch.as_tensor(b)))


_LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout", "SwizzledSharedLayout")
_TYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")


def _language(program: Sequence[int]) -> SimpleNamespace:
    """gluon.language as a program sees it."""
    return SimpleNamespace(
        **dict.fromkeys(_LAYOUTS, _nothing), **{name: getattr(torch, name) for name in _TYPES},
        **{name: getattr(torch, name) for name in ("exp", "log", "abs", "rsqrt", "reshape", "permute")},
        program_id=lambda axis: tile(torch.tensor(program[axis], dtype=torch.int32)),
        allocate_shared_memory=_shared, load=_load, store=_store, multiple_of=lambda x, n: x, pointer_type=lambda x: x,
        arange=lambda a, b, layout: tile(torch.arange(a, b, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype)),
        expand_dims=lambda x, axis: x.unsqueeze(axis), where=torch.where, convert_layout=lambda x, layout: x,
        sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis), join=lambda a, b: torch.stack([a, b], -1),
        maximum=_of_two(torch.maximum), minimum=_of_two(torch.minimum), static_range=range,
        associative_scan=lambda x, axis, add: _along(x, axis, add, True),
        reduce=lambda x, axis, add: _along(x, axis, add, False),
    )  # fmt: skip


def _rebound(kernel: Any, language: SimpleNamespace, done: dict[int, FunctionType]) -> FunctionType:
    """A kernel's, or a helper's, function with these operations in place of Gluon's."""
    function = kernel.fn
    if id(function) in done:
        return done[id(function)]
    names = dict(function.__globals__)
    found = done[id(function)] = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    memory = SimpleNamespace(
        async_copy_global_to_shared=_to_shared, async_copy_shared_to_global=_to_global, store_wait=_nothing
    )
    for name in function.__code__.co_names:
        value = names.get(name)
        if hasattr(value, "fn") and name != "barrier":
            names[name] = _rebound(value, language, done)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    names |= {
        "gl": language, "tma": memory, "mbarrier": SimpleNamespace(expect=_nothing, wait=_nothing), "barrier": _nothing,
        "fence_async_shared": _nothing, "new_mbarrier": _nothing, "warpgroup_mma": _multiplied,
        "warpgroup_mma_wait": _waited,
    }  # fmt: skip
    return found


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Runs all programs of a kernel, one after another; tensors are pointers, descriptors are :class:`Described`."""
    given = [Pointer(x) if isinstance(x, Tensor) else x for x in arguments]
    for program in product(*(range(n) for n in grid)):
        _rebound(kernel, _language(program), {})(*given, **constants)
