"""The fold of summaries over segments in one launch: ``S <- fl(M S + U)``, or ``dS <- fl(M^T dS + D)`` right to left.

A state is taken through a segment by the same instructions whether the launch holds one segment or all, so that the
bits do not depend on who holds which. Products of fp32 numbers in three tf32 passes. The state is held transposed, as
in the passes: a block of its columns, a *tile*, a program.

A segment that forgets, whose M has no normal number and so is zero, leaves U alone. Where those who made the summaries
say of which segments that is so, their M is not read, and where it is so of all that a state crosses nothing is
multiplied; the bits are the same.

A state may come out of an inbox and go into an outbox, tile by tile; whose memory they are in is not known here:

    wait_kernel   waits on the device until all tiles have arrived and the outbox has room, or time is up: one warp for
                  256 tiles, so that whoever waits leaves the device to those who work
    fold_kernel   takes each tile from its slot and says so, folds, writes the tile into the outbox's slot, and raises
                  the tile's flag there. The same binary, with mail or without.

Mail is counted on the device, tile by tile, and flags are those counts: nothing is ever reset, arguments do not change
from call to call (a CUDA graph freezes them), and counts are compared by their difference, which may wrap. Of a tile,

    free <= taken <= ready <= sent <= free + DEPTH

at all times, whoever looks: a producer counts ``sent`` before it raises ``ready``, a consumer ``taken`` before
``free``, and a slot is written again only when ``sent - free < DEPTH``, that is, when what was in it has been read. A
pass waits for messages of earlier ones and of its own earlier hops alone, so that some rank can always go on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import proof

COLUMNS, WIDEST = 16, 128  # of the state, a program; beyond WIDEST a summary's M does not fit a multiprocessor
TILE = COLUMNS * WIDEST  # numbers of the largest tile; every tile of a slot has its place, whatever its size
SLICE = 32  # rows of M^T a product: of a whole M the three parts of every number would be most of the registers
LOOK = tl.constexpr(64)  # segments whose flags are looked at together
DEPTH = 4  # slots of an inbox, a power of two: how many messages a producer may be ahead
WAITED = 256  # tiles that one program waits for
NOTHING, FIRST, INBOX = 0, 1, 2  # where a fold's first state comes from: it is zero, it is here, it arrives


class Inbox(NamedTuple):
    """Where states arrive. ``slots_DCN``: fp32 ``[DEPTH, capacity, TILE]``; counts of messages by tile, int32:
    ``ready_C`` delivered (written by the producer), ``taken_C`` taken (ours alone), ``free_C`` taken, in the producer's
    memory, where it reads them."""

    slots_DCN: Tensor
    ready_C: Tensor
    taken_C: Tensor
    free_C: Tensor


class Outbox(NamedTuple):
    """Where states go: the other end of an :class:`Inbox`. ``sent_C`` is ours alone, ``free_C`` what the consumer says
    it has taken, ``slots_DCN`` and ``ready_C`` are in the consumer's memory."""

    slots_DCN: Tensor
    ready_C: Tensor
    sent_C: Tensor
    free_C: Tensor


class Clock(NamedTuple):
    """How long to wait, and where it is written down.

    ``status``: int32 ``[4]`` on the device: 1 where something did not come in time, whereupon nothing is waited for or
    delivered any more; and whom a wait is for, the rank + 1, 0 in none. ``record``: int64 ``[1]`` in pinned memory,
    ``4 * where`` and 1 for the inbox, 2 for the outbox, of the wait that was in vain; 0 for none. ``stamps``: int64
    ``[2 + capacity]``, ns of the device's timer: when the last wait began and ended, and when each tile's flag was
    raised. ``limit``: microseconds."""

    status: Tensor
    record: Tensor
    stamps: Tensor
    limit: int


@triton.jit
def _now(TIMED: tl.constexpr):
    """Nanoseconds by the device's timer, in all threads of the one warp the same."""
    lanes = tl.arange(0, 32)
    if TIMED:
        ticks = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l,r", [lanes], dtype=tl.int64, is_pure=False, pack=1
        )
        return tl.max(ticks, axis=0)
    else:
        return tl.max(lanes, axis=0).to(tl.int64) * 0


