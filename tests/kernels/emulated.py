"""Gluon kernels on the CPU, program by program, for Triton's interpreter has none of Gluon: each operation in torch, in
the order in which the kernel names it. Numbers are those of a program; products of fp32 are not rounded to tf32.

A program's warps go as one: layouts, barriers between them and fences are not there, so that their races show on a GPU
alone. What goes on by itself, copies and products, is as late as it may be (:class:`UnderWay`), and shared memory is
NaN until it is written: what is read, or written over, before it was waited for shows in the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dnsp.kernels import proof, proof_run
from dnsp.kernels.launches import candidates


class Tile(torch.Tensor):
    """A program's tensor: a value, which ``+=`` does not change for those who have it too."""

    type: Any = SimpleNamespace(layout=None)
    __iadd__, __isub__, __imul__, __ior__ = Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__or__


def tile(x: Tensor) -> Tile:
    return x.as_subclass(Tile)


class Pointer:
    """To elements of a tensor: one, or a tile of them."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.base, self.offset - less)

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        assert bitcast and isinstance(self.offset * self.base.element_size() % dtype.itemsize, int | Tensor)
        return Pointer(self.base.view(dtype), self.offset * self.base.element_size() // dtype.itemsize)


class Whole(int):
    """An integer among the arguments."""

    def to(self, dtype: torch.dtype) -> int:
        return self


class Described:
    """What a descriptor describes: blocks of a tensor, zeros beyond its edge."""

    def __init__(self, by: TensorDescriptor) -> None:
        self.x = torch.as_strided(by.base, by.shape, by.strides, by.base.storage_offset())
        self.block, self.dtype = by.block_shape, by.base.dtype

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
        assert self.data.is_contiguous()
        whole = torch.empty(0, dtype=self.dtype).set_(self.data.untyped_storage())  # a view's may be less than is taken
        flat = whole[self.data.storage_offset() :].view(dtype)
        return Shared(flat[: torch.Size(shape).numel()].view(*shape))


class UnderWay:
    """What a program has under way: copies into shared memory, which arrive where their mbarrier is waited for, and
    copies out of it and products, which read it where they are waited for."""

    def __init__(self) -> None:
        self.bars: dict[int, SimpleNamespace] = {}  # by address
        self.stores: list[Callable[[], None]] = []
        self.products: list[Callable[[], None]] = []

    def init(self, bar: Shared, count: int) -> None:
        assert count == 1
        self.bars[bar.data.data_ptr()] = SimpleNamespace(phase=0, bytes=0, copies=[])

    def expect(self, bar: Shared, count: int, pred: Any = True) -> None:
        if pred:
            at = self.bars[bar.data.data_ptr()]
            assert at.bytes == 0, "announced again before it was waited for"
            at.bytes = count

    def to_shared(self, what: Described, at: Sequence[Any], bar: Shared, where: Shared, pred: Any = True) -> None:
        if pred:
            block = torch.zeros(*what.block, dtype=what.dtype)
            part = what.x[what.part(at)]
            block[tuple(slice(0, n) for n in part.shape)] = part
            where.data.fill_(torch.nan)
            self.bars[bar.data.data_ptr()].copies.append((where, block.view(where.data.shape)))

    def wait(self, bar: Shared, phase: Any) -> None:
        at = self.bars[bar.data.data_ptr()]
        if at.phase != phase:  # that one is over
            return
        assert at.bytes == sum(block.nbytes for _, block in at.copies) > 0, "waited for what does not come"
        for where, block in at.copies:
            where.store(block)
        at.phase, at.bytes, at.copies = 1 - at.phase, 0, []

    def to_global(self, what: Described, at: Sequence[Any], where: Shared) -> None:
        part = what.x[what.part(at)]
        self.stores.append(lambda: part.copy_(where.data[tuple(slice(0, n) for n in part.shape)]))

    def store_wait(self, left: int) -> None:
        _do(self.stores, left)

    def multiply(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tile:
        found = tile(torch.full_like(acc, torch.nan))

        def product() -> None:
            exact = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
            assert exact.shape == acc.shape
            found.copy_(exact + acc if use_acc else exact)

        self.products.append(product)
        _do(self.products, len(self.products) if is_async else 0)
        return found

    def multiply_wait(self, left: int, deps: list[Tensor]) -> Any:
        _do(self.products, left)
        return deps[0] if len(deps) == 1 else deps

    def end(self) -> None:
        left = self.stores, self.products, *(at.bytes or at.copies for at in self.bars.values())
        assert not any(left), "a program ends with something under way"


def _do(tasks: list[Callable[[], None]], left: int) -> None:
    """All of these, in their order, but so many."""
    while len(tasks) > left:
        tasks.pop(0)()


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


def _along(x: Any, axis: int, combine: Callable[..., Any], keep: bool = True, reverse: bool = False) -> Any:
    """A scan, or what is at its end, of a tensor or several."""
    if reverse:
        return _along(x.flip(axis), axis, combine).flip(axis)
    parts = [part.as_subclass(Tensor) for part in (x if isinstance(x, tuple) else (x,))]  # tiles take longer
    parts = torch.broadcast_tensors(*parts)
    so_far = [part.select(axis, 0) for part in parts]
    line = [so_far]
    for i in range(1, parts[0].shape[axis]):
        found = combine(*so_far, *(part.select(axis, i) for part in parts))
        so_far = list(found) if isinstance(found, tuple) else [found]
        line.append(so_far)
    ends = [tile(torch.stack(column, axis)) for column in zip(*line, strict=True)] if keep else list(map(tile, so_far))
    return tuple(ends) if isinstance(x, tuple) else ends[0]


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _where(condition: Any, a: Any, b: Any) -> Tile:
    return tile(torch.where(torch.as_tensor(condition), a, b))


def _in_assembly(code: str, constraints: str, arguments: list[Any], **_: Any) -> Any:
    """Of the two that there are, a copy and a zero."""
    assert code.startswith(("mov.b32 $0, $1;", "mov.b32 $0, 0;"))
    return arguments[0] if "$1;" in code else 0


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
        arange=lambda a, b, layout=None: tile(torch.arange(a, b, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype)),
        expand_dims=lambda x, axis: x.unsqueeze(axis), where=_where, convert_layout=lambda x, layout: x,
        sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis),
        join=lambda a, b: torch.stack([a, b], -1), split=lambda x: x.unbind(-1), trans=lambda x: x.mT,
        inline_asm_elementwise=_in_assembly,
        maximum=_of_two(torch.maximum), minimum=_of_two(torch.minimum), static_range=range,
        associative_scan=_along, reduce=lambda x, axis, add: _along(x, axis, add, False),
        cumsum=lambda x, axis, reverse=False: x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis),
    )  # fmt: skip


def _rebound(kernel: Any, names: dict[str, Any], done: dict[int, FunctionType]) -> FunctionType:
    """A kernel's, or a helper's, function with these in place of what it has by their names."""
    function = kernel.fn
    if id(function) in done:
        return done[id(function)]
    own = dict(function.__globals__)
    found = done[id(function)] = FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    for name in function.__code__.co_names:
        value = own.get(name)
        if hasattr(value, "fn") and name not in names:
            own[name] = _rebound(value, names, done)
        elif type(value).__name__ == "constexpr":
            own[name] = value.value
    own |= names
    return found


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Runs all programs of a kernel, one after another."""
    kinds = (Tensor, Pointer), (TensorDescriptor, Described), (int, Whole)
    given = [next((made(x) for kind, made in kinds if isinstance(x, kind)), x) for x in arguments]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}  # no options
    for program in product(*(range(n) for n in grid)):
        under_way, language = UnderWay(), _language(program)
        names = {
            "gl": language, "tl": language, "tma": SimpleNamespace(
                async_copy_global_to_shared=under_way.to_shared, async_copy_shared_to_global=under_way.to_global,
                store_wait=under_way.store_wait,
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=_nothing, init=under_way.init, expect=under_way.expect, wait=under_way.wait
            ),
            "warpgroup_mma": under_way.multiply, "warpgroup_mma_wait": under_way.multiply_wait,
            "barrier": _nothing, "fence_async_shared": _nothing,
        }  # fmt: skip
        _rebound(kernel, names, {})(*given, **constants)
        under_way.end()


class Emulating(proof_run.Recording):
    """A mode in which every launch is emulated."""

    def __init__(self) -> None:
        super().__init__(candidates()["as tuned"])
        self.launched: set[str] = set()

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.launched.add(kernel.__name__)
        launch(kernel, grid, *args, **constants)


@contextmanager
def emulating() -> Iterator[Emulating]:
    """Every launch is emulated, Triton's kernels without matrix products too; what ``torch.empty`` makes is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with proof.mode(how := Emulating()):
            yield how
    finally:
        torch.use_deterministic_algorithms(before)
