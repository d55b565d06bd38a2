"""What ``dnsp verify`` found, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dnsp.json_files import write_json

if TYPE_CHECKING:
    from dnsp.verify import Request

# Relative errors, |got - want| / |want|.
GRADIENT_TOLERANCE = 5e-5  # fp32, every parameter by itself
LOSS_TOLERANCE = {"fp32": 5e-6, "bf16": 5e-3}
BF16_FACTOR = 1.2  # bf16: the error against fp32 may be this much of one bf16 process's
BF16_WRONG = 0.25  # bf16: a tensor so far off is not rounded but wrong


@dataclass(frozen=True)
class Case:
    """One row of the verdict."""

    ranks: int
    sequence: int  # of them in a sequence group
    zero: int  # stage
    layout: str
    transport: str
    loss: float
    loss_rel_err: float
    worst_param: str
    worst_grad_rel_err: float
    delta_bitwise_equal: bool
    ok: bool


def conclude(request: Request, cases: Sequence[Case], json_path: Path | None) -> int:
    """Show the verdict, write it, and return the exit status."""
    failed = [case for case in cases if not case.ok]
    console = Console(highlight=False)
    console.print(table(request, cases))
    worst = max(cases, key=lambda case: case.worst_grad_rel_err)
    for case in failed or [worst]:
        console.print(
            f"  worst gradient: {case.worst_param} {case.worst_grad_rel_err:.2e} "
            f"(ranks {case.ranks} in groups of {case.sequence}, ZeRO {case.zero}, {case.layout}, {case.transport})",
            soft_wrap=True,
        )
    within = f"within {GRADIENT_TOLERANCE:g} of" if request.dtype == "fp32" else f"as near fp32 (x {BF16_FACTOR:g}) as"
    count = f"[{'red' if failed else 'green'}]{len(cases) - len(failed)} of {len(cases)} hold[/]"
    console.print(f"{count}: gradients {within} one process's, the delta rule with its bits.", soft_wrap=True)
    what = {"dtype": request.dtype, "sequence_length": request.tokens, "segment_tokens": request.segment_tokens}
    write_json(json_path, {"ok": not failed, **what, "cases": [dataclasses.asdict(case) for case in cases]})
    return 1 if failed else 0


def table(request: Request, cases: Sequence[Case]) -> Table:
    """The verdict for people."""
    title = f"{request.tokens:,} tokens, {request.dtype}, segments of {request.segment_tokens}"
    rows = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    words = ("layout", "transport", "delta rule", "")  # all of it within 80 columns
    for column in ("ranks", "group", "ZeRO", *words[:2], "loss", "error", "grads", *words[2:]):
        rows.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for case in cases:
        rows.add_row(
            *(str(case.ranks), str(case.sequence), str(case.zero)),
            case.layout,
            case.transport,
            f"{case.loss:.5f}",
            f"{case.loss_rel_err:.1e}",
            f"{case.worst_grad_rel_err:.1e}",
            "same bits" if case.delta_bitwise_equal else "[red]differs[/]",
            "[green]ok[/]" if case.ok else "[bold red]FAIL[/]",
        )
    return rows