@triton.jit(do_not_specialize=["first_tile", "tiles", "limit", "where", "peer", "receives", "sends", "depth"])
def wait_kernel(
    ready, taken, free, sent, status, record, stamps,
    first_tile, tiles, limit: tl.int64, where, peer, receives, sends, depth,
    BLOCK: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    ahead = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile, mine = first_tile + ahead, ahead < tiles
    first = tl.program_id(0) == 0
    wanted = tl.load(taken + tile, mask=mine & (receives != 0), other=0)
    gone = tl.load(sent + tile, mask=mine & (sends != 0), other=0)
    began = _now(TIMED)
    missing = 1
    full = 1
    waiting = tl.load(status, volatile=True) == 0
    tl.store(status + 1, peer + 1, mask=first & waiting)
    while waiting:
        # At least one thread sees each count, and all of them the sums: they leave together.
        come = tl.load(ready + tile, mask=mine & (receives != 0), other=0, volatile=True)
        room = tl.load(free + tile, mask=mine & (sends != 0), other=0, volatile=True)
        missing = tl.sum((mine & (receives != 0) & (come - wanted <= 0)).to(tl.int32), axis=0)
        full = tl.sum((mine & (sends != 0) & (gone - room >= depth)).to(tl.int32), axis=0)
        late = _now(TIMED) - began > limit.to(tl.int64) * 1000
        waiting = (missing + full > 0) & (late == 0)
    if TIMED:  # what was written before the flags is seen by all that comes after this
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [tiles], dtype=tl.int32, is_pure=False, pack=1
        )
    ended = _now(TIMED)
    tl.store(stamps, began, mask=first)
    tl.store(stamps + 1, ended, mask=first)
    late = missing + full > 0
    tl.store(status + 1, 0, mask=first & (late == 0))
    news = late & (tl.load(status, volatile=True) == 0)
    kind = tl.where(missing > 0, 1, 2)
    tl.store(record, where.to(tl.int64) * 4 + kind, mask=news)
    tl.store(status, 1, mask=news)


