"""The chunked delta rule against the token-by-token recurrence in fp64: outputs, final states, every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dnsp.kernels.delta_rule import Segments
from dnsp.kernels.reference import Rule
from dnsp.kernels.scan import LocalScan
from tests.kernels.cases import SHAPES, Case, assert_close, call, chunked, truth

# |error| / |truth|, per tensor, in the worst row of the batch. What is promised for fp32 is 2e-5.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 5e-14, torch.bfloat16: 8e-3}
LENGTHS = (1, 3, 63, 64, 65, 127, 200, 1000)
LONG = 5000
SEGMENTS = (64, 128, 512, None)

LAYOUTS = {
    "one": ((0,),),
    "packed": ((0,), (0, 1, 2, 3, 70), (0, 64, 128, 512), (0, 5, 100, 101, 900), (0, 33, 97, 3000), (0, 63, 65, 190)),
}


def documents(T: int, name: str) -> tuple[tuple[int, ...], ...] | None:
    return None if name == "one" else tuple(tuple(s for s in row if s < T) for row in LAYOUTS[name])


def check(case: Case, segment_tokens: int | None = None) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_close(chunked(case, dtype, segment_tokens), truth(case), TOLERANCE[dtype])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_all_backends(name):
    check(*SHAPES[name])


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths(T, layout):
    check(Case(T, starts=documents(T, layout)))
    check(Case(T, starts=documents(T, layout), initial=True, final=True), 64)


@pytest.mark.parametrize("segment_tokens", SEGMENTS)
def test_segments(segment_tokens):
    case = Case(1000, starts=documents(1000, "packed"), initial=True, final=True)
    check(case, segment_tokens)
    check(replace(case, starts=None), segment_tokens)


VARIANTS = {
    "no decay": dict(g=False),
    "no erase": dict(rule=Rule(erase=False)),
    "no erase, no decay": dict(rule=Rule(erase=False), g=False),
    "error from the undecayed state": dict(rule=Rule(error_decay="previous")),
    "l2norm": dict(l2norm=True, key_norm=3.0),
    "grouped heads": dict(H=2, HV=6, K=8, V=20),
    "grouped heads, l2norm": dict(H=2, HV=4, K=8, V=5, l2norm=True),
    "K over V": dict(H=2, K=24, V=5),
    "one column": dict(V=1, rule=Rule(erase=False), g=False),
    "beta over 2": dict(beta=(2.0, 2.4), decays=("spikes",) * 6),
    "beta |k|^2 in 1 to 3": dict(key_norm=2**0.5, beta=(0.5, 1.5), decays=("weak",) * 6),
    # (I + L)^-1 without its decays would pass 1e22 here
    "beta |k|^2 in 9 to 18": dict(key_norm=18**0.5, beta=(0.5, 1.0), decays=("any",) * 6),
    "beta |k|^2 in 9 to 18, mixed": dict(key_norm=18**0.5, beta=(0.5, 1.0), decays=("mixed",) * 6),
    "negative beta": dict(beta=(-0.5, 0.5)),
    "undecayed error, strong": dict(rule=Rule(error_decay="previous"), decays=("strong",) * 6),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    case = Case(200, starts=documents(200, "packed"), initial=True, final=True, **VARIANTS[variant])
    check(case, 64)
    check(replace(case, starts=None, initial=False, final=False))


@pytest.mark.parametrize("T", [65, 200])
def test_documents_of_one_token(T):
    """o = scale beta (q k) v, and no decay is felt: the gradient of g is zero to the last bit (checked in `errors`)."""
    case = Case(T, starts=(tuple(range(T)),) * 6)
    check(case, 64)
    found = chunked(case, torch.float32, 64)
    x = case.inputs(torch.float64)
    o = case.scale * (x["beta"] * (x["q"] * x["k"]).sum(-1))[..., None] * x["v"]
    assert_close({"o": found["o"]}, {"o": o.detach()}, TOLERANCE[torch.float32])
    assert not found["dg"].any()


@pytest.mark.parametrize("depth", [-100.0, -1e4])
def test_a_decay_beyond_fp32_is_zero(depth):
    """exp(-104) is zero in fp32: no state gets through, and no gradient gets back."""
    case = Case(130, decays=("weak",), initial=True, final=True)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs["g"][:, 70:72] = depth
    o, final = call(case, inputs, Segments(64, (0, 64, 128), 130), LocalScan())
    grads = torch.autograd.grad([o[:, 72:].sum() + final.sum()], list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        assert not grad[:, :70].any(), name  # the initial state's too: its second axis is the heads
        assert grad.isfinite().all(), name


def test_what_is_not_asked_for():
    """Only the outputs used, or only the final state: the other has no gradient, not a wrong one."""
    case = Case(130, initial=True, final=True)
    for used in (0, 1):
        results = []
        for dtype in (torch.float32, torch.float64):
            inputs = case.inputs(dtype)
            out = call(case, inputs, Segments(64, (0, 64, 128), 130), LocalScan())[used]
            results.append(torch.autograd.grad(out.square().sum(), list(inputs.values())))
        for name, a, b in zip(case.names, *results, strict=True):
            assert (a - b).norm() <= 5e-6 * b.norm(), (name, used)


def test_bf16():
    """Inputs and outputs bf16, everything between in fp32: one rounding at the end."""
    case = Case(200, starts=documents(200, "packed"), initial=True, final=True)
    found = chunked(case, torch.bfloat16, 64)
    assert found["o"].dtype == found["dk"].dtype == torch.bfloat16 and found["final"].dtype == torch.float32
    assert_close(found, truth(case, torch.bfloat16), TOLERANCE[torch.bfloat16])


def test_long():
    check(Case(LONG, decays=("weak", "mixed", "spikes"), starts=((0,), (0, 33, 97, 3000), (0, 1, 2, 4999))), 512)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["as it is", "no decay", "error from the undecayed state", "no erase", "grouped heads"]
)
def test_long_sweep(variant):
    case = Case(LONG, starts=documents(LONG, "packed"), initial=True, final=True, **VARIANTS.get(variant, {}))
    for segment_tokens in (64, None):
        check(case, segment_tokens)
