"""The delta rule over a sequence group: the kernels' one differentiable op, handed the plan's scan."""

from __future__ import annotations

from torch import Tensor

from dnsp.kernels.delta_rule import begin_delta_rule as kernels_begin
from dnsp.kernels.passes import UnderWay, at_once
from dnsp.kernels.reference import Rule

from .errors import PlanError
from .plan import Plan


def begin_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor | None,
    beta_BTH: Tensor,
    *,
    plan: Plan,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    l2norm: bool = False,
) -> UnderWay:
    """Starts the gated delta rule over this rank's tokens of B sequences; ``kernels.delta_rule`` has the algebra.

    Every rank of the sequence group calls it together, with T = ``plan.local_tokens``. What is computed before
    ``finish()`` of the result, and its gradients, are computed while states travel; it must not talk to other ranks of
    the group. Calls that are under way at once are finished in the order in which they began.

    Args:
        q_BTHK, k_BTHK: ``[B, T, H, K]``; v_BTHV: ``[B, T, HV, V]``, HV a multiple of H.
        g_BTH: log decay ``<= 0``, ``[B, T, HV]`` or None; beta_BTH: write strength, ``[B, T, HV]``.
        scale: of the queries; ``K ** -0.5`` unless given.
        initial_state: ``[B, HV, K, V]`` on every rank or none; that of the rank with token 0 counts, for the rows whose
            documents the plan says go on from it.
        output_final_state: return the state behind the sequence's last token.
        l2norm: normalise q and k (eps 1e-6).

    Returns:
        the call under way; its ``finish()`` gives outputs ``[B, T, HV, V]``, and the final state ``[B, HV, K, V]`` on
        the rank that holds the last token (``plan.holds_last``), None on the others.

    Raises:
        PlanError, ValueError, TypeError: what does not fit, naming value and rule. PeerLost: a rank is gone.
    """
    if initial_state is not None and not plan.goes_on:
        raise PlanError("initial_state: no document of the plan goes on from it; begin its row of doc_starts with -1")
    return kernels_begin(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        g_BTH,
        beta_BTH,
        scale=k_BTHK.shape[-1] ** -0.5 if scale is None else scale,
        segments=plan.segments,
        scan=plan.scan,
        doc_start_BT=plan.doc_start_BT,
        initial_state_BHKV=initial_state,
        output_final_state=output_final_state,
        rule=rule,
        normalise_qk=l2norm,
    )


delta_rule = at_once(begin_delta_rule)  # outputs and final state
