"""The decode kernels against the recurrence in fp64: under Triton's interpreter, compiled for GPUs, and on a GPU.

Long because the three ways share one table of cases.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dnsp.kernels import proof, proof_run, triton_decode
from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.decode import conv_step, delta_step, gated_delta_step
from dnsp.kernels.delta_rule import fused_recurrent_gated_delta_rule
from dnsp.kernels.launches import candidates
from dnsp.kernels.reference import Rule, recurrence
from tests.kernels.interpreter import Interpreter
from tests.kernels.triton_compile import Compiled

pytestmark = pytest.mark.usefixtures("unasked")

# |error| / |truth| of what is rounded to the dtype on its way; the state of delta_step alone is not.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
STATE = 2e-6
TOKENS = 4
PREVIOUS, NO_ERASE = Rule(error_decay="previous"), Rule(erase=False)


@dataclass(frozen=True)
class Case:
    """Some tokens of B sequences; with slots, ``idle`` ones stand still."""

    B: int = 2
    H: int = 2
    HV: int = 4
    K: int = 16
    V: int = 16
    W: int = 4
    rule: Rule = Rule()  # noqa: RUF009 (frozen)
    g: bool = True
    l2norm: bool = True
    slots: bool = False
    idle: tuple[int, ...] = ()


DELTA = {
    "plain": Case(),
    "previous, no norm": Case(rule=PREVIOUS, l2norm=False, K=32, V=64, H=1),
    "no erase": Case(rule=NO_ERASE, g=False, l2norm=False),
    "no decay, slots": Case(B=3, g=False, slots=True, idle=(1,)),
    "odd widths": Case(B=1, H=1, HV=3, K=24, V=20),
    "narrow": Case(H=1, HV=1, K=3, V=5),
}
GATED = {
    "layer": Case(V=32),
    "layer, slots": Case(B=3, H=1, HV=3, K=32, slots=True, idle=(0,)),
    "layer, odd widths": Case(K=12, V=20, W=3),
    "layer, no tail": Case(W=1, HV=2),
}
GPU_DELTA = {
    "wide": Case(B=3, H=2, HV=4, K=256, V=256),
    "K over V": Case(B=5, K=128, V=32, rule=PREVIOUS, slots=True, idle=(2,)),
    "V over K": Case(K=64, V=128, rule=NO_ERASE),
}
GPU_GATED = {"layer of 32 heads": Case(B=4, H=16, HV=32, K=128, V=128, slots=True, idle=(3,))}


class Tables:
    """Memories with more rows than the batch where the case has slots, every row filled."""

    def __init__(self, case: Case, generator: torch.Generator, channels: int) -> None:
        rows = case.B + 2 if case.slots else case.B
        self.state = torch.randn(rows, case.HV, case.K, case.V, generator=generator)
        self.tail = torch.randn(rows, case.W - 1, channels, generator=generator)
        slots = torch.randperm(rows, generator=generator)[: case.B]
        slots[list(case.idle)] = -1
        self.slots = slots if case.slots else None

    def of(self, table: Tensor, b: int) -> Tensor | None:
        """Row b's part of a table, None where it is idle."""
        row = b if self.slots is None else int(self.slots[b])
        return None if row < 0 else table[row : row + 1]

    def untouched(self) -> list[int]:
        held = [] if self.slots is None else self.slots.tolist()
        return [row for row in range(len(self.state)) if self.slots is not None and row not in held]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double().cpu() - b.double()).norm() / b.double().norm()).item()


