"""The public ops: what their arguments mean, packed documents with a state each, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.delta_rule import Segments, chunk_gated_delta_rule, delta_rule, fused_recurrent_gated_delta_rule
from dnsp.kernels.reference import recurrence
from dnsp.kernels.scan import LocalScan
from dnsp.kernels.segments import Heads, filling_tokens

qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

TOLERANCE = 5e-14  # |error| / |truth|, fp64
AUTOCAST_TOLERANCE = 0.0  # under autocast fp32 inputs give the bits they give without it
TRANSFORMERS_TOLERANCE = 2e-6  # two fp32 implementations


def make(
    T: int = 100, B: int = 1, H: int = 1, HV: int = 2, K: int = 8, V: int = 6, dtype=torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g, beta = (
        torch.randn(*shape, generator=generator)
        for shape in ((B, T, H, K), (B, T, H, K), (B, T, HV, V), (B, T, HV), (B, T, HV))
    )
    tensors = q, F.normalize(k, dim=-1), v, F.logsigmoid(g + 3), beta.sigmoid()
    return [x.to(dtype).requires_grad_() for x in tensors]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


BOUNDS = torch.tensor([0, 1, 1, 40, 100])  # one token, none, a few, more than a chunk


@pytest.mark.parametrize("op", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents_with_a_state_each(op, dtype):
    """cu_seqlens of N documents: N initial states in, N final states out; each document as if alone."""
    tensors = make()
    initial = torch.randn(4, 2, 8, 6, dtype=torch.float64, requires_grad=True)
    o, final = op(
        *tensors[:4], beta=tensors[4], initial_state=initial, output_final_state=True, cu_seqlens=BOUNDS.to(dtype)
    )
    outputs, finals = [], []
    for n, (a, b) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:], strict=True)):
        alone = [x[:, a:b] for x in tensors]
        one, last = recurrence(*alone, scale=8**-0.5, initial_state_BHKV=initial[n : n + 1])
        outputs.append(one)
        finals.append(last)
    expected = torch.cat(outputs, 1), torch.cat(finals)
    assert final.shape == (4, 2, 8, 6) and torch.equal(final[1], initial[1])
    assert relative(o, expected[0]) < TOLERANCE and relative(final, expected[1]) < TOLERANCE
    along = [torch.randn_like(o), torch.randn_like(final)]
    leaves = [*tensors, initial]
    for a, b in zip(
        torch.autograd.grad((o, final), leaves, along), torch.autograd.grad(expected, leaves, along), strict=True
    ):
        assert relative(a, b) < TOLERANCE


def test_recurrent_without_beta_writes_with_strength_one():
    q, k, v, g, beta = make()
    o, _ = fused_recurrent_gated_delta_rule(q, k, v, g)
    assert torch.equal(o, fused_recurrent_gated_delta_rule(q, k, v, g, beta=torch.ones_like(beta))[0])


@pytest.mark.parametrize("segment_tokens", [None, 64])
def test_packed_documents_without_states(segment_tokens):
    tensors = make(200)
    bounds = torch.tensor([0, 1, 70, 128, 200])
    o, final = chunk_gated_delta_rule(*tensors, cu_seqlens=bounds, segment_tokens=segment_tokens)
    pieces = [[x[:, a:b] for x in tensors] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    expected = torch.cat([recurrence(*piece, scale=8**-0.5)[0] for piece in pieces], 1)
    assert final is None and relative(o, expected) < TOLERANCE
    starts = torch.tensor([max(int(b) for b in bounds if b <= t) for t in range(200)], dtype=torch.int32)[None]
    again, _ = chunk_gated_delta_rule(*tensors, doc_start=starts, segment_tokens=segment_tokens)
    assert torch.equal(again, o)


@pytest.mark.parametrize("segment_tokens", [None, 64])
def test_doc_start_with_states(segment_tokens):
    """The first document of a row goes on from its initial state; the final state is the last document's."""
    tensors = make(150, B=2)
    initial = torch.randn(2, 2, 8, 6, dtype=torch.float64, requires_grad=True)
    starts = torch.zeros(2, 150, dtype=torch.int32)
    starts[0, 90:] = 90
    o, final = chunk_gated_delta_rule(
        *tensors, initial_state=initial, output_final_state=True, doc_start=starts, segment_tokens=segment_tokens
    )
    first, _ = recurrence(*(x[:1, :90] for x in tensors), scale=8**-0.5, initial_state_BHKV=initial[:1])
    second, last = recurrence(*(x[:1, 90:] for x in tensors), scale=8**-0.5)
    other, other_last = recurrence(*(x[1:] for x in tensors), scale=8**-0.5, initial_state_BHKV=initial[1:])
    expected = torch.cat([torch.cat([first, second], 1), other]), torch.cat([last, other_last])
    assert relative(o, expected[0]) < TOLERANCE and relative(final, expected[1]) < TOLERANCE
    along = [torch.randn_like(o), torch.randn_like(final)]
    found, exact = (torch.autograd.grad(x, [*tensors, initial], along) for x in ((o, final), expected))
    assert all(relative(a, b) < TOLERANCE for a, b in zip(found, exact, strict=True))


