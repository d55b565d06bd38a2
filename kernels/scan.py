"""The scan of boundary states over segments.

A segment is affine in the state that enters it, ``S_out = M S_in + U``, and its gradient is affine in the gradient
that enters it from the right, ``dS_in = M^T dS_out + D``. A state crosses a segment only by :func:`fold`, segment by
segment in global order, so that the bits do not depend on who holds which segment.

Summaries and states are stacked segment first: ``M [N, B, HV, K, K]``, ``U``, ``D`` and states ``[N, B, HV, K, V]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from . import operators
from .backend import kernels_for_program

Coming = Callable[[], tuple[Tensor, Tensor | None]]  # awaits a pass that was started; called once


class Scan(Protocol):
    """What the delta rule asks of a scan: exclusive prefixes over the whole sequence, for the segments held here.

    Each pass is started by a call, and awaited by calling what that returns; what is computed between the two is
    computed while states travel.

    ``has_initial`` and ``want_final`` are the same on every rank of a group. ``continues_NB[n, b]`` says whether the
    state passes through local segment n in row b (False where a document starts inside it); None: always.
    ``forgets_NBH``, int32: where given, nonzero where M of local segment n is exactly zero in row b and head h. That
    saves the reading of it, and changes no bit.
    Entries of M, U, D and of those flags that :class:`~dnsp.kernels.delta_rule.Segments` calls unneeded are never read.
    """

    @property
    def here(self) -> bool:
        """Whether all segments of the sequence are held here, and nothing travels."""
        ...

    def forward(
        self,
        M_NBHKK: Tensor,
        U_NBHKV: Tensor,
        continues_NB: Tensor | None,
        forgets_NBH: Tensor | None,
        initial_BHKV: Tensor | None,
        want_final: bool,
    ) -> Coming:
        """``(incoming_NBHKV, final_BHKV)``: the state that enters each local segment, and the one that leaves the
        last segment of the sequence (None unless wanted, and on ranks that do not hold it)."""
        ...

    def reverse(
        self,
        M_NBHKK: Tensor,
        D_NBHKV: Tensor,
        continues_NB: Tensor | None,
        forgets_NBH: Tensor | None,
        final_grad_BHKV: Tensor | None,
        has_initial: bool,
        want_final: bool,
    ) -> Coming:
        """``(outgoing_NBHKV, initial_grad_BHKV)``: the gradient of the state that leaves each local segment, and that
        of the initial state (None without one, and on ranks that do not hold the first segment)."""
        ...


def fold(M_BHKK: Tensor, U_BHKV: Tensor, S_BHKV: Tensor | None, continues_B: Tensor | None) -> Tensor:
    """``fl(M S + U)``, the state behind one segment; U alone where S is structurally zero (None) or does not pass."""
    if S_BHKV is None:
        return U_BHKV
    if on_gpu(U_BHKV):
        return _one_segment(M_BHKK, U_BHKV, S_BHKV, continues_B, reverse=False)
    # In fp64 and rounded once: the program may allow torch's fp32 products one pass of TF32, and this chain is long.
    through = (torch.matmul(M_BHKK.double(), S_BHKV.double()) + U_BHKV.double()).to(U_BHKV.dtype)
    if continues_B is None:
        return through
    return torch.where(continues_B[:, None, None, None], through, U_BHKV)  # select: 0 * inf must not leak


def reverse_fold(M_BHKK: Tensor, D_BHKV: Tensor, dS_BHKV: Tensor | None, continues_B: Tensor | None) -> Tensor:
    """``fl(M^T dS + D)``, the gradient of the state before one segment."""
    if dS_BHKV is not None and on_gpu(D_BHKV):
        return _one_segment(M_BHKK, D_BHKV, dS_BHKV, continues_B, reverse=True)
    return fold(M_BHKK.mT, D_BHKV, dS_BHKV, continues_B)


def on_gpu(U: Tensor) -> bool:
    """Whether the fold's kernel takes these summaries: on a GPU, unless the program asked for torch's operations."""
    if not U.is_cuda or kernels_for_program() == "torch":
        return False
    from . import triton_scan

    return triton_scan.takes(U)


def _one_segment(M: Tensor, U: Tensor, S: Tensor, continues: Tensor | None, reverse: bool) -> Tensor:
    return operators.fold(M[None], U[None], S, None if continues is None else continues[None], None, 1, reverse)[1]


def stack_states(states: list[Tensor | None], like_NBHKV: Tensor) -> Tensor:
    """States in a list, None for zero, as one tensor ``[N, B, HV, K, V]``."""
    return torch.stack([torch.zeros_like(like_NBHKV[0]) if s is None else s for s in states])


class LocalScan:
    """The scan where every segment is here: one rank. Nothing travels, and a pass is done when it was started."""

    here = True

    def forward(
        self,
        M_NBHKK: Tensor,
        U_NBHKV: Tensor,
        continues_NB: Tensor | None,
        forgets_NBH: Tensor | None,
        initial_BHKV: Tensor | None,
        want_final: bool,
    ) -> Coming:
        if on_gpu(U_NBHKV):
            steps = len(U_NBHKV) - (not want_final)
            incoming_NBHKV, final = operators.fold(
                M_NBHKK, U_NBHKV, initial_BHKV, continues_NB, forgets_NBH, steps, False
            )
            return lambda: (incoming_NBHKV, final if want_final else None)
        state, incoming, last = initial_BHKV, [], len(U_NBHKV) - 1
        for n in range(len(U_NBHKV)):
            incoming.append(state)
            if n < last or want_final:
                state = fold(M_NBHKK[n], U_NBHKV[n], state, None if continues_NB is None else continues_NB[n])
        states = stack_states(incoming, U_NBHKV)
        return lambda: (states, state if want_final else None)

    def reverse(
        self,
        M_NBHKK: Tensor,
        D_NBHKV: Tensor,
        continues_NB: Tensor | None,
        forgets_NBH: Tensor | None,
        final_grad_BHKV: Tensor | None,
        has_initial: bool,
        want_final: bool,
    ) -> Coming:
        del want_final  # all is here: a missing final gradient is a zero one
        if on_gpu(D_NBHKV):
            steps = len(D_NBHKV) - (not has_initial)
            outgoing_NBHKV, first = operators.fold(
                M_NBHKK, D_NBHKV, final_grad_BHKV, continues_NB, forgets_NBH, steps, True
            )
            return lambda: (outgoing_NBHKV, first if has_initial else None)
        grad, outgoing = final_grad_BHKV, []
        for n in reversed(range(len(D_NBHKV))):
            outgoing.append(grad)
            if n > 0 or has_initial:
                grad = reverse_fold(M_NBHKK[n], D_NBHKV[n], grad, None if continues_NB is None else continues_NB[n])
        grads = stack_states(outgoing[::-1], D_NBHKV)
        return lambda: (grads, grad if has_initial else None)
