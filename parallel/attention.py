"""Causal softmax attention inside documents, over a sequence group, by whole blocks merged by log-sum-exp.

A query's keys lie in several blocks (see blocks.py), each in one call of a backend. Outputs are merged as they come in,
o = sum_i o_i exp(lse_i - lse) (Liu, Zaharia & Abbeel 2023, Ring Attention). The backward of each block, given the
merged o and lse, yields its share of dq, dk, dv; shares are summed in fp32, always in the order of the rounds.

    ring    in round s each rank works on the keys of the rank s places before it, which arrive while it works on those
            of round s-1; only the ranges that documents and causality call for travel. P-1 rounds.
    peer    the ring, through memory that the ranks share: its messages are made and taken by the GPUs alone.
    gather  all keys and values are gathered first; the same rounds, the same bits, P times the memory for keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnsp.kernels import kept

from .attention_backends import Backend, Edges, Heads, choose
from .blocks import Call, Range, Round
from .plan import Plan
from .transport import Exchange, Transport

if TYPE_CHECKING:
    from .post import Post, Posted

KV = list[tuple[Tensor, Tensor]]  # keys and values of a round, one pair a piece, [B, tokens, G, D]


def attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, plan: Plan, scale: float | None = None) -> Tensor:
    """Outputs ``[B, T, H, D]`` of this rank's queries over all keys of their documents up to themselves.

    H is a multiple of G (grouped-query heads); T = ``plan.local_tokens``; ``scale`` is ``D ** -0.5`` unless given.
    Every rank of the sequence group calls it together. Memory is linear in T.

    Raises: ValueError where shapes do not fit, naming them; PeerLost where a rank is gone.
    """
    B, T, H, D = q_BTHD.shape
    if plan.batch != B or plan.local_tokens != T:
        raise ValueError(
            f"q{list(q_BTHD.shape)}: the plan is for B={plan.batch} rows of T={plan.local_tokens} local tokens"
        )
    if k_BTGD.shape[:2] != (B, T) or v_BTGD.shape[:3] != k_BTGD.shape[:3] or k_BTGD.shape[3] != D:
        raise ValueError(
            f"k{list(k_BTGD.shape)}, v{list(v_BTGD.shape)}: expected [B, T, G, D] with B={B}, T={T}, D={D}, as q"
        )
    if H % k_BTGD.shape[2]:
        raise ValueError(
            f"{H} query heads over {k_BTGD.shape[2]} key heads: the first must be a multiple of the second"
        )
    return _Attention.apply(q_BTHD, k_BTGD, v_BTGD, plan, D**-0.5 if scale is None else scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # sums of a backend made of matrix products are fp32
            backend, _ = choose(heads_of(q, k, v), plan.attention_backend)
            o, lse = kept.once(lambda: _forward(q, k, v, plan, scale, backend))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.scale, ctx.backend = plan, scale, backend
        return o.detach()  # what is kept stays free of this graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return *_backward(do, q, k, v, o, lse, ctx.plan, ctx.scale, ctx.backend), None, None


def heads_of(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Heads:
    """What the choice of a backend depends on."""
    return Heads(q_BTHD.device, q_BTHD.dtype, q_BTHD.shape[2], k_BTGD.shape[2], k_BTGD.shape[3], v_BTGD.shape[3])


def _one_call(plan: Plan) -> Edges:
    """What it sees, where all of it is one call on one rank, with nothing to merge or to sum: rows of a document each,
    a batch of them, or documents side by side over all rows. Otherwise ()."""
    (work, *others) = plan.rounds
    whole = (0, plan.local_tokens)
    if others:
        return ()
    if len(work.blocks) == plan.batch and all(block.query == whole for block in work.blocks):
        return whole
    return work.calls[0].edges if len(work.calls) == 1 else ()


def _in_one_call(x_BTHD: Tensor, edges: Edges) -> Tensor:
    """As a backend takes it, ``[B, H, T, D]`` or, several documents, ``[1, H, B T, D]``."""
    return (x_BTHD if len(edges) == 2 else x_BTHD.flatten(0, 1).unsqueeze(0)).transpose(1, 2)


def _merges(plan: Plan) -> bool:
    """Whether queries may see keys of several blocks, here or on another rank; otherwise no sum is wider than what is
    summed."""
    return len(plan.rounds) > 1 or any(not block.causal for block in plan.rounds[0].blocks)


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """Merged ``o_BTHD`` in q's dtype, and ``lse`` in fp32 (fp64 for fp64), ``[1, H, B T]`` (``[B, H, T]`` where one
    call has a batch)."""
    _meet(q, k, v, plan, "forward")
    wide, edges = _wide(q), _one_call(plan)
    shape = *q.shape[:3], v.shape[3]
    if edges:
        q, k, v = (_in_one_call(x, edges) for x in (q, k, v))
        o, lse = backend.forward(q, k, v, edges, scale)
        o = o.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format)
        return o.view(shape), lse.to(wide)
    o = torch.empty(shape, dtype=wide if _merges(plan) else q.dtype, device=q.device)
    lse = torch.empty((1, q.shape[2], q.shape[0] * q.shape[1]), dtype=wide, device=q.device)
    keys = _Keys(k, v, plan, "forward")
    for work in plan.rounds:
        pieces = keys.next(work)
        for call in work.calls:
            part, part_lse = backend.forward(_tokens(q, call), *_keys_of(pieces, call), call.edges, scale)
            _merge(_tokens(o, call), _sums(lse, call), part, part_lse.to(wide), first=bool(call.edges))
    return o.to(q.dtype), lse


def _meet(q: Tensor, k: Tensor, v: Tensor, plan: Plan, way: str) -> None:
    """All ranks of the group, before the first of their keys and values."""
    heads = {"query heads": q.shape[2], "key heads": k.shape[2], "key width": k.shape[3], "value width": v.shape[3]}
    plan.comm.first("attention's heads", k, way, plan.layer, **heads)


def _merge(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, first: bool) -> None:
    """One more block of the same queries into ``o_BHSD`` and ``lse_BHS``, in place; the square comes first."""
    if first:
        o.copy_(part)
        lse.copy_(part_lse)
        return
    both = torch.logaddexp(lse, part_lse)
    o.mul_(torch.exp(lse - both)[..., None]).addcmul_(part, torch.exp(part_lse - both)[..., None])
    lse.copy_(both)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, plan: Plan, scale: float, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    _meet(q, k, v, plan, "backward")
    if edges := _one_call(plan):
        like = q, k, v
        do, q, k, v, o = (_in_one_call(x, edges) for x in (do, q, k, v, o))
        grads = backend.backward(do, q, k, v, o, lse, edges, scale)
        dq, dk, dv = (dx.transpose(1, 2).reshape(x.shape).to(x.dtype) for dx, x in zip(grads, like, strict=True))
        return dq, dk, dv
    wide = _wide(q) if _merges(plan) else q.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    keys = _Keys(k, v, plan, "backward")
    returning: tuple[Exchange | Posted, Round, Tensor] | None = None
    for work in plan.rounds:
        pieces = keys.next(work)
        own = work.owner == plan.rank
        buffer = k.new_zeros(0) if own else _buffer(work.pieces, k, v, wide).zero_()
        shares = _cut(dk, dv, work.pieces) if own else _split(buffer, work.pieces, k, v)
        for call in work.calls:
            dq_part, dk_part, dv_part = backend.backward(
                _tokens(do, call),
                _tokens(q, call),
                *_keys_of(pieces, call),
                _tokens(o, call),
                _sums(lse, call),
                call.edges,
                scale,
            )
            _tokens(dq, call).add_(dq_part)
            for share, part in zip(_keys_of(shares, call), (dk_part, dv_part), strict=True):
                share.add_(part)
        if returning is not None:
            _add_returned(returning, dk, dv, k, v)
        if not own:  # the share goes home while the next round is worked on
            arriving = _buffer(work.sends, k, v, wide)
            what = plan.named("attention's return of key gradients (backward)")
            exchange = _exchange(plan, k, v, [(work.owner, buffer)], [(work.reader, arriving)], what)
            returning = exchange, work, arriving
    if returning is not None:
        _add_returned(returning, dk, dv, k, v)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _exchange(
    plan: Plan, k: Tensor, v: Tensor, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], what: str
) -> Exchange | Posted:
    """Messages to and from other ranks, none larger than the gradients of all keys and values here."""
    mail: Transport | Post = plan.comm
    if plan.attention_transport == "peer":
        wide = torch.promote_types(k.dtype, _wide(k))
        mail = plan.mail("peer", k, (k.numel() + v.numel()) * wide.itemsize)
        plan.comm.calls += 1
    return mail.exchange(sends, receives, what)


def _add_returned(
    returning: tuple[Exchange | Posted, Round, Tensor], dk: Tensor, dv: Tensor, k: Tensor, v: Tensor
) -> None:
    exchange, work, arriving = returning
    exchange.wait()
    for mine, back in zip(_cut(dk, dv, work.sends), _split(arriving, work.sends, k, v), strict=True):
        mine[0].add_(back[0])
        mine[1].add_(back[1])


class _Keys:
    """Keys and values for one round after another; those of the next round travel while one is worked on."""

    def __init__(self, k: Tensor, v: Tensor, plan: Plan, way: str) -> None:
        self._k, self._v, self._plan = k, v, plan
        self._what = plan.named(f"attention's exchange of keys and values ({way})")
        self._ahead: tuple[Exchange | Posted, Tensor] | None = None
        self._all: tuple[Tensor, Tensor] | None = None  # by rank
        if plan.attention_transport == "gather" and plan.crosses:
            self._all = plan.comm.all_gather(k, self._what), plan.comm.all_gather(v, self._what)

    def next(self, work: Round) -> KV:
        """The pieces of a round; called once for each, in order."""
        shift = (self._plan.rank - work.owner) % self._plan.layout.ranks
        ahead = self._ahead
        if self._all is None and shift + 1 < len(self._plan.rounds):
            self._ahead = self._start(self._plan.rounds[shift + 1])
        if shift == 0:
            return _cut(self._k, self._v, work.pieces)
        if self._all is not None:
            return _cut(self._all[0][work.owner], self._all[1][work.owner], work.pieces)
        assert ahead is not None
        ahead[0].wait()
        return _split(ahead[1], work.pieces, self._k, self._v)

    def _start(self, work: Round) -> tuple[Exchange | Posted, Tensor]:
        leaving = _join(_cut(self._k, self._v, work.sends), self._k)
        arriving = _buffer(work.pieces, self._k, self._v, self._k.dtype)
        ends = [(work.reader, leaving)], [(work.owner, arriving)]
        exchange = _exchange(self._plan, self._k, self._v, *ends, self._what)
        return exchange, arriving


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _cut(k: Tensor, v: Tensor, pieces: tuple[Range, ...]) -> KV:
    return [(k[:, start:stop], v[:, start:stop]) for start, stop in pieces]


def _join(kv: KV, like: Tensor) -> Tensor:
    """Pieces as one flat message."""
    return torch.cat([part.flatten() for pair in kv for part in pair]) if kv else like.new_zeros(0)


def _buffer(pieces: tuple[Range, ...], k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    tokens = sum(stop - start for start, stop in pieces)
    return torch.empty(tokens * (k[:, :1].numel() + v[:, :1].numel()), dtype=dtype, device=k.device)


def _split(flat: Tensor, pieces: tuple[Range, ...], k: Tensor, v: Tensor) -> KV:
    """A flat message as views of its pieces; what :func:`_join` joined."""
    kv, at = [], 0
    for start, stop in pieces:
        views = []
        for like in (k, v):
            shape = (like.shape[0], stop - start, *like.shape[2:])
            size = shape[0] * shape[1] * shape[2] * shape[3]
            views.append(flat[at : at + size].view(shape))
            at += size
        kv.append((views[0], views[1]))
    return kv


def _tokens(x_BTHD: Tensor, call: Call) -> Tensor:
    """The tokens of a call's queries ``[1, H, S, D]``, a view where rows lie one behind the other in memory."""
    return x_BTHD.flatten(0, 1)[slice(*call.query)].unsqueeze(0).transpose(1, 2)


def _keys_of(pieces: KV, call: Call) -> tuple[Tensor, Tensor]:
    k, v = pieces[call.piece]
    if call.edges:  # this rank's own, of all rows
        return _tokens(k, call), _tokens(v, call)
    row, tokens = slice(call.row, call.row + 1), slice(*call.key)
    return k[row, tokens].transpose(1, 2), v[row, tokens].transpose(1, 2)


def _sums(lse_1HN: Tensor, call: Call) -> Tensor:
    return lse_1HN[:, :, slice(*call.query)]