def test_an_initial_state_that_no_document_takes_up():
    """A row whose first document starts at token 0 reads no initial state, not even a NaN, nor gives it a gradient."""
    q, k, v, g, beta = make(130)
    initial = torch.full((1, 2, 8, 6), torch.nan, dtype=torch.float64, requires_grad=True)
    starts = torch.zeros(1, 130, dtype=torch.int32)
    continues = torch.tensor([[False], [True], [True]])
    options = dict(
        scale=1.0, segments=Segments(64, (0, 64, 128), 130, continues), scan=LocalScan(), doc_start_BT=starts
    )
    o, _ = delta_rule(q, k, v, g, beta, initial_state_BHKV=initial, **options)
    expected, _ = recurrence(q, k, v, g, beta, scale=1.0)
    assert relative(o, expected) < TOLERANCE
    (grad,) = torch.autograd.grad(o.sum(), initial)
    assert not grad.any()


def test_as_transformers_calls_it():
    """With its arguments, by keyword, in its dtypes: the drop-in for a model's chunked and recurrent functions."""
    q, k, v, g, beta = (x.detach() for x in make(130, B=2, H=4, HV=4, K=16, V=16, dtype=torch.float32))
    options = dict(g=g, beta=beta, initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)
    ours = chunk_gated_delta_rule(q, k, v, **options)
    theirs = qwen.torch_chunk_gated_delta_rule(q, k, v, **options)
    assert all(relative(a, b) < TRANSFORMERS_TOLERANCE for a, b in zip(ours, theirs, strict=True))
    q, k, v, g, beta = (x[:, :1] for x in (q, k, v, g, beta))
    options |= dict(g=g, beta=beta, initial_state=ours[1])
    ours, theirs = (
        op(q, k, v, **options) for op in (fused_recurrent_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule)
    )
    assert all(relative(a, b) < TRANSFORMERS_TOLERANCE for a, b in zip(ours, theirs, strict=True))


def test_defaults():
    q, k, v, g, beta = make()
    o, final = chunk_gated_delta_rule(q, k, v, g, beta)
    assert final is None and relative(o, recurrence(q, k, v, g, beta, scale=8**-0.5)[0]) < TOLERANCE
    plain, _ = chunk_gated_delta_rule(q, k, v, None, beta, scale=1.0)
    assert relative(plain, recurrence(q, k, v, torch.zeros_like(g), beta, scale=1.0)[0]) < TOLERANCE


def test_no_tokens():
    o, final = chunk_gated_delta_rule(*make(0), output_final_state=True)
    assert o.shape == (1, 0, 2, 6) and final.shape == (1, 2, 8, 6) and not final.any()


def test_no_rows_launch_nothing(monkeypatch):
    """Not even where a GPU would be asked for one: a grid or a descriptor of nothing is an error there."""
    monkeypatch.setenv("DNSP_DELTA_RULE", "triton")
    tensors = make(B=0, K=16, V=16, dtype=torch.float32)
    o, final = chunk_gated_delta_rule(*tensors, output_final_state=True)
    assert o.shape == (0, 100, 2, 16) and final.shape == (0, 2, 16, 16)
    assert [x.shape for x in torch.autograd.grad(o.sum(), tensors)] == [x.shape for x in tensors]