def delta_errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """``delta_step`` token by token on the kernels, and the recurrence over all tokens."""
    generator = torch.Generator().manual_seed(0)
    B, H, HV, K, V = case.B, case.H, case.HV, case.K, case.V
    q, k, v, g, beta = (
        torch.randn(B, TOKENS, *shape, generator=generator).to(dtype)
        for shape in ((H, K), (H, K), (HV, V), (HV,), (HV,))
    )
    k = k if case.l2norm else F.normalize(k.float(), dim=-1).to(dtype)
    g, beta = (F.logsigmoid(g.float() + 2) if case.g else None), beta.sigmoid()
    tables = Tables(case, generator, 1)
    state, slots = tables.state.to(device).clone(), None if tables.slots is None else tables.slots.to(device)
    outputs = []
    for t in range(TOKENS):
        now = (None if x is None else x[:, t].to(device) for x in (q, k, v, g, beta))
        options = {"scale": 0.3, "rule": case.rule, "l2norm": case.l2norm, "slots_B": slots}
        outputs.append(delta_step(*now, state, **options, backend="triton"))
    assert outputs[0].dtype == dtype
    found = torch.stack(outputs, 1)
    worst = {"o": 0.0, "state": 0.0}
    for b in range(B):
        initial, after = tables.of(tables.state, b), tables.of(state, b)
        if initial is None or after is None:
            assert not found[b].any()
            continue
        row = (None if x is None else x[b : b + 1] for x in (q, k, v, g, beta))
        o, final = recurrence(*row, scale=0.3, initial_state_BHKV=initial, rule=case.rule, normalise_qk=case.l2norm)
        worst = {
            "o": max(worst["o"], relative(found[b : b + 1], o)),
            "state": max(worst["state"], relative(after, final)),
        }
    rest = tables.untouched()
    assert torch.equal(state[rest].cpu(), tables.state[rest])
    return worst


def gated_errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """``gated_delta_step`` token by token on the kernels; in fp64 the convolution, the gates and the recurrence."""
    generator = torch.Generator().manual_seed(1)
    B, H, HV, K, V, W = case.B, case.H, case.HV, case.K, case.V, case.W
    D = 2 * H * K + HV * V
    mixed, a, b = (torch.randn(B, TOKENS, width, generator=generator).to(dtype) for width in (D, HV, HV))
    weight = (torch.randn(D, W, generator=generator) * 0.5).to(dtype)
    A_log, dt_bias = torch.randn(HV, generator=generator), torch.randn(HV, generator=generator) * 3
    tables = Tables(case, generator, D)
    tables.tail = tables.tail.to(dtype)
    state, tail = (x.to(device).clone() for x in (tables.state, tables.tail))
    arguments = {"weight_DW": weight, "A_log_H": A_log, "dt_bias_H": dt_bias, "slots_B": tables.slots}
    arguments = {name: x if x is None else x.to(device) for name, x in arguments.items()}
    steps = [
        gated_delta_step(*(x[:, t].to(device) for x in (mixed, a, b)), tail, state, **arguments, backend="triton")
        for t in range(TOKENS)
    ]
    found = torch.stack(steps, 1)
    assert found.dtype == dtype

    g = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    beta = b.double().sigmoid()
    worst = {"o": 0.0, "state": 0.0}
    for row in range(B):
        initial, halo = tables.of(tables.state, row), tables.of(tables.tail, row)
        after, left = tables.of(state, row), tables.of(tail, row)
        if initial is None or halo is None or after is None or left is None:
            assert not found[row].any()
            continue
        x = mixed[row : row + 1].double()
        assert torch.equal(left.cpu(), torch.cat([halo, x.to(dtype)], 1)[:, TOKENS:])
        qkv = causal_conv1d(x, weight.double(), halo_BWD=halo.double(), start=W - 1)
        q, k, v = qkv.split([H * K, H * K, HV * V], -1)
        o, final = recurrence(
            *(q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))),
            *(g[row : row + 1], beta[row : row + 1]),
            scale=K**-0.5,
            initial_state_BHKV=initial,
            normalise_qk=True,
        )
        worst = {
            "o": max(worst["o"], relative(found[row : row + 1], o)),
            "state": max(worst["state"], relative(after, final)),
        }
    rest = tables.untouched()
    assert torch.equal(state[rest].cpu(), tables.state[rest]) and torch.equal(tail[rest].cpu(), tables.tail[rest])
    return worst


