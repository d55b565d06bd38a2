"""Every backend of attention against dense softmax in fp64, forward and backward, by blocks that merge."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dnsp.parallel import attention_backends as backends
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
}
GPU_BLOCKS: dict[str, tuple[int, int, int, int, int, Edges]] = {
    "square": (16, 2, 256, 2048, 2048, (0, 2048)),
    "rectangle": (16, 2, 256, 1024, 2048, ()),
    "narrow square": (8, 8, 128, 1536, 1536, (0, 1536)),
    "odd square": (4, 2, 64, 777, 777, (0, 777)),
    "odd rectangle": (4, 2, 64, 65, 1001, ()),
    "documents": (16, 2, 256, 2048, 2048, (0, 1, 700, 1024, 2048)),
    "one token": (4, 2, 64, 1, 300, ()),
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
@pytest.mark.parametrize("name", ["cudnn", "flash", "flash_deterministic"])
def test_on_a_gpu(name: str, block: str, dtype: torch.dtype) -> None:
    check(BACKENDS[name], GPU_BLOCKS[block], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_the_plain_backend_on_a_gpu(block: str) -> None:
    check(BACKENDS["plain"], BLOCKS[block], torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("block", ["square", "odd square", "documents"])
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "flash"])
@pytest.mark.parametrize("starts", [[[0]], [[0, 1000, 1001, 3000]], [[0], [0]], [[0, 512], [0, 5]]], ids=str)
def test_whole_sequences_on_a_gpu(name: str, starts: list[list[int]]) -> None:
    """Through the public function, rows and documents included, against the plain backend in fp32."""
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
    monkeypatch.setattr(backends, "_starts", lambda edges, device: bounds)
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
