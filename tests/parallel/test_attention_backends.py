"""Every backend of attention against dense softmax in fp64, forward and backward, by blocks that merge.

Long because packages that are not installed have their stand-ins here, beside the checks that real ones go through.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dnsp.parallel import attention_backends as backends
from dnsp.parallel import blocks, flash
from dnsp.parallel.attention import attention
from dnsp.parallel.attention_backends import BACKENDS, Backend, Edges, Heads, choose, unusable
from dnsp.parallel.errors import PlanError
from dnsp.parallel.plan import local_plan

# |got - truth| / |truth| on the same rounded operands
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# heads, groups, width, queries, keys, edges
BLOCKS: dict[str, tuple[int, int, int, int, int, Edges]] = {
    "square": (4, 2, 16, 96, 96, (0, 96)),
    "rectangle": (4, 2, 16, 96, 160, ()),
    "documents": (4, 1, 16, 130, 130, (0, 40, 41, 77, 130)),
    "documents of one token": (4, 2, 16, 64, 64, tuple(range(65))),
}
GPU_BLOCKS: dict[str, tuple[int, int, int, int, int, Edges]] = {
    "square": (16, 2, 256, 2048, 2048, (0, 2048)),
    "rectangle": (16, 2, 256, 1024, 2048, ()),
    "narrow square": (8, 8, 128, 1536, 1536, (0, 1536)),
    "odd square": (4, 2, 64, 777, 777, (0, 777)),
    "odd rectangle": (4, 2, 64, 65, 1001, ()),
    "documents": (16, 2, 256, 2048, 2048, (0, 1, 700, 1024, 2048)),
    "one token": (4, 2, 64, 1, 300, ()),
    "documents of one token": (16, 2, 256, 64, 64, tuple(range(65))),
}
META = torch.device("meta")


def draw(count: int, tokens: int, width: int, seed: int) -> Tensor:
    """``[1, count, tokens, width]`` as layers have it: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, count, width, generator=generator, dtype=torch.float64).transpose(1, 2)


def seen(queries: int, keys: int, edges: Edges) -> Tensor:
    """Which keys each query sees."""
    if not edges:
        return torch.ones(queries, keys, dtype=torch.bool)
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for a, b in pairwise(edges):
        mask[a:b, a:b] = torch.ones(b - a, b - a).tril().bool()
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask.to(q.device), float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def check(backend: Backend, block: tuple[int, int, int, int, int, Edges], dtype: torch.dtype, device: str) -> None:
    """One block among others: its queries also see keys elsewhere, so that merged o and lse are not its own."""
    H, G, D, S, U, edges = block
    q, do = (draw(H, S, D, seed).to(device, dtype) for seed in (0, 1))
    k, v, k_other, v_other = (draw(G, U, D, seed).to(device, dtype) for seed in (2, 3, 4, 5))
    scale = D**-0.5
    exact = [x.double().requires_grad_() for x in (q, k, v, k_other, v_other)]
    own, own_lse = dense(exact[0], exact[1], exact[2], seen(S, U, edges), scale)
    both = torch.cat([seen(S, U, edges), torch.ones(S, U, dtype=torch.bool)], 1)
    keys, values = torch.cat([exact[1], exact[3]], 2), torch.cat([exact[2], exact[4]], 2)
    merged, merged_lse = dense(exact[0], keys, values, both, scale)

    o, lse = backend.forward(q, k, v, edges, scale)
    assert o.shape == q.shape and o.dtype == dtype
    assert lse.shape == q.shape[:3] and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(o, own) < TOLERANCE[dtype] and error(lse, own_lse) < max(1e-5, TOLERANCE[dtype] ** 2)

    # the share of this block: the gradient of the merged output, its weight in it held to what it is
    weight = (own_lse - merged_lse).exp().unsqueeze(-1)
    delta = (do.double() * (own - merged.detach())).sum(-1, keepdim=True).detach()
    shares = torch.autograd.grad(
        (weight.detach() * do.double() * own).sum() + (weight.detach() * delta * own_lse.unsqueeze(-1)).sum(),
        exact[:3],
        retain_graph=True,
    )
    rounded = merged.detach().to(dtype)
    grads = backend.backward(do, q, k, v, rounded, merged_lse.detach().to(lse.dtype), edges, scale)
    for name, got, want in zip(("dq", "dk", "dv"), grads, shares, strict=True):
        assert got.shape == want.shape and got.dtype == dtype, name
        assert error(got, want) < 2 * TOLERANCE[dtype], (name, error(got, want))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["flash_cpu", "plain"])