@triton.jit
def _halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The first columns of ``x [ROWS, 2 HALF]``, and the others."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _slices(x, ROWS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """``x [ROWS, K]`` in blocks of ``WIDTH`` columns; K is 1, 2 or 4 times as many."""
    if K == WIDTH:
        return (x,)
    else:
        a, b = _halves(x, ROWS, K // 2)
        if K == 2 * WIDTH:
            return a, b
        else:
            a0, a1 = _halves(a, ROWS, WIDTH)
            b0, b1 = _halves(b, ROWS, WIDTH)
            return a0, a1, b0, b1


@triton.jit
def _crosses(continues, i, at, steps, start, HAS_CONTINUES: tl.constexpr):
    """Whether a state goes through the i-th segment of a fold; ``at``: where ``continues`` tells of it. What is
    structurally zero does not, and M is not read where it was not made."""
    through = (i < steps) & ((i > 0) | (start != 0))
    if HAS_CONTINUES:
        through = through & (tl.load(continues + at, mask=through, other=0) != 0)
    return through


@triton.jit(
    do_not_specialize=["N", "steps", "B", "HV", "first_row", "start", "sends", "capacity"],
    do_not_specialize_on_alignment=["continues", "forgets"],
)
def fold_kernel(
    M, U, first, continues, forgets, states, last,
    in_slots, taken, in_free, out_slots, out_ready, sent, status, stamps,
    N, steps, B, HV, first_row, start, sends, capacity,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, TILE: tl.constexpr,
    TIMED: tl.constexpr, HAS_CONTINUES: tl.constexpr, HAS_FORGETS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.program_id(1).to(tl.int64)
    rows = B * HV.to(tl.int64)
    batch = (row // HV).to(tl.int32)
    ck = tl.arange(0, K)
    at = (row * K + ck[None, :]) * V + tl.program_id(0) * BV + tl.arange(0, BV)[:, None]
    tile = row * tl.num_programs(0) + tl.program_id(0)
    # In a slot as in memory, not as here: of two orders the compiler would take one for both, and convert.
    in_tile = ck[None, :] * BV + tl.arange(0, BV)[:, None]
    # The next rank waits: what its message does not need is written behind it, and what it needs is read at once.
    alive = (sends != 0) & (tl.load(status, volatile=True) == 0)
    gone = tl.load(sent + tile, mask=sends != 0, other=0)
    come = tl.load(taken + tile, mask=start == 2, other=0)
    arrived = in_slots + ((come & (DEPTH - 1)).to(tl.int64) * capacity + tile) * TILE
    S = tl.zeros((BV, K), tl.float32)
    if start == 1:
        S = tl.load(first + at)
    if start == 2:
        S = tl.load(arrived + in_tile, volatile=True)
    multiplied = N  # segments folded with M: none, where all that are crossed forget
    if HAS_FORGETS:
        kept = 0
        for ahead in range(0, N, LOOK):
            i = ahead + tl.arange(0, LOOK)
            n = N - 1 - i if REVERSE else i
            through = _crosses(continues, i, n * B + batch, steps, start, HAS_CONTINUES)
            kept += tl.sum((tl.load(forgets + n * rows + row, mask=through, other=1) == 0).to(tl.int32), axis=0)
        multiplied = tl.where(kept == 0, 0, N)
        lost = tl.sum(tl.abs(S) * 0.0, axis=1)  # what comes through of each column: zero, or that it is not finite
        for i in tl.range(0, N - multiplied, num_stages=4):  # U is fetched ahead
            n = N - 1 - i if REVERSE else i
            tl.store(states + n * rows * K * V + at, S, mask=i > 0)
            through = _crosses(continues, i, n * B + batch, steps, start, HAS_CONTINUES)
            added = tl.load(U + n * rows * K * V + at, mask=i < steps, other=0.0)
            S = tl.where(through, lost[:, None] + added, added)
            of_added = tl.sum(tl.abs(added) * 0.0, axis=1)
            lost = tl.where(through, lost + of_added, of_added)
    cw = tl.arange(0, WIDTH)
    for i in tl.range(0, multiplied, num_stages=2):  # M is fetched ahead
        n = N - 1 - i if REVERSE else i
        tl.store(states + n * rows * K * V + at, S, mask=i > 0)
        through = _crosses(continues, i, n * B + batch, steps, start, HAS_CONTINUES)
        is_read = through
        if HAS_FORGETS:
            is_read = through & (tl.load(forgets + n * rows + row, mask=through, other=1) == 0)
        summary = M + (n * rows + row) * K * K
        added = tl.load(U + n * rows * K * V + at, mask=i < steps, other=0.0)
        parts = _slices(S, BV, K, WIDTH)
        crossed = tl.zeros((BV, K), tl.float32)
        for j in tl.static_range(K // WIDTH):
            if REVERSE:
                M_T = tl.load(summary + (j * WIDTH + cw)[:, None] * K + ck[None, :], mask=is_read, other=0.0)
            else:
                M_T = tl.load(summary + ck[None, :] * K + (j * WIDTH + cw)[:, None], mask=is_read, other=0.0)
            crossed = tl.dot(parts[j], M_T, acc=crossed, input_precision="tf32x3")
        S = tl.where(through, crossed + added, added)  # select: 0 * inf must not leak
    if sends != 0:
        slot = (gone & (DEPTH - 1)).to(tl.int64) * capacity + tile
        tl.store(out_slots + slot * TILE + in_tile, S, mask=alive)
        tl.debug_barrier()  # every thread has written, now one says so
        tl.store(sent + tile, gone + 1)
        if TIMED:
            tl.store(stamps + 2 + tile, tl.inline_asm_elementwise(
                "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
            ))  # fmt: skip
        tl.atomic_xchg(out_ready + tile, gone + 1, mask=alive, sem="release", scope="sys")
    entered = tl.zeros((BV, K), tl.float32)  # read again rather than kept, for which there are no registers
    if start == 1:
        entered = tl.load(first + at)
    if start == 2:
        entered = tl.load(arrived + in_tile, volatile=True)
    tl.store(states + (N - 1 if REVERSE else 0) * rows * K * V + at, entered)
    tl.store(last + at, S)
    if start == 2:
        tl.debug_barrier()  # every thread has read, now one says so
        tl.store(taken + tile, come + 1)
        tl.atomic_xchg(in_free + tile, come + 1, sem="release", scope="sys")


def takes(U: Tensor) -> bool:
    """Whether the kernel folds summaries like these; where not, torch's matrix products do, for one segment or many."""
    K, V = U.shape[-2:]
    return U.is_cuda and U.dtype == torch.float32 and K in (16, 32, 64, WIDEST) and V % COLUMNS == 0


def options(K: int) -> dict[str, int]:
    """How the fold is launched: the next segment's M is fetched while one is crossed, no register spills, and two
    programs of eight warps have room in a multiprocessor, each at work while the other waits."""
    how = {"WIDTH": min(K, SLICE), "num_stages": 2}
    return how | ({"num_warps": 8, "maxnreg": 128} if K >= 64 else {"num_warps": 4})


