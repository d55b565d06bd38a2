"""How the delta rule's passes are launched: the table as tuned, plainer ones to try, and a launch's constants.

A table is used only once it is proven (:mod:`.proof`); a launch depends on its signature and table alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from .signatures import Signature

GATES = 8  # value heads of a program that adds up dbeta and dg


@dataclass(frozen=True)
class Launch:
    """Columns of V a program (at most), warps, stages of its loop's loads, and registers a thread (None: as many as
    the compiler likes)."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# For K = V = 128 in bf16 on an H200 with Triton 3.6.
LAUNCHES = {
    "prepare_pairs": Launch(64, 4, 1, 168),  # its warps are part of how it is written; 0 stands for the next two
    "prepare": Launch(64, 4, 1),
    "invert": Launch(64, 1, 1),
    "whole_states": Launch(128, 8, 1),  # likewise, 0 for the next three
    "summarise": Launch(64, 4, 3),
    "apply": Launch(64, 4, 2),
    "keep": Launch(64, 4, 2),
    "whole_reverse": Launch(128, 8, 1),  # likewise, 0 for the next one
    "reverse_summary": Launch(64, 4, 2),
    "reverse": Launch(64, 4, 2),
    "pairs": Launch(64, 8, 3, 128),
    "queries": Launch(64, 4, 3),
    "keys": Launch(64, 8, 3),
    "backward": Launch(128, 8, 1),  # likewise, 0 for passes 3 and 4 apart
}
IN_GLUON = ("prepare_pairs", "whole_states", "whole_reverse", "backward")  # the passes' kernels for Hopper

Launches = Mapping[str, Launch]


def candidates() -> dict[str, Launches]:
    """The tables of launches to try, in order: as tuned, then what the compiler has less to do for."""
    changes: dict[str, dict[str, Any]] = {
        "as tuned": {},
        "passes apart": {},
        "one stage": {"stages": 1},
        "one stage, at most 4 warps": {"stages": 1, "warps": 4, "registers": None},
        "one stage, at most 32 columns": {"stages": 1, "columns": 32, "warps": 4, "registers": None},
        "one stage, at most 2 warps, 32 columns": {"stages": 1, "columns": 32, "warps": 2, "registers": None},
    }
    tables: dict[str, Launches] = {
        name: {use: _at_most(how, **change) for use, how in LAUNCHES.items()} for name, change in changes.items()
    }
    for name in list(tables)[1:]:  # see LAUNCHES
        tables[name] = {**tables[name], **{use: replace(LAUNCHES[use], warps=0) for use in IN_GLUON}}
    return tables


def _at_most(how: Launch, **change: Any) -> Launch:
    less: dict[str, Any] = {n: x if x is None else min(getattr(how, n), x) for n, x in change.items()}
    return replace(how, **less)


def constants(use: str, s: Signature, launches: Launches, arguments: Sequence[str]) -> dict[str, Any]:
    """Constants, those that are among a kernel's arguments, and options of its launch."""
    G = s.HV // s.H
    values: dict[str, Any] = {
        **{"H": s.H, "HV": s.HV, "G": G, "HEADS": triton.next_power_of_2(G), "K": s.K, "V": s.V},
        **{"HAS_G": s.g is not None, "HAS_DOC": s.documents is not None, "NORM": s.normalise},
        **{"ERASE": s.rule.erase, "PREVIOUS": s.rule.error_decay == "previous"},
        **{"SUMMARY": "summar" in use, "OUTPUT": use.endswith("apply"), "KEEP": use.endswith("keep")},
        **{"BK": min(s.K, 64), "TOGETHER": GATES},
        # How products of fp32 operands are formed; those of bf16 and fp16 have one way.
        "DOT": "tf32x3" if s.dtype == torch.float32 else "tf32",
    }
    named = "whole_states" if use.startswith("whole ") else use
    options: dict[str, int | None] = {}
    if named in launches:
        how = _launch(launches[named], s)
        values |= {"BV": min(s.V, how.columns, s.K if use == "summarise" else s.V), "STAGES": how.stages}
        options = how.options
    if named in IN_GLUON:
        how = launches[named]
        options = {"num_warps": how.warps}
        if how.registers is not None:
            options["maxnreg"] = how.registers
    return {name: values[name] for name in arguments if name in values} | options


def _launch(how: Launch, s: Signature) -> Launch:
    """The launch of a kernel at these widths."""
    if min(s.K, s.V) < 64:  # a warp group's matrix instructions gave wrong numbers there: two warps use others
        how = replace(how, warps=min(how.warps, 2), registers=None)
    elif max(s.K, s.V) < 128:
        how = replace(how, warps=min(how.warps, 4), registers=None)
    # Loads are fetched ahead where a multiprocessor's shared memory holds them.
    return how if max(s.K, s.V) * s.dtype.itemsize <= 256 else replace(how, stages=1, registers=None)