def test_on_a_cpu(name: str, block: str, dtype: torch.dtype) -> None:
    check(BACKENDS[name], BLOCKS[block], dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", GPU_BLOCKS)
@pytest.mark.parametrize("name", ["cudnn", *(n + twin for n in flash.VERSIONS for twin in ("", "_deterministic"))])
def test_on_a_gpu(name: str, block: str, dtype: torch.dtype) -> None:
    H, G, D, *_ = GPU_BLOCKS[block]
    reason = unusable(name, Heads(torch.device("cuda", 0), dtype, H, G, D, D))
    if reason and name.startswith("flash_attn"):
        pytest.skip(reason)
    check(BACKENDS[name], GPU_BLOCKS[block], dtype, "cuda")


# The packages, played by plain matrix products behind signatures like theirs. What they compute shows on a GPU alone.


def squares(starts: Tensor | None) -> Edges:
    return () if starts is None else tuple(starts.tolist())


def swapped(*tensors: Tensor) -> list[Tensor]:
    """Tokens before heads, or back; ``[T, H, D]`` are documents side by side."""
    return [x.transpose(1, 2) if x.dim() == 4 else x.unsqueeze(0).transpose(1, 2) for x in tensors]


def played_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, causal: bool, scale: float) -> Any:
    edges = squares(starts) or ((0, q.shape[1]) if causal else ())
    o, lse = BACKENDS["plain"].forward(*swapped(q, k, v), edges, scale)
    o = o.transpose(1, 2).contiguous()
    return (o, lse) if starts is None else (o[0], lse[0])


def played_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, starts: Tensor | None, causal: bool,
    scale: float,
) -> list[Tensor]:  # fmt: skip
    edges = squares(starts) or ((0, q.shape[1]) if causal else ())
    assert lse.is_contiguous()
    lse = lse if starts is None else lse.unsqueeze(0)
    grads = BACKENDS["plain"].backward(*swapped(do, q, k, v, o), lse, edges, scale)
    return [grad.transpose(1, 2) if starts is None else grad.transpose(1, 2)[0] for grad in grads]


class Version2:
    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        return (*played_forward(q, k, v, None, causal, softmax_scale), None, None)

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        return (*played_forward(q, k, v, cu_seqlens_q, causal, softmax_scale), None, None)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        found = played_backward(dout, q, k, v, out, softmax_lse, None, causal, softmax_scale)
        for grad, y in zip((dq, dk, dv), found, strict=True):
            grad.copy_(y)

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        found = played_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, causal, softmax_scale)
        for grad, y in zip((dq, dk, dv), found, strict=True):
            grad.copy_(y)


class Version3:
    @staticmethod
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert (cu_seqlens_q is None) == (max_seqlen_q is None)
        return (*played_forward(q, k, v, cu_seqlens_q, causal, softmax_scale), None, None)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert (cu_seqlens_q is None) == (max_seqlen_q is None)
        found = played_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, is_causal, softmax_scale)
        for grad, y in zip((dq, dk, dv), found, strict=True):
            grad.copy_(y)


class Version4:
    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, return_lse=False,
    ):  # fmt: skip
        assert return_lse
        return (*played_forward(q, k, v, cu_seqlens_q, causal, softmax_scale), None, None, None)

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        return tuple(played_backward(dout, q, k, v, out, lse, cu_seqlens_q, causal, softmax_scale))


PACKAGES = {"flash_attn_2": Version2, "flash_attn_3": Version3, "flash_attn_4": Version4}