def tiles_of(U_BHKV: Tensor) -> int:
    """Tiles of a state like these."""
    B, HV, _, V = U_BHKV.shape[-4:]
    return B * HV * (V // COLUMNS)


def wait(
    tiles: int,
    inbox: Inbox | None,
    outbox: Outbox | None,
    clock: Clock,
    where: int = 0,
    peer: int = 0,
    first_tile: int = 0,
) -> None:
    """The stream goes on when so many tiles, from ``first_tile`` on, are in the inbox, and have room in the outbox; or
    when time is up. ``where`` and ``peer`` tell who waits for whom, for the record."""
    unused = clock.status
    proof.launch(
        wait_kernel, (-(-tiles // WAITED),),
        unused if inbox is None else inbox.ready_C, unused if inbox is None else inbox.taken_C,
        unused if outbox is None else outbox.free_C, unused if outbox is None else outbox.sent_C,
        clock.status, clock.record, clock.stamps, first_tile, tiles, clock.limit, where, peer, int(inbox is not None),
        int(outbox is not None), DEPTH, BLOCK=WAITED, TIMED=clock.status.is_cuda, num_warps=1, num_stages=1,
    )  # fmt: skip


def fold(
    M_NBHKK: Tensor,
    U_NBHKV: Tensor,
    first_BHKV: Tensor | None,
    continues_NB: Tensor | None,
    forgets_NBH: Tensor | None,
    steps: int,
    reverse: bool,
    *,
    inbox: Inbox | None = None,
    outbox: Outbox | None = None,
    clock: Clock | None = None,
    states_NBHKV: Tensor | None = None,
    last_BHKV: Tensor | None = None,
    rows: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """``(the state that enters each segment, the state behind the last of the first ``steps`` segments folded)``.

    In reverse: the gradient of the state that leaves each, and of the one that enters the last of them. With an
    ``inbox`` the first state is the next message there, which :func:`wait` has waited for; with an ``outbox`` the last
    one goes there too, not to the slot that the first one lies in. Mail needs a ``clock``. ``states_NBHKV``,
    ``last_BHKV``: where the results are written. ``forgets_NBH``: int32, as a :class:`~dnsp.kernels.scan.Scan` is given
    it, the same bits with and without; ``rows``: of the ``B * HV`` states these alone are folded, and nothing of the
    others is read or written.
    """
    N, B, HV, K, V = U_NBHKV.shape
    M_NBHKK, U_NBHKV = M_NBHKK.contiguous(), U_NBHKV.contiguous()
    states = U_NBHKV.new_empty((N, B, HV, K, V)) if states_NBHKV is None else states_NBHKV
    last = U_NBHKV.new_empty((B, HV, K, V)) if last_BHKV is None else last_BHKV
    first_row, end_row = (0, B * HV) if rows is None else (rows.start, rows.stop)
    proof.require_fold(U_NBHKV)
    counts, times = _no_mail(U_NBHKV.device)
    mail = inbox or outbox
    proof.launch(
        fold_kernel, (V // COLUMNS, end_row - first_row),
        M_NBHKK, U_NBHKV, U_NBHKV if first_BHKV is None else first_BHKV.contiguous(),
        U_NBHKV if continues_NB is None else continues_NB.contiguous(),
        U_NBHKV if forgets_NBH is None else forgets_NBH.contiguous(), states, last,
        U_NBHKV if inbox is None else inbox.slots_DCN, counts if inbox is None else inbox.taken_C,
        counts if inbox is None else inbox.free_C, U_NBHKV if outbox is None else outbox.slots_DCN,
        counts if outbox is None else outbox.ready_C, counts if outbox is None else outbox.sent_C,
        counts if clock is None else clock.status, times if clock is None else clock.stamps,
        N, steps, B, HV, first_row, INBOX if inbox is not None else NOTHING if first_BHKV is None else FIRST,
        int(outbox is not None), mail.slots_DCN.shape[1] if mail else 1,
        K=K, V=V, BV=COLUMNS, DEPTH=DEPTH, TILE=TILE, TIMED=U_NBHKV.is_cuda,
        HAS_CONTINUES=continues_NB is not None, HAS_FORGETS=forgets_NBH is not None, REVERSE=reverse, **options(K),
    )  # fmt: skip
    return states, last


@lru_cache
def _no_mail(device: torch.device) -> tuple[Tensor, Tensor]:
    """What stands in for counts and times where there is no mail."""
    return torch.zeros(4, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int64, device=device)


def loopback(tiles: int, device: torch.device, limit: float = 30.0) -> tuple[Inbox, Outbox, Clock]:
    """An outbox that is the own inbox: for proofs, and to have a rank's work alone. ``limit``: seconds."""
    slots = torch.zeros(DEPTH, tiles, TILE, device=device)
    ready, taken, free, sent = (torch.zeros(-(-tiles // 4) * 4, dtype=torch.int32, device=device) for _ in range(4))
    return Inbox(slots, ready, taken, free), Outbox(slots, ready, sent, free), make_clock(tiles, device, limit)


def make_clock(
    tiles: int, device: torch.device, limit: float, status: Tensor | None = None, record: Tensor | None = None
) -> Clock:
    """A clock with its records at zero, where they are not given; ``limit``: seconds."""
    return Clock(
        torch.zeros(4, dtype=torch.int32, device=device) if status is None else status,
        torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda") if record is None else record,
        torch.zeros(2 + tiles, dtype=torch.int64, device=device),
        int(limit * 1e6),
    )
