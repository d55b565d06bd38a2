"""Launches by a binary that was met: the one that Triton itself would take, with the same arguments.

Kernels are compiled for a GPU that need not be there; a driver of this file's own notes what would be launched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from dnsp.kernels import launcher
from tests.kernels.triton_compile import another_ptxas


@triton.jit(do_not_specialize=["T", "stride"], do_not_specialize_on_alignment=["b"])
def small_kernel(a, b, T, n, scale, stride: tl.int64, step: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr = True):
    at = tl.arange(0, K)
    x = tl.load(a + at * step, mask=at < T) + tl.load(b + at).to(tl.float32) * scale
    if KEEP:
        tl.store(a + stride + n + at, x)


@gluon.jit
def described_kernel(tiles, out, W: gl.constexpr):
    gl.store(out + tiles.block_type.shape[0], W)


class Driver:
    """Of a Hopper: launches are noted as (function, arguments)."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []
        self.device = self.stream = 0
        this = self

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                pass

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
                this.ran.append((x, y, z, stream, function, packed, args))
                if enter is not None:
                    enter(metadata)

        self.launcher_cls = Launcher
        self.utils = self
        self.functions: list[bytes] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 18}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.functions.append(binary)
        return "module", len(self.functions) - 1, 32, 0, 1024


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    for kernel in (small_kernel, described_kernel):
        kernel.device_caches.clear()
    monkeypatch.setattr(launcher, "_forms", {})
    monkeypatch.setattr(launcher, "_latest", {})
    monkeypatch.setattr(launcher, "_encodings", {})
    yield made
    for kernel in (small_kernel, described_kernel):
        kernel.device_caches.clear()


def no_check(kernel: Any, binary: Any, constants: dict[str, Any]) -> None:
    pass


def tensor(dtype: torch.dtype = torch.float32, off: int = 0) -> Tensor:
    return torch.zeros(64, dtype=dtype)[off:]


A, B = tensor(), tensor(torch.bfloat16)
# Arguments by position, and constants. Each is a binary of its own, but for those that say otherwise.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((A, B, 40, 7, 0.5, 3, 1), {"K": 16}),
    "plain: other numbers": ((tensor(), tensor(torch.bfloat16), 41, 9, 1.5, 2**40, 1), {"K": 16}),
    "plain: an address that does not matter": ((A, tensor(torch.bfloat16, 1), 40, 7, 0.5, 3, 1), {"K": 16}),
    "dtype": ((A, tensor(torch.float16), 40, 7, 0.5, 3, 1), {"K": 16}),
    "a long T": ((A, B, 2**31, 7, 0.5, 3, 1), {"K": 16}),
    "n is 1": ((A, B, 40, 1, 0.5, 3, 1), {"K": 16}),
    "n is a multiple of 16": ((A, B, 40, 32, 0.5, 3, 1), {"K": 16}),
    "n is a multiple of 16, and 1 more": ((A, B, 40, 17, 0.5, 3, 1), {"K": 16}),  # as plain
    "a long n": ((A, B, 40, 2**31 + 1, 0.5, 3, 1), {"K": 16}),
    "a scale of the wrong type": ((A, B, 40, 7, 1, 3, 1), {"K": 16}),
    "another step": ((A, B, 40, 7, 0.5, 3, 2), {"K": 16}),
    "another K": ((A, B, 40, 7, 0.5, 3, 1), {"K": 32}),
    "not kept": ((A, B, 40, 7, 0.5, 3, 1), {"K": 16, "KEEP": False}),
    "two warps": ((A, B, 40, 7, 0.5, 3, 1), {"K": 16, "num_warps": 2}),
    "a parameter": ((torch.nn.Parameter(A), B, 40, 7, 0.5, 3, 1), {"K": 16}),  # as plain
}
AS_PLAIN = {"n is a multiple of 16, and 1 more", "a parameter"} | {name for name in CALLS if name.startswith("plain")}


def function(launched: tuple[Any, ...]) -> Any:
    return launched[4]


def addresses(args: tuple[Any, ...]) -> list[Any]:
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in args]


def test_the_binary_and_the_arguments_are_those_that_triton_takes(gpu: Driver) -> None:
    functions = {}
    for _ in range(2):
        for name, (args, constants) in CALLS.items():
            small_kernel[(3, 2)](*args, **constants)
            launcher.launch(small_kernel, (3, 2), args, constants, no_check)
            launcher.launch(small_kernel, (3, 2), args, constants, no_check)
            one, two, three = gpu.ran[-3:]
            assert one[:6] == two[:6] == three[:6] and one[:3] == (3, 2, 1), name
            assert three[6][: len(args)] == tuple(addresses(args)), name  # no tensors: the binary was known
            assert len(one[6]) == len(three[6])
            functions[name] = function(three)
    assert len({functions[name] for name in AS_PLAIN}) == 1
    others = [functions[name] for name in CALLS if name not in AS_PLAIN] + [functions["plain"]]
    assert len(set(others)) == len(others)