@pytest.mark.parametrize("twin", ["", "_deterministic"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_called_as_it_wants_it(
    name: str, block: str, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "import_module", lambda module: PACKAGES[name])
    monkeypatch.setattr(flash, "_starts", lambda edges, device: torch.tensor(edges, dtype=torch.int32))
    check(BACKENDS[name + twin], BLOCKS[block], torch.float32, "cpu")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(module: str) -> None:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(flash, "import_module", import_module)
    words = unusable.__wrapped__(name, GPU)
    package = {"flash_attn_2": "flash-attn"}.get(name, name.replace("_", "-"))
    assert words == (
        f"it needs the package {package}, which cannot be imported here (No module named "
        f"{flash.VERSIONS[name].module!r})"
    )
    assert backends._order(GPU, False, 1) == ["cudnn", "flash", "plain"]


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_the_plain_backend_on_a_gpu(block: str) -> None:
    check(BACKENDS["plain"], BLOCKS[block], torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("block", ["square", "odd square", "documents", "documents of one token"])
def test_the_deterministic_backend_repeats_its_bits(block: str) -> None:
    H, G, D, S, U, edges = GPU_BLOCKS[block]
    backend, asked = BACKENDS["flash_deterministic"], torch.are_deterministic_algorithms_enabled()
    q, do = (draw(H, S, D, seed).to("cuda", torch.bfloat16) for seed in (0, 1))
    k, v = (draw(G, U, D, seed).to("cuda", torch.bfloat16) for seed in (2, 3))
    o, lse = backend.forward(q, k, v, edges, D**-0.5)
    runs = [backend.backward(do, q, k, v, o, lse, edges, D**-0.5) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert torch.are_deterministic_algorithms_enabled() == asked


@pytest.mark.parametrize("long", [4096, 48])
@pytest.mark.parametrize(
    "starts",
    [
        [[0]], [[0], [0]], [[0, 20, 21], [0], [0, 90]], [[0], [0], [0, 5]], [[0, 48]], [[0, 48], [0, 5, 53, 60]],
        [[0, 3, 9], [0, 2, 50, 94], [0, 48, 50, 60]],
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_documents_against_fp64(starts: list[list[int]], long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function: nothing reaches from one row into another, nor from a document into the next,
    whichever share a call."""
    for name, value in (("LONG", long), ("APART", long), ("CUDNN_TOKENS", 1)):
        monkeypatch.setattr(blocks, name, value)
    tokens, rows = 96, len(starts)
    *leaves, do = (
        torch.cat([draw(n, tokens, 16, 4 * row + seed) for row in range(rows)]) for seed, n in enumerate((4, 2, 2, 4))
    )
    exact = [x.clone().requires_grad_() for x in leaves]
    mask = torch.stack([seen(tokens, tokens, (*row, tokens)) for row in starts]).unsqueeze(1)
    want, _ = dense(*exact, mask, 0.25)
    mine = [x.transpose(1, 2).clone().requires_grad_() for x in leaves]
    got = attention(*mine, plan=local_plan(starts, tokens))
    assert error(got.transpose(1, 2), want) < TOLERANCE[torch.float64]
    truth, grads = torch.autograd.grad(want, exact, do), torch.autograd.grad(got, mine, do.transpose(1, 2))
    for name, a, b in zip(("dq", "dk", "dv"), grads, truth, strict=True):
        assert error(a.transpose(1, 2), b) < TOLERANCE[torch.float64], name


def test_cutting_calls_of_tiny_documents_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of 48 documents, or 24 of two."""
    starts, tokens = [list(range(0, 96, 4))] * 2, 96
    given = [draw(n, tokens, 16, seed).transpose(1, 2).expand(2, -1, -1, -1) for seed, n in enumerate((4, 2, 2, 4))]
    results = []
    for joined, calls in ((2**16, 1), (2 * (4 + 128), 24)):
        monkeypatch.setattr(blocks, "JOINED", joined)
        plan = local_plan(starts, tokens)
        assert len(plan.rounds[0].calls) == calls
        *leaves, do = (x.clone().requires_grad_() for x in given)
        o = attention(*leaves, plan=plan)
        results.append([o, *torch.autograd.grad(o, leaves, do)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "flash"])
@pytest.mark.parametrize(
    "starts",
    [
        [[0]], [[0, 1000, 1001, 3000]], [[0], [0]], [[0, 512], [0, 5]], [[0, 9], [0]], [[0, 2048]],
        [[0, 2048, 2050, 2100, 3000], [0]],
    ],
    ids=str,
)  # fmt: skip
def test_whole_sequences_on_a_gpu(name: str, starts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, rows and documents included, against the plain backend in fp32."""
    monkeypatch.setattr(blocks, "APART", 2048)
    tokens, results = 4096, []
    *leaves, do = (
        draw(n, tokens, 128, seed).transpose(1, 2).expand(len(starts), -1, -1, -1)
        for seed, n in enumerate((8, 2, 2, 8))
    )
    plan = local_plan(starts, tokens).to("cuda")
    for backend, dtype in ((name, torch.bfloat16), ("plain", torch.float32)):
        mine = [x.to("cuda", torch.bfloat16).to(dtype).requires_grad_() for x in leaves]
        o = attention(*mine, plan=replace(plan, attention_backend=backend))
        results.append([o, *torch.autograd.grad(o, mine, do.to("cuda", torch.bfloat16).to(dtype))])
    for got, want in zip(*results, strict=True):
        assert error(got, want.double()) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_a_gpu_takes_cudnn_and_repeatable_bits_where_they_are_asked_for() -> None:
    heads = Heads(torch.device("cuda", 0), torch.bfloat16, 16, 2, 128, 128)
    assert choose(heads) == (BACKENDS["cudnn"], "")
    assert choose(heads, deterministic=True)[0] is BACKENDS["flash_deterministic"]
    backend, why = choose(replace(heads, dtype=torch.float32))
    assert backend is BACKENDS["plain"] and "not float32" in why


@pytest.mark.parametrize("block", GPU_BLOCKS)
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_calls_fit_torchs_operators(name: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, shapes and layouts, without a device: torch knows what its operators would return."""
    bounds = torch.empty(len(GPU_BLOCKS[block][5]), dtype=torch.int32, device=META)
    monkeypatch.setattr(flash, "_starts", lambda edges, device: bounds)
    H, G, D, S, U, edges = GPU_BLOCKS[block]
    q, do, k, v = (
        torch.empty(1, 3 * tokens, n, D, dtype=torch.bfloat16, device=META)[:, tokens : 2 * tokens].transpose(1, 2)
        for n, tokens in ((H, S), (H, S), (G, U), (G, U))
    )
    o, lse = BACKENDS[name].forward(q, k, v, edges, 0.1)
    assert o.shape == q.shape and o.transpose(1, 2).is_contiguous()
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = BACKENDS[name].backward(do, q, k, v, o, lse, edges, 0.1)
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]


def test_cudnn_is_handed_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of longer sequences, and gradients of any layout: its plans know strides of q, k and v alone."""
    q = torch.randn(1, 3 * 512, 2, 16)[:, 512:1024].transpose(1, 2)
    dense = backends._dense(q)
    assert torch.equal(dense, q) and dense.stride() == (512 * 2 * 16, 16, 2 * 16, 1)
    assert dense.data_ptr() == q.data_ptr()  # nothing was copied
    heads_first = q.contiguous()
    assert torch.equal(backends._dense(heads_first), q) and backends._dense(heads_first).stride() == dense.stride()
    rows = torch.randn(2, 512, 2, 32)[..., :16].transpose(1, 2)
    assert backends._dense(rows).transpose(1, 2).is_contiguous() and torch.equal(backends._dense(rows), rows)


CPU = Heads(torch.device("cpu"), torch.float32, 4, 2, 16, 16)
GPU = replace(CPU, device=torch.device("cuda", 0), dtype=torch.bfloat16)


def test_a_cpu_takes_torchs_flash_attention_where_widths_agree() -> None:
    assert choose(CPU) == (BACKENDS["flash_cpu"], "")
    backend, why = choose(replace(CPU, value_width=24))
    assert backend is BACKENDS["plain"] and "values are 24 wide, keys 16" in why
    assert choose(CPU, deterministic=True)[0] is BACKENDS["flash_cpu"]


@pytest.mark.parametrize(
    ("name", "heads", "words"),
    [
        ("pigeon", CPU, "no backend 'pigeon'"),
        ("cudnn", CPU, "for cuda tensors, these are on cpu"),
        ("flash_cpu", GPU, "for cpu tensors, these are on cuda"),
        ("cudnn", replace(GPU, dtype=torch.float32), "bf16 and fp16, not float32"),
        ("flash", replace(GPU, width=264, value_width=264), "264 wide, it takes multiples of 8 up to 256"),
        ("flash", replace(GPU, value_width=32), "values are 32 wide, keys 16"),
    ],
)
def test_why_a_backend_cannot_be_used(name: str, heads: Heads, words: str) -> None:
    assert words in (unusable(name, heads) or "")
    with pytest.raises(PlanError, match=f"attention_backend={name}: .*use auto, or another of cudnn"):
        choose(heads, name)


def test_what_does_not_repeat_its_bits_is_refused_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unusable", lambda name, heads: None)
    with pytest.raises(PlanError, match="cudnn does not repeat its bits.*use flash_deterministic"):
        choose(GPU, "cudnn", deterministic=True)


def test_a_proof_finds_wrong_numbers_and_failures() -> None:
    plain = BACKENDS["plain"]
    heads = replace(CPU, dtype=torch.bfloat16)
    assert backends._failed_proof(plain, heads) is None
    wrong = replace(plain, backward=lambda *x: tuple(1.1 * grad for grad in plain.backward(*x)))
    assert "dq is off by 1.0e-01" in (backends._failed_proof(wrong, heads) or "")

    def fail(*x: object) -> None:
        raise RuntimeError("no engine\nmore words")

    assert backends._failed_proof(replace(plain, forward=fail), heads) == "no engine"  # type: ignore[arg-type]


def test_the_fastest_is_taken_where_it_is_so_by_far(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"cudnn": 1.0, "flash": 0.95, "flash_deterministic": 3.0, "flash_attn_4_deterministic": 2.0}
    monkeypatch.setattr(backends, "unusable", lambda name, heads: None if name in times else "it is not there")
    monkeypatch.setattr(backends, "_seconds", lambda name, heads, tokens: times[name])
    monkeypatch.setattr(flash.Version, "missing", lambda self: None if self.package == "flash-attn-4" else "not there")
    backend, words = choose(GPU, tokens=2**20)
    assert backend is BACKENDS["cudnn"]  # 0.95 may be noise
    assert words.startswith("there and back on 16,384 tokens: cudnn 1e+03 ms, flash 950 ms; flash_attn_4: it is not")
    times["flash"] = 0.5
    assert choose(GPU, tokens=4096)[0] is BACKENDS["flash"]
    assert choose(GPU)[0] is BACKENDS["cudnn"]  # nothing is timed
    assert choose(GPU, deterministic=True, tokens=4096)[0] is BACKENDS["flash_attn_4_deterministic"]
    assert choose(GPU, deterministic=True)[0] is BACKENDS["flash_deterministic"]


def test_a_twin_must_repeat_its_bits() -> None:
    def unsteady(*x: Any) -> Any:
        dq, dk, dv = BACKENDS["plain"].backward(*x)
        return dq * (1 + 1e-3 * float(torch.rand(()))), dk, dv

    backend = replace(BACKENDS["plain"], name="flash_deterministic", backward=unsteady)
    assert backends._failed_proof(backend, replace(CPU, dtype=torch.float32)) == "its backward does not repeat its bits"
    assert backends._failed_proof(replace(backend, name="flash"), CPU) is None


def test_times_are_of_a_device() -> None:
    assert all(0 < backends._seconds(name, replace(CPU, value_width=16), 64) < 10 for name in ("flash_cpu", "plain"))
