"""A kernel launched again by the binary that it was launched with before.

At every launch Triton works out which of its binaries the arguments call for. With forty arguments that takes 40 us of
the host, as long as some kernels run. What decides a binary is little, and is looked up here: the device, the values of
constants, the dtypes of tensors, the sizes of integers and, where the kernel asks for it, what these are multiples of.
A launch that was met is made with its binary and bare addresses; one that was not, or that is out of the ordinary (an
address that is no multiple of 16, hooks of a profiler), is Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_TENSORS = (Tensor, torch.nn.Parameter)  # others may have no memory


class _Form:
    """What a kernel makes of arguments of some types: which of them decide a binary, by their places."""

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.types = tuple(map(type, args))
        self.ready: dict[tuple[Any, ...], Any] = {}  # binaries, by what decided them
        self.tensors: list[int] = []
        self.aligned: list[int] = []  # of the tensors
        self.values: list[int] = []  # constants
        self.sized: list[int] = []  # integers whose type follows from their size
        self.specialised: list[int] = []  # integers of which also matters whether they are 1 or multiples of 16
        self.descriptors: list[int] = []
        self.known = isinstance(kernel, JITFunction)
        if not self.known:
            return
        params = kernel.params
        # Those behind are constants, given by name: a launcher passes over them.
        self.known = all(param.is_constexpr for param in params[len(args) :])
        self.rest = (None,) * (len(params) - len(args))
        for i, (param, value) in enumerate(zip(params, args, strict=False)):
            if param.is_constexpr:
                self.values.append(i)
            elif type(value) in _TENSORS:
                if not (param.do_not_specialize or param.do_not_specialize_on_alignment):
                    self.aligned.append(len(self.tensors))
                self.tensors.append(i)
            elif type(value) is int:
                if not param.do_not_specialize:
                    self.specialised.append(i)
                elif not param.annotation_type:
                    self.sized.append(i)
            elif type(value) is TensorDescriptor:
                self.descriptors.append(i)
            elif type(value) is not float:
                self.known = False


_forms: dict[tuple[Any, ...], _Form] = {}
_latest: dict[Any, _Form] = {}  # of each kernel: its arguments have nearly always the types that they had before


def _form_of(kernel: Any, args: tuple[Any, ...]) -> _Form:
    form, types = _latest.get(kernel), tuple(map(type, args))
    if form is None or form.types != types:
        form = _forms.get((kernel, *types))
        if form is None:
            form = _forms[kernel, *types] = _Form(kernel, args)
        _latest[kernel] = form
    return form


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    check: Callable[[Any, Any, dict[str, Any]], None],
) -> None:
    """``kernel[grid](*args, **constants)`` on the current device and stream.

    ``check(kernel, binary, constants)`` is given every binary that Triton has found (None: interpreted), and raises
    where it may not run.
    """
    form = _form_of(kernel, args)
    together, addresses = 0, []
    if form.known:
        addresses = [args[i].data_ptr() for i in form.tensors]
        for i in form.aligned:
            together |= addresses[i]
    hooks = knobs.runtime
    if not form.known or together & 15 or _heard(hooks.launch_enter_hook) or _heard(hooks.launch_exit_hook):
        check(kernel, kernel[grid](*args, **constants), constants)
        return
    active = driver.active
    device = active.get_current_device()
    key = (
        device,
        *[args[i].dtype for i in form.tensors],
        *[args[i] for i in form.values],
        *[args[i] >> 31 for i in form.sized],
        *[_special(args[i]) for i in form.specialised],
        *[_described(args[i]) for i in form.descriptors],
        *constants,
        *constants.values(),
    )
    binary = form.ready.get(key)
    if binary is None:
        binary = kernel[grid](*args, **constants)
        check(kernel, binary, constants)
        form.ready[key] = binary
        return
    values = list(args)
    for i, address in zip(form.tensors, addresses, strict=True):
        values[i] = address
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    # As JITFunction.run does, with no metadata for hooks that are not there.
    binary.run(x, y, z, stream, binary.function, binary.packed_metadata, None, None, None, *values, *form.rest)


def _heard(hook: Any) -> bool:
    """Whether someone wants to hear of launches, such as Triton's profiler."""
    return bool(getattr(hook, "calls", hook))


def _special(value: int) -> tuple[int, int]:
    return value >> 31, 1 if value == 1 else 16 * (value % 16 == 0)


_layouts: dict[int, tuple[Any, Any]] = {}  # by identity, kept so that it stays theirs: a layout, and its first equal


def _described(x: TensorDescriptor) -> tuple[Any, ...]:
    layout = x.layout
    found = _layouts.get(id(layout))
    if found is None:
        found = _layouts[id(layout)] = layout, next((old for old, _ in _layouts.values() if old == layout), layout)
    return x.base.dtype, x.padding, *x.block_shape, id(found[1])
