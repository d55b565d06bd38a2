"""Bits: of a sequence in pieces, of documents side by side; how far a NaN goes; what a recomputation runs again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dnsp.kernels import kept
from dnsp.kernels.delta_rule import Segments
from dnsp.kernels.scan import LocalScan, fold, reverse_fold, stack_states
from tests.kernels.cases import Case, call, chunked, segments

TOLERANCE = {torch.float32: 5e-6, torch.float64: 5e-14}  # |error| / |truth| between segment lengths
PACKED = ((0,), (0, 1, 2, 3, 70), (0, 64, 128, 512), (0, 5, 100, 101, 900), (0, 33, 97, 700), (0, 63, 65, 190))
CASES = {
    "one document": Case(1000),
    "documents and states": Case(1000, starts=PACKED, initial=True, final=True),
}


@pytest.mark.parametrize("name", CASES)
def test_segment_lengths_agree(name):
    for dtype, tolerance in TOLERANCE.items():
        one, *others = (chunked(CASES[name], dtype, tokens) for tokens in (None, 64, 128, 512))
        exact = {n: x.double() for n, x in one.items()}
        for other in others:
            for n, b in exact.items():
                assert (other[n] - b).norm() < tolerance * b.norm(), n


@dataclass
class Mail:
    """States on their way between two pieces of a sequence."""

    state: Tensor | None = None
    grad: Tensor | None = None


@dataclass
class PieceScan:
    """The scan of a run of segments that lies between two others; None at the ends of the sequence."""

    here = False
    left: Mail | None
    right: Mail | None

    def forward(self, M, U, continues, forgets, initial, want_final):
        state, incoming = initial if self.left is None else self.left.state, []
        for n in range(len(U)):
            incoming.append(state)
            if n < len(U) - 1 or self.right is not None or want_final:
                state = fold(M[n], U[n], state, None if continues is None else continues[n])
        if self.right is not None:
            self.right.state = state
        return lambda: (stack_states(incoming, U), state if want_final and self.right is None else None)

    def reverse(self, M, D, continues, forgets, final_grad, has_initial, want_final):
        grad, outgoing = final_grad if self.right is None else self.right.grad, []
        for n in reversed(range(len(D))):
            outgoing.append(grad)
            if n > 0 or self.left is not None or has_initial:
                grad = reverse_fold(M[n], D[n], grad, None if continues is None else continues[n])
        if self.left is not None:
            self.left.grad = grad
        return lambda: (stack_states(outgoing[::-1], D), grad if has_initial and self.left is None else None)


def in_pieces(case: Case, dtype: torch.dtype, tokens: int, pieces: int, device: str = "cpu") -> dict[str, Tensor]:
    """Outputs, final state and gradients; forward from left to right, backward from right to left."""
    whole, inputs = segments(case, tokens), case.inputs(dtype, device)
    do, dfinal = case.output_gradients()
    cuts = [p * len(whole.starts) // pieces for p in range(pieces + 1)]
    mails = [None, *(Mail() for _ in range(pieces - 1)), None]
    outputs = []
    for p, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        continues = None if whole.continues_NB is None else whole.continues_NB[a:b]
        held = Segments(tokens, whole.starts[a:b], case.T, continues, whole.open and whole.open[a:b])
        local = slice(whole.starts[a], min(whole.starts[b - 1] + tokens, case.T))
        outputs.append((local, *call(case, inputs, held, PieceScan(mails[p], mails[p + 1]), local)))
    found = {"o": torch.cat([o for _, o, _ in outputs], 1).detach()}
    grads = {n: torch.zeros_like(x) for n, x in inputs.items()}
    for local, o, final in reversed(outputs):
        roots, along = [o], [do[:, local].to(o)]
        if final is not None:
            roots, along = [o, final], [*along, dfinal.to(final)]
        for n, grad in zip(
            inputs, torch.autograd.grad(roots, list(inputs.values()), along, allow_unused=True), strict=True
        ):
            if grad is not None:
                grads[n] += grad  # zeros but for this piece's tokens
    if case.final:
        found["final"] = outputs[-1][2].detach()
    return found | {"d" + n: grad for n, grad in grads.items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_pieces_give_the_bits_of_the_whole(name, pieces):
    for dtype in TOLERANCE:
        for tokens in (64, 128) if pieces > 2 else (64, 128, 512):
            assert_same_bits(in_pieces(CASES[name], dtype, tokens, pieces), chunked(CASES[name], dtype, tokens))


ON_GPU = {
    "of a Hopper's widths": replace(CASES["documents and states"], H=1, HV=2, K=128, V=128, l2norm=True),
    "one document": replace(CASES["one document"], H=1, HV=2, K=128, V=128, l2norm=True),
    "passes apart": replace(CASES["documents and states"], K=64, V=32, l2norm=True),
}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_pieces_give_the_bits_of_the_whole_on_gpu(name, pieces):
    for tokens in (64, 128) if pieces > 2 else (64, 128, 512):
        found = in_pieces(ON_GPU[name], torch.bfloat16, tokens, pieces, "cuda")
        assert_same_bits(found, chunked(ON_GPU[name], torch.bfloat16, tokens, "cuda"))


def rounded_to_tf32(x: Tensor) -> Tensor:
    return (((x.view(torch.int32) + 4096) >> 13) << 13).view(torch.float32)


def test_a_state_crosses_a_segment_in_no_less_than_fp32(monkeypatch):
    """Whatever a program allows torch's products: on a GPU many allow one-pass TF32."""
    exact = torch.matmul

    def allowed(a: Tensor, b: Tensor) -> Tensor:
        return exact(rounded_to_tf32(a), rounded_to_tf32(b)) if a.dtype == torch.float32 else exact(a, b)

    draw = torch.Generator().manual_seed(0)
    M, U, S = (torch.randn(2, 3, *shape, generator=draw) for shape in ((256, 256), (256, 32), (256, 32)))
    M /= 16
    monkeypatch.setattr(torch, "matmul", allowed)
    for found, product in ((fold(M, U, S, None), M), (reverse_fold(M, U, S, None), M.mT)):
        truth = exact(product.double(), S.double()) + U.double()
        assert found.dtype == torch.float32 and (found - truth).norm() < 1e-7 * truth.norm()


