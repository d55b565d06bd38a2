"""The plan against brute force: documents, positions, segments, and blocks that cover every allowed pair once."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from dnsp.parallel import blocks
from dnsp.parallel.blocks import Block, Round
from dnsp.parallel.errors import LayoutError, PlanError
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import Plan, local_plan, make_plan

LAYOUTS = [("contiguous", 1), ("contiguous", 4), ("zigzag", 2), ("zigzag", 4)]


def random_starts(tokens: int, seed: int) -> list[int]:
    """Documents of all sizes; some start on a chunk, segment or interval boundary, some are one token long."""
    pick = random.Random(seed)
    starts = {0, *(pick.randrange(1, tokens) for _ in range(pick.randrange(0, 9)))}
    starts |= {64 * pick.randrange(1, tokens // 64) for _ in range(pick.randrange(0, 3))}
    starts |= {start + 1 for start in list(starts)[:2] if start + 1 < tokens}
    return sorted(starts)


def plans(kind: str, ranks: int, seed: int, tokens: int = 1024) -> tuple[list[list[int]], list[Plan]]:
    doc_starts = [random_starts(tokens, 2 * seed), random_starts(tokens, 2 * seed + 1)]
    layout = Layout(kind, ranks, tokens)
    return doc_starts, [make_plan(doc_starts, layout, Grid(ranks, rank, ranks), 64) for rank in range(ranks)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "ranks"), LAYOUTS)
def test_documents_positions_and_segments(kind: str, ranks: int, seed: int) -> None:
    doc_starts, all_plans = plans(kind, ranks, seed)
    for plan in all_plans:
        tokens = np.concatenate([np.arange(*bounds) for bounds in plan.intervals])
        assert plan.local_tokens == len(tokens)
        assert torch.equal(plan.local(torch.arange(plan.tokens)[None]), torch.from_numpy(tokens)[None])
        for row, starts in enumerate(doc_starts):
            expected = np.array([max(s for s in starts if s <= t) for t in tokens])
            assert (plan.doc_start_BT[row].numpy() == expected).all()
            assert (plan.position_BT[row].numpy() == tokens - expected).all()
            passes = [not any(a <= s < a + 64 for s in starts) for a in plan.segments.starts]
            assert plan.segments.continues_NB is not None
            assert plan.segments.continues_NB[:, row].tolist() == passes
        assert plan.segments.starts == tuple(tokens[::64])
        assert plan.doc_start_BT.dtype == plan.position_BT.dtype == torch.int32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "ranks"), LAYOUTS)
def test_blocks_cover_every_causal_pair_of_a_document_once(kind: str, ranks: int, seed: int) -> None:
    doc_starts, all_plans = plans(kind, ranks, seed)
    pairs = np.zeros((2, 1024, 1024), dtype=np.int64)
    held = [np.concatenate([np.arange(*bounds) for bounds in plan.intervals]) for plan in all_plans]
    for plan in all_plans:
        for work in plan.rounds:
            for block in work.blocks:
                queries = held[plan.rank][slice(*block.query)]
                keys = held[work.owner][slice(*work.pieces[block.piece])][slice(*block.key)]
                assert not block.causal or (queries == keys).all()
                pairs[block.row, queries[:, None], keys] += np.tri(len(queries), dtype=np.int64) if block.causal else 1
            assert sorted(squares_and_rectangles(work, plan.local_tokens)) == sorted(work.blocks)
            sender = next(other for other in all_plans[work.owner].rounds if other.reader == plan.rank)
            assert work.owner == plan.rank or sender.sends == work.pieces
    t = np.arange(1024)
    for row, starts in enumerate(doc_starts):
        document = np.searchsorted(starts, t, side="right")
        allowed = (document[:, None] == document) & (t[:, None] >= t)
        assert (pairs[row] == allowed).all()


def squares_and_rectangles(work: Round, tokens: int) -> list[Block]:
    """What a round's calls are made of: blocks, as the plan has them."""
    found = []
    for call in work.calls:
        start, stop = call.query
        for a, b in pairwise(call.edges or (0, stop - start)):
            row, at = divmod(start + a, tokens)
            query = (at, at + b - a)
            own = (0, query, True) if call.edges else (call.piece, call.key, False)
            assert call.edges or row == call.row
            found.append(Block(row, query, *own))
    return found