def test_an_unaligned_address_is_tritons_affair(gpu: Driver) -> None:
    args, constants = CALLS["plain"]
    odd = (tensor(off=1), *args[1:])
    for _ in range(2):
        launcher.launch(small_kernel, (1,), args, constants, no_check)
        aligned = function(gpu.ran[-1])
        launcher.launch(small_kernel, (1,), odd, constants, no_check)
        assert function(gpu.ran[-1]) != aligned and gpu.ran[-1][6][0] is odd[0]


def test_pinned_memory_is_left_to_triton(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    args, constants = CALLS["plain"]
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: self is B)
    for _ in range(2):
        launcher.launch(small_kernel, (1,), args, constants, no_check)
    assert gpu.ran[-1][6][0] == A.data_ptr() and gpu.ran[-1][6][1] is B


def test_every_device_has_its_binary_and_streams_are_the_current_ones(gpu: Driver) -> None:
    args, constants = CALLS["plain"]
    seen = []
    for gpu.device, gpu.stream in ((0, 5), (1, 6), (0, 7), (1, 8)):
        launcher.launch(small_kernel, (1,), args, constants, no_check)
        assert gpu.ran[-1][3] == gpu.stream
        seen.append(function(gpu.ran[-1]))
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_what_may_not_run_is_found_every_time(gpu: Driver) -> None:
    asked = []

    def refuse(kernel: Any, binary: Any, constants: dict[str, Any]) -> None:
        asked.append(binary.hash)
        raise RuntimeError("not proven")

    args, constants = CALLS["plain"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not proven"):
            launcher.launch(small_kernel, (1,), args, constants, refuse)
    launcher.launch(small_kernel, (1,), args, constants, no_check)
    launcher.launch(small_kernel, (1,), args, constants, refuse)  # it may run, since then
    assert len(asked) == 2 and asked[0] == asked[1]


def test_the_assembler_is_the_one_that_triton_has_noted(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inductor sets the variable while a process runs, behind Triton's first compile."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    args, constants = CALLS["plain"]
    launcher.launch(small_kernel, (1,), args, constants, no_check)
    other = another_ptxas(tmp_path)
    monkeypatch.setenv("TRITON_PTXAS_PATH", other)
    for name in ("another K", "not kept"):
        args, constants = CALLS[name]
        launcher.launch(small_kernel, (1,), args, constants, no_check)
        assert not (tmp_path / "asked").exists()
        assert os.environ["TRITON_PTXAS_PATH"] == other
    args, constants = CALLS["two warps"]
    small_kernel[(1,)](*args, **constants)  # Triton itself takes it
    assert (tmp_path / "asked").exists()
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    args, constants = CALLS["another step"]
    launcher.launch(small_kernel, (1,), args, constants, no_check)
    assert "TRITON_PTXAS_PATH" not in os.environ


def test_hooks_hear_of_every_launch(gpu: Driver) -> None:
    args, constants = CALLS["plain"]
    launcher.launch(small_kernel, (1,), args, constants, no_check)
    heard: list[str] = []
    hook: Callable[[Any], None] = lambda metadata: heard.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            launcher.launch(small_kernel, (1,), args, constants, no_check)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert heard == ["small_kernel"] * 2


def test_descriptors_decide_by_their_tiles(gpu: Driver) -> None:
    def tiles(rows: int, swizzle: int = 128, dtype: torch.dtype = torch.bfloat16, height: int = 128) -> Any:
        layout = gl.NVMMASharedLayout(swizzle, dtype.itemsize * 8, 2)
        return TensorDescriptor(torch.zeros(height, 64, dtype=dtype), [height, 64], [64, 1], [rows, 64], layout)

    out = torch.zeros(64, dtype=torch.int32)
    functions = []
    for again in range(2):
        for x in (tiles(16), tiles(16, height=256), tiles(32), tiles(16, 64), tiles(16, dtype=torch.float32)):
            described_kernel[(1,)](x, out, 3)
            launcher.launch(described_kernel, (1,), (x, out), {"W": 3}, no_check)
            one, two = gpu.ran[-2:]
            assert one[:6] == two[:6] and two[6][0] is x
            assert again == 0 or two[6][1] == out.data_ptr()
            functions.append(function(two))
    assert functions[:5] == functions[5:] and functions[0] == functions[1] and len(set(functions)) == 4


@pytest.mark.parametrize("described", [False, True])
def test_the_function_behind_a_launcher_is_given_what_the_launcher_gives_it(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch, described: bool
) -> None:
    given: list[list[Any]] = []

    def function(*args: Any) -> None:
        *before, last = args
        given.append([*before, *last] if isinstance(last, list | tuple) else list(args))

    encoded = []

    def encode(*args: Any) -> tuple[Any, ...]:
        encoded.append(args)
        return args

    gpu.fill_tma_descriptor = gpu.fill_tma_descriptor_tiled = encode  # type: ignore[attr-defined]
    kind = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 64], "fp4_padded": False}
    kinds = [kind | {"block_size": [rows, 64]} for rows in (16, 32)] if described else []
    tile = "tensordesc<bf16[16, 64]>" if described else "*bf16"
    signature = dict(enumerate(["*fp32", tile, "i32", tile, "constexpr", "constexpr"]))
    run = object.__new__(nvidia.CudaLauncher)
    run.launch = nvidia.wrap_handle_tensordesc(function, signature, kinds)
    run.launch_cooperative_grid, run.launch_pdl, run.num_ctas = False, True, 1
    for name in ("global_scratch_size", "profile_scratch_size", "global_scratch_align", "profile_scratch_align"):
        setattr(run, name, 0)
    if hasattr(nvidia, "make_kernel_signature"):  # Triton 3.7
        run.arg_annotations, run.kernel_signature = "annotations", "signature"

    class Binary:
        metadata = type("Metadata", (), {"tensordesc_meta": kinds})

    binary: Any = Binary()
    binary.run, binary.function, binary.packed_metadata = run, "function", (4, 1, 0)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    memory = torch.zeros(256, 64, dtype=torch.bfloat16)
    ready = launcher._Ready(binary, (), [], [1, 3] if described else [])
    assert ready.function is function
    for height in (128, 256, 128):
        tiles: list[Any] = [memory[height - 128 :].data_ptr()] * 2
        if described:
            x = memory[256 - height :]
            tiles = [TensorDescriptor(x, [height, 64], [64, 1], [rows, 64], layout) for rows in (16, 32)]
        values = [A.data_ptr(), tiles[0], height, tiles[1]]
        run(3, 2, 1, "stream", "function", (4, 1, 0), None, None, None, *values, None, None)
        ready.launch((3, 2, 1), "stream", list(values), (None, None))  # type: ignore[arg-type]
        assert given[-1] == given[-2] and "function" in given[-1]
    if described:  # Triton's six, and of ours each address and shape once
        assert len(encoded) == 6 + 4


