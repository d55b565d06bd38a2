"""What computes: torch's operations, or Triton's kernels. A call says which, or the environment, or else the device."""

from __future__ import annotations

import os
from typing import Literal

from torch import Tensor

Backend = Literal["torch", "triton"]


def kernels_for_program() -> str | None:
    """The backend that the environment's DNSP_DELTA_RULE asks for, ``torch`` or ``triton``; None where it is silent."""
    return os.environ.get("DNSP_DELTA_RULE") or None


def choose(asked: str | None, x: Tensor) -> Backend:
    """What was asked for here, or else for the whole program, or else Triton on a GPU and torch elsewhere.

    Raises: ValueError for a backend that is not known.
    """
    program = kernels_for_program()
    found = asked or program or ("triton" if x.is_cuda else "torch")
    if found not in ("torch", "triton"):
        who = f"backend={asked!r}" if asked else f"DNSP_DELTA_RULE={program}"
        raise ValueError(f"{who}: give 'triton' (the default on a GPU) or 'torch' (any device)")
    return "triton" if found == "triton" else "torch"


def choose_fitting(asked: str | None, x: Tensor) -> Backend:
    """The same of what has no kernel for some inputs: there the environment can only say torch, for all."""
    if asked not in (None, "torch", "triton"):
        raise ValueError(f"backend={asked!r}: give 'triton' (a GPU), 'torch' (any device), or None for what fits")
    if asked == "triton" or (asked is None and x.is_cuda and kernels_for_program() != "torch"):
        return "triton"
    return "torch"