def test_documents_side_by_side_are_one_call_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for intervals with a long one, and in them for those that cuDNN takes, each a call of its own."""
    rows = [[0, 5, 128], [0], [0, 200], [0]]

    def calls(layout: Layout, rank: int) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        own = make_plan(rows, layout, Grid(layout.ranks, rank, layout.ranks)).rounds[0]
        return [call[:2] for call in own.calls if call.edges]

    alone, zigzag = Layout("contiguous", 1, 256), Layout("zigzag", 2, 256)
    assert calls(alone, 0) == [((0, 1024), (0, 5, 128, 256, 512, 712, 768, 1024))]
    assert calls(zigzag, 0) == [((0, 512), (0, 5, 64, 128, 192, 256, 320, 328, 384, 448, 512))]
    monkeypatch.setattr(blocks, "LONG", 200)
    assert calls(alone, 0) == [
        ((0, 256), (0, 5, 128, 256)), ((256, 512), (0, 256)), ((512, 768), (0, 200, 256)), ((768, 1024), (0, 256))
    ]  # fmt: skip
    monkeypatch.setattr(blocks, "APART", 200)
    monkeypatch.setattr(blocks, "CUDNN_TOKENS", 8)
    assert calls(alone, 0) == [
        ((0, 256), (0, 5, 128, 256)), ((256, 512), (0, 256)), ((512, 712), (0, 200)), ((712, 768), (0, 56)),
        ((768, 1024), (0, 256)),
    ]  # fmt: skip
    monkeypatch.setattr(blocks, "LONG", 64)
    assert calls(zigzag, 0)[:3] == [((0, 64), (0, 5, 64)), ((64, 128), (0, 64)), ((128, 192), (0, 64))]
    monkeypatch.setattr(blocks, "LONG", 257)
    monkeypatch.setattr(blocks, "JOINED", 512 + 4 * 128)
    assert calls(alone, 0) == [((0, 512), (0, 5, 128, 256, 512)), ((512, 1024), (0, 200, 256, 512))]


def test_long_documents_are_calls_among_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two long ones are two calls; short ones are one between them, and one over the ends of rows."""
    rows = [[0, 1024], [0, 512, 700, 1530, 1536], [0, 3, 1000]]

    def calls() -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        return [call[:2] for call in local_plan(rows, 2048).rounds[0].calls]

    whole = [((0, 6144), (0, 1024, 2048, 2560, 2748, 3578, 3584, 4096, 4099, 5096, 6144))]
    assert calls() == whole
    monkeypatch.setattr(blocks, "APART", 1024)
    monkeypatch.setattr(blocks, "LONG", 1024)
    assert calls() == [
        ((0, 1024), (0, 1024)), ((1024, 2048), (0, 1024)),
        ((2048, 4096), (0, 512, 700, 1530, 1536, 2048)),
        ((4096, 6144), (0, 3, 1000, 2048)),  # 1,048 of them, which cuDNN does not take
    ]  # fmt: skip
    monkeypatch.setattr(blocks, "APART", 512)
    monkeypatch.setattr(blocks, "LONG", 512)
    assert calls()[2:] == [
        ((2048, 2560), (0, 512)), ((2560, 3584), (0, 188, 1018, 1024)), ((3584, 4096), (0, 512)),
        ((4096, 6144), (0, 3, 1000, 2048)),
    ]  # fmt: skip
    rows[:] = [[0, 1536, 1540], [0, 700], [0, 512]]
    monkeypatch.setattr(blocks, "APART", 1536)
    monkeypatch.setattr(blocks, "LONG", 1536)
    assert calls() == [
        ((0, 1536), (0, 1536)), ((1536, 4608), (0, 4, 512, 1212, 2560, 3072)), ((4608, 6144), (0, 1536))
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_calls_are_the_blocks_whatever_is_long(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And few: at most one for every long square, and one between two of them."""
    pick = random.Random(seed)
    long = pick.choice((40, 64, 130))
    for name, value in (("LONG", long), ("APART", long), ("CUDNN_TOKENS", pick.choice((1, 16)))):
        monkeypatch.setattr(blocks, name, value)
    _, all_plans = plans(*pick.choice(LAYOUTS), seed)
    for plan in all_plans:
        for work in plan.rounds:
            assert sorted(squares_and_rectangles(work, plan.local_tokens)) == sorted(work.blocks)
        own = [call for call in plan.rounds[0].calls if call.edges]
        at = [edge for call in own for edge in call.query]
        assert at[0] == 0 and at[-1] == plan.batch * plan.local_tokens and at[1:-1:2] == at[2::2]
        apart = [blocks._apart(call.query[1] - call.query[0]) for call in own if len(call.edges) == 2]
        assert len(own) <= 2 * sum(apart) + plan.batch * len(plan.intervals)
        lengths = [b - a for call in own if len(call.edges) > 2 for a, b in pairwise(call.edges)]
        assert not any(blocks._apart(length) for length in lengths)


# rows, tokens of each, of a document; calls, and the most of a call's temporary memory, in tokens
TINY = [
    (8, 8192, 8, 24, 2**16),  # an interval of them is more than a call may have
    (8, 8192, 64, 4, 2**16),
    (8, 8192, 1024, 2, 2**16),
    (1, 2**18, 16, 5, 2**19),
    (1, 2**18, 2**15 - 8, 1, 2**19),  # an interval of long ones, which cuDNN does not take, has one whatever its length
]


@pytest.mark.parametrize(("rows", "tokens", "document", "calls", "most"), TINY)
def test_calls_of_tiny_documents_are_cut(rows: int, tokens: int, document: int, calls: int, most: int) -> None:
    """Their temporary memory grows with the documents, too."""
    (work,) = local_plan([list(range(0, tokens, document))] * rows, tokens).rounds
    held = [call.query[1] - call.query[0] + 128 * (len(call.edges) - 1) for call in work.calls]
    assert len(held) == calls and max(held) <= most, held
    assert sorted(squares_and_rectangles(work, tokens)) == sorted(work.blocks)


def test_only_needed_keys_travel() -> None:
    layout = Layout("contiguous", 4, 1024)
    plan = make_plan([[0, 250, 512]], layout, Grid(4, 1, 4))
    assert [work.pieces for work in plan.rounds] == [((0, 256),), ((250, 256),), (), ()]
    assert not make_plan([[0, 256, 512, 768]], layout, Grid(4, 1, 4)).crosses


def test_under_zigzag_a_round_is_one_rectangle() -> None:
    """Queries of both intervals over the earlier ranks' first one, or those of the last over both of later ranks'."""
    layout = Layout("zigzag", 4, 1024)
    for rank in range(4):
        own, *others = make_plan([[0]], layout, Grid(4, rank, 4)).rounds
        assert [(block.query, block.causal) for block in own.blocks] == [
            ((0, 128), True), ((128, 256), True), ((128, 256), False)
        ]  # fmt: skip
        for work in others:
            ((row, query, piece, key, causal),) = work.blocks
            earlier = work.owner < rank
            assert (row, piece, causal) == (0, 0, False)
            assert (query, key) == (((0, 256), (0, 128)) if earlier else ((128, 256), (0, 256)))
            assert work.pieces == (key,)


def test_default_segments_depend_on_the_cut_alone() -> None:
    assert local_plan([[0, 5]], 200).segments.tokens == 256
    sizes = {make_plan([[0, 7]], Layout("zigzag", 2, 1024), Grid(2, rank, 2)).segments.tokens for rank in range(2)}
    assert sizes == {256}


@pytest.mark.parametrize(
    ("doc_starts", "segment_tokens", "options", "words"),
    [
        ([[0]], 96, {}, ["96", "64 or 128"]),
        ([[0]], 192, {}, ["192", "128 or 256"]),
        ([[0]], 1024, {}, ["1024", "128 or 256"]),
        ([[0]], 0, {}, ["segment_tokens=0", "64 or 128"]),
        ([], None, {}, ["at least one row"]),
        ([[0], [3, 5]], None, {}, ["row 1", "begin with 0"]),
        ([[0, 9, 9]], None, {}, ["row 0", "9 follows 9"]),
        ([[0, 1024]], None, {}, ["1024"]),
        ([[0]], None, {"transport": "pigeon"}, ["'pigeon'", "p2p, gather or peer"]),
        ([[0]], None, {"attention_transport": "p2p"}, ["'p2p'", "ring, gather or peer"]),
    ],
)
def test_refusals(doc_starts: list, segment_tokens: int | None, options: dict, words: list[str]) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanError) as refused:
        make_plan(doc_starts, Layout("zigzag", 2, 1024), Grid(2, 0, 2), segment_tokens, **options)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_plan_needs_the_layout_of_its_group() -> None:
    with pytest.raises(PlanError, match="4 ranks.* has 2"):
        make_plan([[0]], Layout("zigzag", 4, 1024), Grid(2, 0, 2))


def test_the_grid_of_one_process() -> None:
    grid = make_grid()
    assert (grid.world, grid.data_size, grid.sequence_size, grid.sequence_ranks) == (1, 1, 1, (0,))
    with pytest.raises(LayoutError, match="group of 3 does not divide 1"):
        make_grid(3)


def test_sequence_ranks_are_adjacent() -> None:
    grid = Grid(world=8, rank=6, sequence=4)
    assert (grid.data_rank, grid.sequence_rank, grid.sequence_ranks) == (1, 2, (4, 5, 6, 7))