def conv_errors(dtype: torch.dtype, device: str, activation: str | None) -> dict[str, float]:
    """``conv_step`` with a bias on rows of a wider array, from nothing."""
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 6, 300), (290, 4), (290,)))
    x = x[..., :290]
    tail = torch.zeros(2, 3, 290, dtype=dtype, device=device)
    on_device = [y.to(device) for y in (weight, bias)]
    steps = [conv_step(x.to(device)[:, t], tail, *on_device, activation, backend="triton") for t in range(6)]
    exact = causal_conv1d(x.double(), weight.double(), bias.double(), activation=activation)
    assert torch.equal(tail.cpu(), x[:, 3:])
    return {"y": relative(torch.stack(steps, 1), exact)}


def measure(name: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    if name.startswith("conv"):
        return conv_errors(dtype, device, None if name == "conv, plain" else "silu")
    gated = GATED | GPU_GATED
    if name in gated:
        return gated_errors(gated[name], dtype, device)
    return delta_errors((DELTA | GPU_DELTA)[name], dtype, device)


def check(found: dict[str, dict[str, float]], dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    for name, errors in found.items():
        state = limit if name in GATED | GPU_GATED else STATE
        wrong = {what: e for what, e in errors.items() if not e < (state if what == "state" else limit)}
        assert not wrong, (name, wrong)


INTERPRETED = ["conv", "conv, plain", *DELTA, *GATED]


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(interpreter: Interpreter, name: str) -> None:
    check({name: interpreter("test_triton_decode:interpreted_errors", name)}, torch.float32)


def interpreted_errors(name: str) -> dict[str, float]:
    return measure(name, torch.float32, "cpu")


class Launched(proof_run.Recording):
    """Notes the kernels' names."""

    def __init__(self) -> None:
        super().__init__(candidates()["as tuned"])
        self.names: list[str] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.names.append(kernel.__name__)
        super().launch(kernel, grid, args, constants)


def recurrent(dtype: torch.dtype, device: str) -> tuple[list[str], dict[str, float], bool]:
    """The public op: the kernels that it launches, errors over documents with a state each, and whether it left their
    initial states alone."""
    os.environ["DNSP_DELTA_RULE"] = "triton"  # in a process of its own, or on a GPU
    draw, T, H, HV, D = torch.Generator().manual_seed(0), 6, 2, 4, 16
    q, k, v, g, beta, initial = (
        torch.randn(*shape, generator=draw)
        for shape in ((1, T, H, D), (1, T, H, D), (1, T, HV, D), (1, T, HV), (1, T, HV), (3, HV, D, D))
    )
    tensors = [x.to(dtype) for x in (q, k, v)] + [-g.abs(), beta.sigmoid()]
    bounds, launched = torch.tensor([0, 2, 2, T]), Launched()
    given = initial.to(device)
    with proof.mode(launched):
        q, k, v, g, beta = (x.to(device) for x in tensors)
        o, final = fused_recurrent_gated_delta_rule(
            q, k, v, g, beta=beta, initial_state=given, output_final_state=True, use_qk_l2norm_in_kernel=True,
            cu_seqlens=bounds.to(device),
        )  # fmt: skip
    assert final is not None and final.dtype == torch.float32 and o.dtype == dtype
    exact = [
        recurrence(
            *(x[:, a:b] for x in tensors), scale=D**-0.5, initial_state_BHKV=initial[n : n + 1], normalise_qk=True
        )
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    errors = {
        "o": relative(o, torch.cat([o for o, _ in exact], 1)),
        "state": relative(final, torch.cat([state for _, state in exact])),
    }
    return launched.names, errors, torch.equal(given.cpu(), initial)


def test_the_public_op_interpreted(interpreter: Interpreter) -> None:
    check_recurrent(*interpreter("test_triton_decode:recurrent_interpreted"), torch.float32)


def recurrent_interpreted() -> Any:
    return recurrent(torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_public_op_on_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("DNSP_DELTA_RULE", "triton")  # and as it was again
    check_recurrent(*recurrent(dtype, "cuda"), dtype)


def check_recurrent(names: list[str], errors: dict[str, float], untouched: bool, dtype: torch.dtype) -> None:
    assert names == ["delta_step_kernel"] * 6 and untouched
    assert errors["o"] < TOLERANCE[dtype] and errors["state"] < STATE, errors


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("use", ["conv", "delta", "gated, slots", "K = 256"])
def test_compiles_without_spills(use, capability):
    K = 256 if use == "K = 256" else 128
    gated = use == "gated, slots"
    kernel = triton_decode.conv_step_kernel if use == "conv" else triton_decode.delta_step_kernel
    columns = triton_decode.COLUMNS
    constants = {
        **{"D": 8192, "W": 4, "BD": triton_decode.CHANNELS, "SILU": True, "HAS_BIAS": False},
        **{"H": 16, "G": 2, "K": K, "V": K, "BK": K, "BV": columns, "ERASE": True, "HAS_G": True, "PREVIOUS": False},
        **{"NORM": True, "GATES": gated, "HAS_SLOTS": gated},
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    fp32 = ("state", "A_log", "dt_bias", *(() if gated else ("g", "beta")))
    types, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.startswith("s") and name.endswith("b") or name == "scale":
            types[name] = "fp32" if name == "scale" else "i32"
        else:
            types[name] = "*i64" if name == "slots" else "*fp32" if name in fp32 else "*bf16"
            aligned[(i,)] = [["tt.divisibility", 16]]
    warps = 1 if use == "conv" else triton_decode.warps(K, columns)
    binary = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    assert Compiled.of(binary.asm["cubin"]).spilled == 0


def layer(device: str, B: int = 2, H: int = 2, HV: int = 4, D: int = 128) -> tuple[list[Tensor], dict[str, Tensor]]:
    """mixed, a, b of 20 tokens, the tail, the state; and the parameters."""
    generator = torch.Generator(device).manual_seed(0)
    channels = (2 * H + HV) * D

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    tokens = [random(20, B, width) for width in (channels, HV, HV)]
    memories = [random(B, 3, channels), random(B, HV, D, D, dtype=torch.float32)]
    parameters = {"weight_DW": random(channels, 4), "A_log_H": random(HV), "dt_bias_H": random(HV)}
    return [*tokens, *memories], parameters


def test_what_has_no_kernel_is_refused():
    def step(K: int = 16, V: int = 16, q: torch.dtype = torch.float32, state: Tensor | None = None, **options) -> None:
        state = torch.zeros(2, 2, K, V) if state is None else state
        gates = torch.zeros(2, 2)
        delta_step(*(torch.zeros(2, 2, w, dtype=q) for w in (K, K, V)), gates, gates, state, **options)

    with pytest.raises(ValueError, match=r"K=512.*1 to 256.*backend='torch'"):
        step(K=512, backend="triton")
    with pytest.raises(TypeError, match=r"q is torch.float64.*backend='torch'"):
        step(q=torch.float64, backend="triton")
    with pytest.raises(TypeError, match=r"state is torch.float64.*backend='torch'"):
        step(state=torch.zeros(2, 2, 16, 16, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match=r"state has strides.*contiguous"):
        step(state=torch.zeros(2, 2, 16, 16).mT, backend="triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        step(backend="triton")
    with pytest.raises(ValueError, match="backend='cuda'"):
        step(backend="cuda")
    with pytest.raises(ValueError, match=r"W=9.*1 to 8"):
        conv_step(torch.zeros(2, 5), torch.zeros(2, 8, 5), torch.zeros(5, 9), backend="triton")
    (mixed, a, b, tail, state), parameters = layer("cpu", D=16)
    with pytest.raises(ValueError, match=r"mixed\[2, 100\] must be \[B, 2 H K \+ HV V\].*\[4, 16, 16\]"):
        gated_delta_step(mixed[0][:, :100], a[0], b[0], tail, state, **parameters)
    with pytest.raises(ValueError, match=r"A_log\[3\].*\[4\]"):
        gated_delta_step(mixed[0], a[0], b[0], tail, state, **parameters | {"A_log_H": torch.zeros(3)})


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*INTERPRETED, *GPU_DELTA, *GPU_GATED])
def test_on_gpu(name, dtype):
    check({name: measure(name, dtype, "cuda")}, dtype)


@pytest.mark.gpu
def test_graph_has_the_bits_of_eager_steps():
    """20 tokens through one captured step, in place, and nothing of it waits for the device."""
    (mixed, a, b, tail, state), parameters = layer("cuda")
    expected_tail, expected_state = tail.clone(), state.clone()
    gated_delta_step(mixed[0], a[0], b[0], tail.clone(), state.clone(), **parameters)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [
            gated_delta_step(mixed[t], a[t], b[t], expected_tail, expected_state, **parameters) for t in range(20)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    now = [x[0].clone() for x in (mixed, a, b)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_delta_step(*now, tail, state, **parameters)
    for t in range(20):
        for held, x in zip(now, (mixed, a, b), strict=True):
            held.copy_(x[t])
        graph.replay()
        assert torch.equal(o, expected[t])
    assert torch.equal(tail, expected_tail) and torch.equal(state, expected_state)


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_batch():
    (mixed, a, b, tail, state), parameters = layer("cuda", B=5)
    alone = [x.clone() for x in (tail, state)]
    o = gated_delta_step(mixed[0], a[0], b[0], tail, state, **parameters)
    for row in range(5):
        part = slice(row, row + 1)
        memories = [x[part] for x in alone]
        one = gated_delta_step(mixed[0][part], a[0][part], b[0][part], *memories, **parameters)
        assert torch.equal(one, o[part])
        assert torch.equal(memories[0], tail[part]) and torch.equal(memories[1], state[part])


@pytest.mark.gpu
def test_what_is_not_finite_stays_in_its_heads():
    (mixed, a, b, tail, state), parameters = layer("cuda", B=2, H=2, HV=4)
    clean = gated_delta_step(mixed[0], a[0], b[0], tail.clone(), state.clone(), **parameters)
    broken = mixed[0].clone()
    broken[1, 2 * 128 + 5] = torch.nan  # a key of row 1, head 0: its two value heads
    b[0][0, 3] = torch.inf  # a write strength of one: finite
    o = gated_delta_step(broken, a[0], b[0], tail, state, **parameters)
    assert o[1, :2].isnan().all() and state[1, :2].isnan().any() and state[1, 2:].isfinite().all()
    assert torch.equal(o[1, 2:], clean[1, 2:]) and torch.equal(o[0, :3], clean[0, :3])
    assert o[0, 3].isfinite().all()


@pytest.mark.gpu
def test_beyond_32_bit_offsets():
    """A table of more than 2^31 numbers: its last slot gives the bits of a table of its own."""
    (mixed, a, b, tail, state), parameters = layer("cuda", B=1, H=16, HV=32)
    rows = 2**31 // state.numel() + 2
    if torch.cuda.mem_get_info()[0] < 6 * rows * state.numel():
        pytest.skip(f"needs {6 * rows * state.numel() / 2**30:.0f} GiB of the GPU")
    table = torch.zeros(rows, *state.shape[1:], device="cuda")
    tails = torch.zeros(rows, *tail.shape[1:], device="cuda", dtype=tail.dtype)
    table[-1], tails[-1] = state[0], tail[0]
    slots = torch.full((1,), rows - 1, device="cuda")
    o = gated_delta_step(mixed[0], a[0], b[0], tails, table, slots_B=slots, **parameters)
    assert torch.equal(o, gated_delta_step(mixed[0], a[0], b[0], tail, state, **parameters))
    assert torch.equal(table[-1], state[0]) and torch.equal(tails[-1], tail[0])
