"""The fold of summaries over segments in one launch: ``S <- fl(M S + U)``, or ``dS <- fl(M^T dS + D)`` right to left.

A state is taken through a segment by the same instructions whether the launch holds one segment or all, so that the
bits do not depend on who holds which. Products of fp32 numbers in three tf32 passes. The state is held transposed, as
in the passes: a block of its columns a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import proof

COLUMNS, WIDEST = 16, 128  # of the state, a program; beyond WIDEST a summary's M does not fit a multiprocessor


@triton.jit(do_not_specialize=["N", "steps", "B", "HV"], do_not_specialize_on_alignment=["continues"])
def fold_kernel(
    M, U, first, continues, states, last, N, steps, B, HV,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_CONTINUES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    ck = tl.arange(0, K)
    at = (row * K + ck[None, :]) * V + tl.program_id(0) * BV + tl.arange(0, BV)[:, None]
    S = tl.zeros((BV, K), tl.float32)
    if HAS_FIRST:
        S = tl.load(first + at)
    rows = tl.num_programs(1).to(tl.int64)
    for i in tl.range(0, N, num_stages=2):  # M is fetched ahead
        n = N - 1 - i if REVERSE else i
        tl.store(states + n * rows * K * V + at, S)
        # What is structurally zero is not multiplied, and M is not read where it was not made.
        through = i < steps
        if not HAS_FIRST:
            through = through & (i > 0)
        if HAS_CONTINUES:
            through = through & (tl.load(continues + n * B + row // HV) != 0)
        tile = M + (n * rows + row) * K * K
        if REVERSE:
            M_T = tl.load(tile + ck[:, None] * K + ck[None, :], mask=through, other=0.0)
        else:
            M_T = tl.load(tile + ck[None, :] * K + ck[:, None], mask=through, other=0.0)
        added = tl.load(U + n * rows * K * V + at, mask=i < steps, other=0.0)
        crossed = tl.dot(S, M_T, input_precision="tf32x3") + added
        S = tl.where(through, crossed, added)  # select: 0 * inf must not leak
    tl.store(last + at, S)


def takes(U: Tensor) -> bool:
    """Whether the kernel folds summaries like these; where not, torch's matrix products do, for one segment or many."""
    K, V = U.shape[-2:]
    return U.is_cuda and U.dtype == torch.float32 and K in (16, 32, 64, WIDEST) and V % COLUMNS == 0


def fold(
    M_NBHKK: Tensor,
    U_NBHKV: Tensor,
    first_BHKV: Tensor | None,
    continues_NB: Tensor | None,
    steps: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """``(the state that enters each segment, the state behind the last of the first ``steps`` segments folded)``.

    In reverse: the gradient of the state that leaves each, and of the one that enters the last of them.
    """
    N, B, HV, K, V = U_NBHKV.shape
    M_NBHKK, U_NBHKV = M_NBHKK.contiguous(), U_NBHKV.contiguous()
    states, last = torch.empty_like(U_NBHKV), torch.empty_like(U_NBHKV[0])
    proof.require_fold(U_NBHKV)
    proof.launch(
        fold_kernel, (V // COLUMNS, B * HV),
        M_NBHKK, U_NBHKV, U_NBHKV if first_BHKV is None else first_BHKV.contiguous(),
        U_NBHKV if continues_NB is None else continues_NB.contiguous(), states, last, N, steps, B, HV,
        K=K, V=V, BV=COLUMNS, HAS_FIRST=first_BHKV is not None, HAS_CONTINUES=continues_NB is not None, REVERSE=reverse,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return states, last
