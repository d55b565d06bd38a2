"""The Triton kernels compiled for a GPU that need not be there: registers' spills and matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from dnsp.kernels import (
    gluon_backward,
    gluon_chunk,
    gluon_prepare,
    gluon_reverse,
    gluon_states,
    triton_gradients,
    triton_prepare,
    triton_reverse,
    triton_states,
)
from dnsp.kernels.launches import GATES, LAUNCHES, Launch

KERNELS = {
    "prepare_pairs": gluon_prepare.prepare_pairs_kernel,
    "prepare": triton_prepare.prepare_kernel,
    "invert": triton_prepare.invert_kernel,
    "whole_states": gluon_states.whole_states_kernel,
    "summarise": triton_states.states_kernel,
    "apply": triton_states.states_kernel,
    "keep": triton_states.states_kernel,
    "whole_reverse": gluon_reverse.whole_reverse_kernel,
    "reverse_summary": triton_reverse.reverse_kernel,
    "reverse": triton_reverse.reverse_kernel,
    "pairs": triton_gradients.pairs_kernel,
    "queries": triton_gradients.queries_kernel,
    "keys": triton_gradients.keys_kernel,
    "backward": gluon_backward.backward_kernel,
    "gates": triton_gradients.gates_kernel,
}
# Blocks of those arguments that are fetched by descriptors.
TILES = {
    **dict.fromkeys(("states",), (128, 128)), **dict.fromkeys(("errors",), (64, 128)),
    **dict.fromkeys(("A", "P"), (64, 64)),
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), (1, 64, 1, 128)),
}  # fmt: skip
FP32 = {"g", "beta", "N", "rows", "through", "bound", "incoming", "outgoing", "M", "U", "D", "parts", "dg", "dbeta"}
INTEGERS = {"T", "NC", "segment_chunks", "B", "N", "row0", "every", "count", "group", "size"}


@dataclass(frozen=True)
class Compiled:
    spilled: int  # bytes of local memory a thread
    matrix: set[str]  # matrix instructions

    @staticmethod
    def of(cubin: bytes) -> Compiled:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage, code = (
                subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                for flag in ("-res-usage", "-sass")
            )
        found = re.search(r"STACK:(\d+)", usage)
        assert found, usage
        return Compiled(int(found[1]), set(re.findall(r"\b(UTCHMMA|HGMMA|HMMA)\b", code)))


def compiled(
    use: str, capability: int, *, K: int = 128, V: int = 128, H: int = 16, G: int = 2, documents: bool = False
) -> Compiled:
    """The kernel as ``chunk_triton`` launches it for bf16 operands, decay and normalised keys."""
    kernel, launch = KERNELS[use], LAUNCHES.get(use, Launch(64, 4, 1))  # gates has Triton's own four warps
    constants: dict[str, Any] = {
        **{"H": H, "HV": H * G, "G": G, "HEADS": G, "TOGETHER": GATES},
        **{"K": K, "V": V, "BV": min(V, launch.columns), "BK": min(K, 64)},
        **{"sqt": H * K, "sqh": K, "skt": H * K, "skh": K, "svt": H * G * V, "svh": V, "sot": H * G * V, "soh": V},
        **{"sgt": H * G, "sgh": 1, "sbt": H * G, "sbh": 1, "DOT": "tf32", "STAGES": launch.stages},
        **{"ERASE": True, "HAS_G": True, "HAS_DOC": documents, "PREVIOUS": False, "NORM": True},
        **{"SUM": True, "LAST": True, "HALVES": True},
        **{"SUMMARY": "summar" in use, "OUTPUT": use in ("apply", "whole_states"), "KEEP": use == "keep"},
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types, attributes = {}, {}
    tiles = use in ("prepare", "invert")  # there N is a pointer, elsewhere the number of segments
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif re.fullmatch("s[qkvogb]b", name):
            types[name] = "i64"
        elif name in INTEGERS and not (tiles and name == "N"):
            types[name] = "i32"
        elif kernel.is_gluon() and name in TILES:
            layout = gluon_chunk.TILE if len(TILES[name]) == 2 else gluon_chunk.TOKENS
            types[name] = f"tensordesc<bf16{list(TILES[name])},{layout.value!r}>"
        elif name == "scales":
            count = 512 if use == "backward" else 256
            types[name] = f"tensordesc<fp32[1, {count}],{gluon_chunk.SCALES.value!r}>"
        elif name == "scale":
            types[name] = "fp32"
        else:
            special = {"doc": "*i32", "need": "*i32", "starts": "*i64", "forgets": "*i32"}
            types[name] = special.get(name, "*fp32" if name in FP32 else "*bf16")
            attributes[(i,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, types, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    return Compiled.of(binary.asm["cubin"])


def another_ptxas(folder: Path) -> str:
    """The path of a program that says it is another version, notes that it was asked to assemble, and does."""
    log, program = folder / "asked", folder / "ptxas"
    program.write_text(
        f"""#!/bin/sh
        case "$*" in --version) echo "Cuda compilation tools, release 12.7, V12.7.99"; exit;; esac
        echo "$@" >> {log}
        exec {knobs.nvidia.ptxas.path} "$@"
        """
    )
    program.chmod(0o755)
    return str(program)