def test_layout_in_memory_changes_nothing():
    tensors = make(B=2)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in tensors]
    along = torch.randn(2, 6, 2, 100, dtype=torch.float64).permute(0, 3, 2, 1)
    results = []
    for inputs, do in ((tensors, along.contiguous()), (strided, along)):
        o, _ = chunk_gated_delta_rule(*inputs)
        results.append([o, *torch.autograd.grad(o, inputs, do)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_does_not_reach_inside():
    tensors = make(130, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, _ = chunk_gated_delta_rule(*tensors, segment_tokens=64)
            results.append([o, *torch.autograd.grad(o.square().sum(), tensors)])
    assert all(relative(a, b) <= AUTOCAST_TOLERANCE for a, b in zip(*results, strict=True))


def test_a_second_derivative_is_refused():
    """What the scan hands over has no graph: a second derivative through it would be wrong."""
    tensors = make(70)
    grads = torch.autograd.grad(chunk_gated_delta_rule(*tensors)[0].sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)


def bounds(*values: int) -> Tensor:
    return torch.tensor(values)


Q, K_, V_, G, BETA = make()
REFUSALS = [
    # per-channel decay: another algebra
    (dict(g=torch.zeros(1, 100, 2, 8)), ValueError, r"g\[1, 100, 2, 8\].*per key channel.*\[1, 100, 2\]"),
    (dict(v=torch.zeros(1, 100, 3, 6), q=torch.cat([Q, Q], 2), k=torch.cat([K_, K_], 2)), ValueError, "HV=3.*H=2"),
    (dict(beta=BETA[:, :99]), ValueError, r"beta\[1, 99, 2\].*\[1, 100, 2\]"),
    (dict(g=G[..., :1]), ValueError, r"g\[1, 100, 1\].*\[1, 100, 2\]"),
    (dict(q=Q[..., :7]), ValueError, r"q\[1, 100, 1, 7\].*\[1, 100, 1, 8\]"),
    (dict(q=Q[0]), ValueError, r"q\[100, 1, 8\]"),
    (dict(v=V_[0]), ValueError, r"v\[100, 2, 6\].*\[B, T, HV, V\]"),
    (dict(k=K_.float()), TypeError, "k is torch.float32, q is torch.float64.*cast"),
    (dict(q=Q.int(), k=K_.int(), v=V_.int()), TypeError, "floating"),
    (dict(initial_state=torch.zeros(1, 2, 6, 8)), ValueError, r"initial_state\[1, 2, 6, 8\].*\[1, 2, 8, 6\]"),
    (dict(segment_tokens=100), ValueError, "segment_tokens=100.*multiple of 64"),
    (dict(segment_tokens=0), ValueError, "segment_tokens=0.*multiple of 64"),
    (dict(segment_tokens=-64), ValueError, "segment_tokens=-64.*multiple of 64"),
    (dict(cu_seqlens=bounds(0, 40, 99)), ValueError, "cu_seqlens.*99.*T=100"),
    (dict(cu_seqlens=bounds(0, 60, 40, 100)), ValueError, "cu_seqlens.*must rise"),
    (dict(cu_seqlens=bounds(5, 100)), ValueError, "cu_seqlens.*from 0"),
    (dict(cu_seqlens=bounds(0, 40, 100).float()), ValueError, "cu_seqlens.*integer"),
    (
        dict(cu_seqlens=bounds(0, 40, 100), initial_state=torch.zeros(1, 2, 8, 6)),
        ValueError,
        r"2 documents.*\[2, 2, 8, 6\]",
    ),
    (dict(cu_seqlens=bounds(0, 100).to("meta")), ValueError, "cu_seqlens is on meta, q on cpu: move"),
    (
        dict(cu_seqlens=bounds(0, 100).to("meta"), output_final_state=True),
        ValueError,
        "cu_seqlens is on meta, q on cpu: move all",
    ),
    (dict(cu_seqlens=bounds(0, 100), doc_start=torch.zeros(1, 100).int()), ValueError, "one of them"),
    (dict(doc_start=torch.zeros(1, 99).int()), ValueError, r"doc_start\[1, 99\].*\[1, 100\]"),
    (dict(doc_start=torch.zeros(1, 100)), TypeError, "doc_start.*int32 or int64"),
    (dict(doc_start=[[0] * 100]), TypeError, "doc_start is list: give a tensor"),
    (dict(g=-G, check_inputs=True), ValueError, "> 0.*at most 0"),
    (dict(g=G * torch.nan, check_inputs=True), ValueError, "g holds.*not finite"),
    (dict(beta=BETA * torch.inf, check_inputs=True), ValueError, "beta holds.*not finite"),
    (dict(k=K_ * torch.nan, check_inputs=True), ValueError, "k holds.*not finite"),
    (dict(doc_start=torch.full((1, 100), 7).int(), check_inputs=True), ValueError, r"doc_start\[0, 0\]=7.*token, 0"),
    (dict(doc_start=torch.arange(100)[None] // 9 * 8, check_inputs=True), ValueError, r"doc_start\[0, 9\]=8.* 0$"),
    (dict(g=G.int()), TypeError, "g is torch.int32.*floating"),
    (dict(beta=BETA > 0), TypeError, "beta is torch.bool.*floating"),
    (dict(beta=None), TypeError, "beta is NoneType: give a tensor"),
    (dict(initial_state=torch.zeros(1, 2, 8, 6).int()), TypeError, "initial_state is torch.int32.*floating"),
    (dict(q=Q[..., :0], k=K_[..., :0]), ValueError, "K=0, V=6.*at least 1"),
    (dict(v=V_[:, :, :0], g=G[..., :0], beta=BETA[..., :0]), ValueError, "HV=0.*multiple"),
    (dict(segment_tokens=64.0), ValueError, "segment_tokens=64.0.*multiple of 64"),
    (dict(segment_tokens="64"), ValueError, "segment_tokens='64'.*multiple of 64"),
    (dict(cu_seqlens=[0, 100]), TypeError, "cu_seqlens is list.*integer bounds"),
    (dict(cu_seqlens=bounds(0, 100).to(torch.uint8)), ValueError, "cu_seqlens.*uint8.*int32 or int64"),
]


@pytest.mark.parametrize(("change", "error", "said"), REFUSALS, ids=[said for _, _, said in REFUSALS])
def test_refusals(change, error, said):
    with pytest.raises(error, match=said) as refusal:
        chunk_gated_delta_rule(**(dict(q=Q, k=K_, v=V_, g=G, beta=BETA) | change))
    assert len(str(refusal.value)) < 240 and "\n" not in str(refusal.value)


def test_a_backend_that_is_not_known_is_refused_by_where_it_was_given(monkeypatch):
    monkeypatch.setenv("DNSP_DELTA_RULE", "cuda")
    with pytest.raises(ValueError, match="^DNSP_DELTA_RULE=cuda: give 'triton'.* or 'torch'"):
        chunk_gated_delta_rule(*make())
    with pytest.raises(ValueError, match="^DNSP_DELTA_RULE=cuda: give 'triton'"):
        causal_conv1d(torch.ones(1, 8, 4), torch.ones(4, 3))
    with pytest.raises(ValueError, match="^backend='cpu': give 'triton'"):
        chunk_gated_delta_rule(*make(), backend="cpu")


BF16 = torch.bfloat16
# Rows, heads of keys and of values, K, V, type, whether the GPU is a Hopper; tokens; segments that fill it.
FILLING = [
    ((1, 16, 32, 128, 128, BF16), 32768, 8),
    ((1, 16, 16, 128, 128, BF16), 32768, 8),  # of which every program of the backward pass has one, too
    ((1, 16, 16, 128, 128, torch.float32), 32768, 16),
    ((1, 16, 16, 128, 128, BF16, False), 32768, 16),
    ((1, 16, 32, 128, 128, BF16, False), 32768, 8),
    ((1, 4, 8, 128, 128, BF16), 131072, 33),
    ((32, 16, 32, 128, 128, BF16), 4096, 1),
    ((1, 16, 16, 64, 64, BF16), 131072, 33),
    ((1, 1, 2, 16, 16, BF16), 131072, 64),  # no longer chain
    ((1, 1, 1, 128, 128, BF16), 16384, 16),  # of 16 chunks each
]


@pytest.mark.parametrize(("sizes", "tokens", "segments"), FILLING)
def test_segments_that_fill_a_gpu(sizes, tokens, segments):
    length = filling_tokens(Heads(*sizes), 132, tokens)
    assert length % 64 == 0 and -(-tokens // length) == segments


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match="B=2 with cu_seqlens.*B=1"):
        chunk_gated_delta_rule(*make(B=2), cu_seqlens=bounds(0, 100))


def test_tokens_beside_the_segments_are_refused():
    with pytest.raises(ValueError, match="T=100.*hold 64 tokens"):
        delta_rule(*make(), scale=1.0, segments=Segments(64, (0,), 128), scan=LocalScan())


def test_documents_elsewhere_are_refused():
    segments = Segments(64, (0, 64), 100, torch.ones(2, 1, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="continues_NB is on meta, v on cpu"):
        delta_rule(*make(), scale=1.0, segments=segments, scan=LocalScan())
