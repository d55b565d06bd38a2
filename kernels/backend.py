"""What computes: torch's operations, or Triton's kernels. A call says which, or the environment, or else the device."""

from __future__ import annotations

import os
from typing import Literal

from torch import Tensor

Backend = Literal["torch", "triton"]
WAY_OUT = "take the (much slower) torch path: backend='torch', or DNSP_DELTA_RULE=torch in the environment"


def kernels_for_program() -> str | None:
    """The backend that the environment's DNSP_DELTA_RULE asks for, ``torch`` or ``triton``; None where it is silent.

    Raises: ValueError for a backend that is not known.
    """
    program = os.environ.get("DNSP_DELTA_RULE") or None
    if program not in (None, "torch", "triton"):
        raise ValueError(f"DNSP_DELTA_RULE={program}: give 'triton' (the default on a GPU) or 'torch' (any device)")
    return program


def choose(asked: str | None, x: Tensor) -> Backend:
    """What was asked for here, or else for the whole program, or else Triton on a GPU and torch elsewhere.

    Raises: ValueError for a backend that is not known.
    """
    if asked not in (None, "torch", "triton"):
        raise ValueError(f"backend={asked!r}: give 'triton' (the default on a GPU) or 'torch' (any device)")
    found = asked or kernels_for_program() or ("triton" if x.is_cuda else "torch")
    return "triton" if found == "triton" else "torch"


def choose_fitting(asked: str | None, x: Tensor) -> Backend:
    """The same of what has no kernel for some inputs: there the environment can only say torch, for all."""
    if asked not in (None, "torch", "triton"):
        raise ValueError(f"backend={asked!r}: give 'triton' (a GPU), 'torch' (any device), or None for what fits")
    if asked == "triton" or (asked is None and kernels_for_program() != "torch" and x.is_cuda):
        return "triton"
    return "torch"
