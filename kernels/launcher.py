"""A kernel launched again by the binary that it was launched with before.

At every launch Triton works out which of its binaries the arguments call for. With forty arguments that takes 40 us of
the host, as long as some kernels run. What decides a binary is little, and is looked up here: the device, the values of
constants, the dtypes of tensors, the sizes of integers and, where the kernel asks for it, what these are multiples of.
A launch that was met is made with its binary and bare addresses, by the C function behind Triton's launcher; one that
was not, or that is out of the ordinary (an address that is no multiple of 16, hooks of a profiler), is Triton's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import assembler

_TENSORS = (Tensor, torch.nn.Parameter)  # others may have no memory


class _Form:
    """What a kernel makes of arguments of some types: which of them decide a binary, by their places."""

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.types = tuple(map(type, args))
        self.ready: dict[tuple[Any, ...], _Ready] = {}  # binaries, by what decided them
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
            elif isinstance(value, TensorDescriptor):
                self.descriptors.append(i)
            elif type(value) is not float:
                self.known = False


class _Ready:
    """A binary, and the way to launch it."""

    def __init__(self, binary: Any, args: tuple[Any, ...], tensors: list[int], descriptors: list[int]) -> None:
        self.binary = binary
        # Tensors that are given by address. Of the host's memory Triton asks what it is to the device.
        self.bare = [(i, n) for n, i in enumerate(tensors) if not args[i].is_pinned()]
        run, kinds = binary.run, getattr(binary.metadata, "tensordesc_meta", None)
        # From the last on: in an argument's place several come.
        self.kinds = [(i, kind, _number(repr(kind))) for i, kind in zip(descriptors, kinds or (), strict=False)][::-1]
        self.function = _behind(run, bool(descriptors)) if len(self.kinds) == len(descriptors) else None

    def launch(self, grid: tuple[int, int, int], stream: int, values: list[Any], rest: tuple[None, ...]) -> None:
        binary, run = self.binary, self.binary.run
        if self.function is None:  # as JITFunction.run does, with no metadata for hooks that are not there
            run(*grid, stream, binary.function, binary.packed_metadata, None, None, None, *values, *rest)
            return
        for i, kind, number in self.kinds:
            x = values[i]
            encoded = x.__dict__.get("encoded")
            if encoded is None or encoded[0] != number:
                encoded = x.encoded = number, _encoded(x, kind, number)
            values[i : i + 1] = encoded[1]
        values += rest
        how = run.launch_cooperative_grid, run.launch_pdl
        packed, none = binary.packed_metadata, None
        if hasattr(run, "kernel_signature"):  # Triton 3.7
            more = packed, none, none, none, none, none, run.arg_annotations, run.kernel_signature, values
            self.function(*grid, stream, binary.function, *how, *more)
        else:
            self.function(*grid, stream, binary.function, *how, none, none, packed, none, none, none, *values)


_encodings: dict[tuple[Any, ...], list[Any]] = {}
_numbers: dict[Any, int] = {}
_fresh = itertools.count()


def _encoded(x: TensorDescriptor, kind: Any, number: int) -> list[Any]:
    """A descriptor as a kernel is given it, which follows from what decides a binary, address, shape and strides."""
    laid = x.__dict__.get("laid")
    if laid is None:
        laid = _described(x), *x.shape, *x.strides
    key = number, x.base.data_ptr(), laid
    found = _encodings.get(key)
    if found is None:
        if len(_encodings) > 65536:
            _encodings.clear()
        found = _encodings[key] = nvidia.make_tensordesc_arg(x, kind)
    return found


def _number(what: Any) -> int:
    """The same for what is equal."""
    found = _numbers.get(what)
    return _numbers.setdefault(what, next(_fresh)) if found is None else found


def _behind(run: Any, described: bool) -> Any:
    """The C function that a launcher calls; None where it is built in another way than here is known."""
    if type(run) is not nvidia.CudaLauncher or run.global_scratch_size or run.profile_scratch_size:
        return None
    if not described:
        return run.launch
    names = getattr(run.launch, "__code__", None) and run.launch.__code__.co_freevars
    return run.launch.__closure__[names.index("launcher")].cell_contents if names and "launcher" in names else None


_forms: dict[tuple[Any, ...], _Form] = {}
# Of each kernel, by identity: its arguments have nearly always the types that they had before.
_latest: dict[int, _Form] = {}


def _form_of(kernel: Any, args: tuple[Any, ...]) -> _Form:
    form, types = _latest.get(id(kernel)), tuple(map(type, args))
    if form is None or form.types != types:
        form = _forms.get((kernel, *types))
        if form is None:
            form = _forms[kernel, *types] = _Form(kernel, args)
        _latest[id(kernel)] = form
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
        check(kernel, _by_triton(kernel, grid, args, constants), constants)
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
    ready = form.ready.get(key)
    if ready is None:
        binary = _by_triton(kernel, grid, args, constants)
        check(kernel, binary, constants)
        form.ready[key] = _Ready(binary, args, form.tensors, form.descriptors)
        return
    values = list(args)
    for i, n in ready.bare:
        values[i] = addresses[n]
    x, y, z = (*grid, 1, 1)[:3]
    ready.launch((x, y, z), active.get_current_stream(device), values, form.rest)


def _by_triton(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """The binary, compiled where it was not met before; None: interpreted."""
    if not isinstance(kernel, JITFunction):
        return kernel[grid](*args, **constants)
    with assembler.kept(driver.active.get_current_target().arch):
        return kernel[grid](*args, **constants)


def _heard(hook: Any) -> bool:
    """Whether someone wants to hear of launches, such as Triton's profiler."""
    return bool(getattr(hook, "calls", hook))


def _special(value: int) -> tuple[int, int]:
    return value >> 31, 1 if value == 1 else 16 * (value % 16 == 0)


_layouts: dict[int, tuple[Any, int]] = {}  # by identity, kept so that it stays theirs


def _described(x: TensorDescriptor) -> int:
    """A number for what of a descriptor decides a binary; kept with it."""
    found: int | None = x.__dict__.get("decides")
    if found is None:
        layout = _layouts.get(id(x.layout))
        if layout is None:
            layout = _layouts[id(x.layout)] = x.layout, _number(x.layout)
        rounded = getattr(x, "round_f32_to_tf32", False)
        found = x.decides = _decides(x.base.dtype, x.padding, rounded, x.block_shape, layout[1])
    return found


def _decides(dtype: torch.dtype, padding: str, rounded: bool, block_shape: Sequence[int], layout: int) -> int:
    return _number((dtype, padding, rounded, *block_shape, layout))


class Described(TensorDescriptor):
    """A descriptor of memory that is known to fit: its own checks take longer than all else about it."""

    def __init__(self, base: Tensor, laid_out: dict[str, Any]) -> None:
        """``laid_out``: by :func:`laid_out`, once for all that are alike."""
        self.__dict__.update(laid_out)
        self.base = base


def laid_out(
    dtype: torch.dtype, shape: list[int], strides: list[int], block_shape: list[int], layout: Any
) -> dict[str, Any]:
    """All of a descriptor but its memory; and numbers, for what decides a binary and for all of this together."""
    return {
        **{"shape": shape, "strides": strides, "block_shape": block_shape, "layout": layout},
        "decides": _decides(dtype, "zero", False, block_shape, _number(layout)),
        "laid": next(_fresh),
    }
