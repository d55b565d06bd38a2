"""Everything that depends on layout and documents, worked out once a micro-batch on the CPU.

From the global document starts of each row: which document and position each local token has, which segments of the
delta rule's grid the rank holds and where states pass, and which blocks attention computes. Layers only read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dnsp.kernels.segments import Heads, Segments, filling_tokens

from .attention_backends import BACKENDS
from .blocks import Round, make_rounds
from .errors import PlanError
from .grid import Grid
from .layout import CHUNK, Layout
from .scan import ParallelScan, in_layer
from .transport import Transport

if TYPE_CHECKING:
    from .post import Post

SCAN_TRANSPORTS = ("p2p", "gather", "peer")
mail_on_host = False  # for tests, whose ranks share files
ATTENTION_TRANSPORTS = ("ring", "gather", "peer")


@dataclass(frozen=True)
class Plan:
    """What one rank does with its part of B sequences. Local tokens are those of its intervals, one after another.

    doc_start_BT: int32, the global index of the first token of each local token's document (-1: the document goes on
    from an initial state). position_BT: int32, each token's position in its document. spans: the local tokens of each
    interval. scan: joins the delta rule's segments over the group. rounds: attention's blocks.
    """

    layout: Layout
    rank: int  # within the sequence group
    batch: int
    doc_start_BT: Tensor
    position_BT: Tensor
    segments: Segments
    scan: ParallelScan
    rounds: tuple[Round, ...]
    attention_transport: str
    attention_backend: str  # of parallel/attention_backends.py, or auto
    comm: Transport
    goes_on: bool  # a row's first document goes on from an initial state
    crosses: bool  # somewhere in the group a document reaches from one rank's tokens into another's
    layer: int | None = None  # of a model, for messages
    documents: tuple[tuple[int, ...], ...] = ()  # as given: the global starts of each row's

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.layout.tokens

    @property
    def local_tokens(self) -> int:
        return len(self.intervals) * self.layout.interval_tokens

    @property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """Global (start, stop) of the local intervals."""
        return self.layout.intervals(self.rank)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        size = self.layout.interval_tokens
        return tuple((n * size, (n + 1) * size) for n in range(len(self.intervals)))

    @property
    def holds_last(self) -> bool:
        """Whether the sequence's last token is here (under zigzag that is rank 0)."""
        return self.layout.owner(self.layout.count - 1) == self.rank

    def at_layer(self, layer: int) -> Plan:
        """The same plan, whose messages name this layer where something goes wrong."""
        return replace(self, layer=layer, scan=replace(self.scan, layer=layer))

    def mail(self, transport: str, like: Tensor, size: int) -> Transport | Post:
        """What exchanges messages of at most ``size`` bytes like a tensor between ranks: symmetric memory for ``peer``.
        ``size`` is the same on every rank."""
        if transport != "peer" or len(self.comm.near) < self.comm.size:  # a group over several hosts
            return self.comm
        if not like.is_cuda and not mail_on_host:
            raise PlanError(f"transport peer: it is between GPUs, and this is a tensor on {like.device.type}; use p2p")
        from .post import Post
        from .symmetric import of_group

        post = of_group(Post, self.comm, like.device)
        post.reserve(size)
        return post

    def named(self, operation: str) -> str:
        """An operation, and the layer that it is of."""
        return operation + in_layer(self.layer)

    def agreed(self) -> Plan:
        """This plan, once every rank of the group is known to have made the same one; between hosts alone.

        Raises: PlanError on every rank, naming the rank that differs and in what.
        """
        if self.comm.size > 1:
            self.comm.compare(
                {
                    "sequence length": self.tokens,
                    "layout": self.layout.kind,
                    "rows": self.batch,
                    "segment_tokens": self.segments.tokens,
                    "transport": self.scan.kind,
                    "attention_transport": self.attention_transport,
                    "attention_backend": self.attention_backend,
                    "documents": _digest(self.documents),
                },
                "the plan",
            )
        return self

    def local(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor over the whole sequence, tokens along ``dim``."""
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.intervals], dim)

    def to(self, device: torch.device | str) -> Plan:
        """The plan with its tensors on a device; the host does not wait for the copies."""
        continues = self.segments.continues_NB
        return replace(
            self,
            doc_start_BT=to_device(self.doc_start_BT, device),
            position_BT=to_device(self.position_BT, device),
            segments=replace(self.segments, continues_NB=None if continues is None else to_device(continues, device)),
            scan=replace(self.scan, continues_all_NB=to_device(self.scan.continues_all_NB, device)),
        )


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device; to a GPU through pinned memory, without a wait."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def local_plan(doc_starts: Sequence[Sequence[int]], tokens: int, segment_tokens: int | None = None) -> Plan:
    """The plan of one process that holds whole sequences of ``tokens`` tokens; see :func:`make_plan`."""
    return make_plan(doc_starts, Layout("contiguous", 1, tokens), Grid(1, 0, 1), segment_tokens)


def make_plan(
    doc_starts: Sequence[Sequence[int]],
    layout: Layout,
    grid: Grid,
    segment_tokens: int | None = None,
    *,
    transport: str = "auto",
    attention_transport: str = "auto",
    attention_backend: str = "auto",
) -> Plan:
    """The plan of one rank for B sequences.

    Args:
        doc_starts: for each row, the global index of each document's first token, increasing from 0. A row that begins
            with -1 instead goes on from an initial state (of the delta rule; attention and convolutions see nothing
            before token 0).
        layout: over ``grid.sequence_size`` ranks.
        segment_tokens: tokens of the delta rule's segments, a multiple of 64 that divides the intervals; fixes the bits
            over all layouts and transports. None: :func:`default_segment_tokens`.
        transport: how states cross ranks, ``peer``, ``p2p`` or ``gather`` (``auto``: p2p, which works everywhere).
        attention_transport: how keys and values do, ``ring``, ``gather`` or ``peer``, which is the ring through
            symmetric memory (``auto``: ring).
        attention_backend: what computes a block of attention, ``auto`` or one of ``attention_backends.BACKENDS``.

    Raises:
        PlanError: naming the value, the rule and the way out.
    """
    if layout.ranks != grid.sequence_size:
        raise PlanError(f"the layout is over {layout.ranks} ranks, the sequence group has {grid.sequence_size}")
    rank = grid.sequence_rank
    rows = [_checked(row, starts, layout.tokens) for row, starts in enumerate(doc_starts)]
    if not rows:
        raise PlanError("a plan needs at least one row of document starts, [0] for one document")
    size = _checked_segments(segment_tokens, layout)
    scan_kind = _one_of(transport, SCAN_TRANSPORTS, "parallel.transport")
    attention_kind = _one_of(attention_transport, ATTENTION_TRANSPORTS, "parallel.attention_transport")
    if attention_kind == "peer" and grid.near is not None:
        raise PlanError("parallel.attention_transport=peer: the sequence group spans several hosts; use ring")
    backend = _one_of(attention_backend, ("auto", *BACKENDS), "parallel.attention_backend")
    comm = grid.transport()

    tokens = np.concatenate([np.arange(start, stop) for start, stop in layout.intervals(rank)])
    doc_start = np.stack([row[np.searchsorted(row, tokens, side="right") - 1] for row in rows])
    position = tokens - np.maximum(doc_start, 0)

    firsts = np.arange(0, layout.tokens, size)
    lasts = np.minimum(firsts + size, layout.tokens)
    continues = np.stack([np.searchsorted(row, firsts) == np.searchsorted(row, lasts) for row in rows], axis=1)
    per_interval = -(-layout.interval_tokens // size)
    held = np.concatenate([np.arange(per_interval) + i * per_interval for i in layout.indices(rank)])
    is_open = tuple(bool(row.any()) for row in continues)
    segments = Segments(
        tokens=size,
        starts=tuple(int(start) for start in firsts[held]),
        total=layout.tokens,
        continues_NB=torch.from_numpy(continues[held]),
        open=tuple(is_open[n] for n in held),
    )
    return Plan(
        layout=layout,
        rank=rank,
        batch=len(rows),
        doc_start_BT=torch.from_numpy(doc_start.astype(np.int32)),
        position_BT=torch.from_numpy(position.astype(np.int32)),
        segments=segments,
        scan=ParallelScan(layout, rank, comm, scan_kind, per_interval, is_open, torch.from_numpy(continues)),
        rounds=make_rounds([np.maximum(row, 0).tolist() for row in rows], layout, rank),
        attention_transport=attention_kind,
        attention_backend=backend,
        comm=comm,
        goes_on=any(int(row[0]) < 0 for row in rows),
        crosses=any(cut not in row for cut in _cuts(layout) for row in rows),
        documents=tuple(tuple(row.tolist()) for row in rows),
    )


def _digest(documents: tuple[tuple[int, ...], ...]) -> str:
    """Documents in few words: how many, and a digest of where they start."""
    starts = hashlib.sha256(repr(documents).encode()).hexdigest()[:12]
    return f"{sum(map(len, documents))} documents with starts {starts}"


def default_segment_tokens(layout: Layout) -> int:
    """One segment an interval: the fewest summaries. Depends on the sequence and the number of its intervals alone."""
    return -(-layout.interval_tokens // CHUNK) * CHUNK


def filling_segment_tokens(layout: Layout, heads: Heads, multiprocessors: int) -> int:
    """Segments that fill each rank's GPU, by the rule of the op on one."""
    held = layout.count // layout.ranks
    return filling_tokens(heads, multiprocessors, layout.interval_tokens, layout.count, held)


def _cuts(layout: Layout) -> list[int]:
    """The tokens at which another rank's interval begins."""
    return [layout.bounds(i)[0] for i in range(1, layout.count) if layout.owner(i) != layout.owner(i - 1)]


def _checked(row: int, starts: Sequence[int], tokens: int) -> np.ndarray:
    values = np.asarray(starts, dtype=np.int64)
    if values.ndim != 1 or len(values) == 0 or values[0] not in (0, -1):
        raise PlanError(f"row {row}: document starts must begin with 0 (-1: goes on from a state), not {starts!r:.40}")
    if (np.diff(values) <= 0).any() or (len(values) > 1 and values[1] <= 0):
        at = int(np.argmax(np.diff(values) <= 0)) + 1
        raise PlanError(
            f"row {row}: document starts must increase, but {values[at]} follows {values[at - 1]}; drop empty documents"
        )
    if values[-1] >= tokens:
        raise PlanError(f"row {row}: a document starts at {values[-1]}, the sequence has {tokens} tokens (0-based)")
    return values


def _checked_segments(segment_tokens: int | None, layout: Layout) -> int:
    if segment_tokens is None:
        return default_segment_tokens(layout)
    interval = layout.interval_tokens
    if layout.count == 1:  # the last segment may be short
        works = segment_tokens > 0 and segment_tokens % CHUNK == 0
        below = max(CHUNK, segment_tokens // CHUNK * CHUNK)
        nearest = [below, below + CHUNK]
        rule = f"segments are whole chunks of {CHUNK} tokens"
    else:
        fitting = [n for n in range(CHUNK, interval + 1, CHUNK) if interval % n == 0]
        works = segment_tokens in fitting
        nearest = sorted(sorted(fitting, key=lambda n: abs(n - segment_tokens))[:2])
        rule = f"segments are whole chunks of {CHUNK} tokens and divide the intervals of {interval} tokens"
    if not works:
        ways = " or ".join(str(n) for n in nearest)
        raise PlanError(f"segment_tokens={segment_tokens}: {rule}; use {ways} (parallel.segment_tokens)")
    return segment_tokens


def _one_of(value: str, known: tuple[str, ...], key: str) -> str:
    if value == "auto":
        return known[0]
    if value not in known:
        *some, last = [name for name in known if name != "auto"]
        raise PlanError(f"{key}={value!r} is unknown: use auto, {', '.join(some)} or {last}")
    return value