# Documents, the NaN's among them. Those beside it in its chunks may go with it; those of other chunks may not.
STARTS = ((0, 64, 100, 192, 300), (0, 30, 31, 250))
MODEL = Case(350, decays=("weak", "spikes"), starts=STARTS, H=2, HV=4, K=8, V=6)


def run(changed: dict[str, Tensor], do: Tensor, tokens: int | None = 64) -> dict[str, Tensor]:
    inputs = {n: x.detach().requires_grad_() for n, x in changed.items()}
    o, _ = call(MODEL, inputs, segments(MODEL, tokens), LocalScan())
    grads = torch.autograd.grad(o, list(inputs.values()), do)
    return {"o": o.detach()} | {"d" + n: grad for n, grad in zip(inputs, grads, strict=True)}


@pytest.mark.parametrize(("row", "start", "stop"), [(0, 0, 64), (0, 64, 100), (0, 100, 192), (1, 30, 31), (1, 31, 250)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [64, None])
def test_a_document_changes_no_bit_of_another(row, start, stop, dtype, tokens):
    inputs = {n: x.detach() for n, x in MODEL.inputs(dtype).items()}
    do = MODEL.output_gradients()[0].to(dtype)
    before = run(inputs, do, tokens)
    changed = {n: x.clone() for n, x in inputs.items()}
    for x in (*changed.values(), do := do.clone()):
        x[row, start:stop] *= 1.7
    after = run(changed, do, tokens)
    others = torch.ones(2, MODEL.T, dtype=torch.bool)
    others[row, start:stop] = False
    assert_same_bits({n: x[others] for n, x in after.items()}, {n: x[others] for n, x in before.items()})
    assert all(not torch.equal(after[n][~others], before[n][~others]) for n in before if (start, n) != (30, "dg"))


def test_the_future_changes_no_bit_of_the_past():
    inputs = {n: x.detach() for n, x in MODEL.inputs(torch.float32).items()}
    do = MODEL.output_gradients()[0]
    changed = {n: x.clone() for n, x in inputs.items()}
    for x in changed.values():
        x[:, 230:] *= 1.7
    assert torch.equal(run(changed, do)["o"][:, :230], run(inputs, do)["o"][:, :230])


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "do"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [64, None])
def test_a_nan_stays_in_its_chunks_and_heads(name, value, tokens):
    """In row 0, document 64..99 ends inside chunk 1 (64..127), where 100..191 begins; that one ends with chunk 2."""
    inputs = {n: x.detach() for n, x in MODEL.inputs(torch.float32).items()}
    inputs["do"] = MODEL.output_gradients()[0]
    before = run({n: x for n, x in inputs.items() if n != "do"}, inputs["do"], tokens)
    spoilt = inputs[name].clone()
    spoilt[0, 70, 0] = -value if name == "g" else value  # head 0: value heads 0 and 1 where it is a key head's
    changed = inputs | {name: spoilt}
    after = run({n: x for n, x in changed.items() if n != "do"}, changed["do"], tokens)
    assert not all(x.isfinite().all() for x in after.values())
    elsewhere = torch.ones(2, MODEL.T, dtype=torch.bool)
    elsewhere[0, 64:192] = False
    assert_same_bits({n: x[elsewhere] for n, x in after.items()}, {n: x[elsewhere] for n, x in before.items()})
    for n, x in before.items():  # heads of the other key head
        half = x.shape[2] // 2
        assert torch.equal(after[n][:, :, half:], x[:, :, half:]), n
    assert torch.equal(after["o"][:, :64], before["o"][:, :64])  # and what came before it


class CountingScan(LocalScan):
    def __init__(self) -> None:
        self.forwards = self.reverses = 0

    def forward(self, *args):
        self.forwards += 1
        return super().forward(*args)

    def reverse(self, *args):
        self.reverses += 1
        return super().reverse(*args)


def test_a_recomputed_call_runs_no_scan_again():
    case, scan = CASES["documents and states"], CountingScan()
    inputs, part = case.inputs(torch.float32), segments(case, 128)

    def layer(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, final = call(case, dict(zip(inputs, tensors, strict=True)), part, scan)
        return call(case, dict(zip(inputs, tensors, strict=True)) | {"v": o.tanh()}, part, scan)

    expected = case.results(*layer(*inputs.values()), inputs)
    assert (scan.forwards, scan.reverses) == (2, 2)
    found = case.results(*kept.checkpoint(layer, *inputs.values()), inputs)
    assert (scan.forwards, scan.reverses) == (4, 4)  # two more each: none for the recomputation
    assert_same_bits(found, expected)