def test_what_is_filled_in_beside_a_tensor_is_part_of_its_encoding(gpu: Driver) -> None:
    """Descriptors of the same memory and tiles that differ in what is read beyond it, or in how it is rounded."""
    gpu.fill_tma_descriptor = gpu.fill_tma_descriptor_tiled = lambda *args: args  # type: ignore[attr-defined]
    kind = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [16, 32], "fp4_padded": False}
    memory, layout = torch.zeros(128, 32), gl.NVMMASharedLayout(128, 32, 2)
    ways: list[dict[str, Any]] = [{}, {"padding": "nan"}, {"round_f32_to_tf32": True}, {}]
    if not hasattr(TensorDescriptor, "round_f32_to_tf32"):  # Triton 3.6
        ways.pop(2)
    for way in ways:
        x = TensorDescriptor(memory, [128, 32], [32, 1], [16, 32], layout, **way)
        assert launcher._encoded(x, kind, launcher._number(repr(kind))) == nvidia.make_tensordesc_arg(x, kind), way


HASHES = """
import importlib, json, os, pkgutil, sys
from triton.runtime.jit import JITFunction
import dnsp.kernels
kernels = {}
for module in pkgutil.iter_modules(dnsp.kernels.__path__, "dnsp.kernels."):
    if module.name.rpartition(".")[2].startswith(("triton_", "gluon_")):
        here = vars(importlib.import_module(module.name))
        kernels |= {name: x for name, x in here.items() if isinstance(x, JITFunction) and name.endswith("_kernel")}
found = {name: kernels[name].cache_key for name in sorted(kernels, reverse=sys.argv[1] == "backwards")}
print(json.dumps(dict(sorted(found.items()))))
"""


def test_what_is_launched_first_decides_no_binary():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    forwards, backwards = (
        json.loads(subprocess.check_output([sys.executable, "-c", HASHES, order], env=environment, text=True))
        for order in ("forwards", "backwards")
    )
    assert len(forwards) > 20 and forwards == backwards
