"""The Triton kernels on the shapes of all backends (:data:`tests.kernels.cases.SHAPES`), interpreted and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels import chunk_triton
from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.kernels.reference import Rule
from dnsp.kernels.scan import LocalScan, fold, reverse_fold
from dnsp.kernels.segments import Inputs, Segments
from dnsp.kernels.triton_gradients import gates_kernel
from tests.kernels.cases import NOT_INTERPRETED, SHAPES, chunked, errors, truth
from tests.kernels.interpreter import Interpreter

# |error| / |truth|, per tensor, in the worst row of the batch: of outputs and states, of gradients.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2)}
INTERPRETED = 5e-6  # fp32, everything

SLOW = {"documents", "decays", "previous, documents", "beta over 2"}


def assert_right(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    outputs, gradients = TOLERANCE[dtype]
    limits = {name: outputs if name in ("o", "final") else gradients for name in found}
    smallest = 2.0**-14 if dtype == torch.float16 else 0.0  # fp16 holds no smaller normal number
    wrong = {name: f"{e:.2e}" for name, e in errors(found, exact, smallest).items() if not e < limits[name]}
    assert not wrong, wrong


def interpreted_errors(name: str) -> dict[str, float]:
    case, tokens = SHAPES[name]
    return errors(chunked(case, torch.float32, tokens, backend="triton"), truth(case))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SHAPES if n not in NOT_INTERPRETED],
)
def test_interpreted(interpreter: Interpreter, name: str) -> None:
    found = interpreter("test_triton:interpreted_errors", name)
    assert max(found.values()) < INTERPRETED, found


def parts_in_halves() -> dict[str, float]:
    """dg and dbeta from parts as the kernel for Hopper leaves them, over those from the same sums whole."""
    B, H, G, NC, T = 3, 3, 2, 3, 150  # rows that are no multiple of a program's
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    rows, through, whole = random(B * H * G, NC, 8, 64), random(B * H * G, NC), random(B * H * G, NC, 6, 64)
    quarters, share = random(4, 1).softmax(0), random(64)
    halves = torch.stack([whole[:, :, 1:5] * share, whole[:, :, 1:5] * (1 - share)], -1).flatten(2)
    split = torch.cat(
        [(whole[:, :, :1] * quarters).flatten(2), halves, whole[:, :, 5, :1] * random(32).softmax(0)], -1
    )
    split = torch.nn.functional.pad(split, (0, 896 - split.shape[-1]))
    constants = {"HV": H * G, "HAS_G": True, "HAS_DOC": False, "ERASE": True, "PREVIOUS": False, "TOGETHER": 8}
    exact, found = (torch.zeros(2, B, T, H * G) for _ in range(2))
    gates_kernel[(NC, 3)](rows, through, whole, *exact, T, NC, 0, 1, B * H * G, **constants, HALVES=False)
    for j in range(G):
        parts = split[j::G].contiguous()
        gates_kernel[(NC, 2)](rows, through, parts, *found, T, NC, j, G, B * H, **constants, HALVES=True)
    return {n: ((a - b).norm() / b.norm()).item() for n, a, b in zip(("dg", "dbeta"), found, exact, strict=True)}


def test_parts_in_halves(interpreter: Interpreter) -> None:
    found = interpreter("test_triton:parts_in_halves")
    assert max(found.values()) < INTERPRETED, found


def test_what_has_no_kernel_is_refused():
    def make(K: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        q, k, v = (torch.zeros(1, 64, 1, width, dtype=dtype) for width in (K, K, V))
        return q, k, v, torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)

    with pytest.raises(ValueError, match=r"K=48.*\(16, 32, 64, 128, 256\).*backend='torch', or DNSP_DELTA_RULE=torch"):
        chunk_gated_delta_rule(*make(48, 16), backend="triton")
    with pytest.raises(ValueError, match=r"V=24.*backend='torch'"):
        chunk_gated_delta_rule(*make(16, 24), backend="triton")
    with pytest.raises(TypeError, match=r"float64.*backend='torch', or DNSP_DELTA_RULE=torch"):
        chunk_gated_delta_rule(*make(16, 16, torch.float64), backend="triton")
    for long, expected in (((1, 65535 * 64 + 1, 1), r"4194240 tokens a row"), ((4, 64, 16384), r"65535 value heads")):
        inputs = [torch.zeros(1, 1, 1, 16).expand(*long, 16)] * 3 + [torch.zeros(1, 1, 1).expand(*long)] * 2
        with pytest.raises(ValueError, match=expected + r".*parallel.sequence"):
            chunk_gated_delta_rule(*inputs, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda'"):
        chunk_gated_delta_rule(*make(16, 16), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        chunk_gated_delta_rule(*make(16, 16), backend="triton")


def test_a_first_length_in_a_capture_is_refused(monkeypatch):
    """Its table of segments would be copied to the GPU, which a capture must not wait for."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"of this kind \(0, 4096, 8192, 12288, \.\.\.\).*once before the capture"):
        chunk_triton._on_device(tuple(range(0, 32768, 4096)), torch.int64, torch.device("cuda", 0))


# On a GPU.

@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_on_gpu(name):
    # With beta over 2 values grow by a power of the length: no rounded operands there.
    check_on_gpu(name, torch.float32 if name == "beta over 2" else torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["documents", "previous", "no decay"])
def test_dtypes_on_gpu(name, dtype):
    check_on_gpu(name, dtype)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(NOT_INTERPRETED))
def test_fp32_on_gpu(name):
    """Minutes of compilation: three products for one."""
    check_on_gpu(name, torch.float32)


def check_on_gpu(name: str, dtype: torch.dtype) -> None:
    case, tokens = SHAPES[name]
    found = chunked(case, dtype, tokens, "cuda", "triton")
    assert_right({name: x.cpu() for name, x in found.items()}, truth(case, dtype), dtype)


def random(T: int, H: int = 2, HV: int = 4, D: int = 128, decay: float = -1e-4) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, T, h, D, device="cuda", generator=generator, dtype=torch.bfloat16) for h in (H, H, HV))
    return [q, k, v, torch.full((1, T, HV), decay, device="cuda"), torch.rand(1, T, HV, device="cuda")]


def with_gradients(inputs: list[Tensor], do: Tensor, **options: object) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, _ = chunk_gated_delta_rule(*leaves, use_qk_l2norm_in_kernel=True, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("decay", [-1e-4, -20.0])
def test_long_on_gpu(decay):
    inputs = random(131072, decay=decay)
    do = torch.randn_like(inputs[2])
    found = with_gradients(inputs, do, segment_tokens=4096)
    exact = with_gradients([x.double() for x in inputs], do.double(), backend="torch")
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), found, exact, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < TOLERANCE[torch.bfloat16][name != "o"], (name, error)


@pytest.mark.gpu
def test_bits_on_gpu():
    """Two runs, and a segment alone or among others: the same bits."""
    inputs = random(2048 + 40, decay=-0.05)
    do = torch.randn_like(inputs[2])
    first, second = (with_gradients(inputs, do, segment_tokens=512) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    T, tokens = 2088, 512
    starts = tuple(range(0, T, tokens))

    def passes(held: tuple[int, ...]) -> tuple[Tensor, ...]:
        part = slice(held[0], min(held[-1] + tokens, T))
        q, k, v, g, beta = (x[:, part] for x in inputs)
        x = Inputs(q, k, v, g, beta, None, Segments(tokens, held, T), 0.1, Rule(), True)
        p = chunk_triton.prepare(x)
        yes = (True,) * len(held)
        M, U, forgets = chunk_triton.summarise(p, yes, yes)
        state = torch.ones_like(U) / 8
        D = chunk_triton.summarise_backward(p, do[:, part], yes)
        o, grads = chunk_triton.apply(p, state), chunk_triton.apply_backward(p, state, do[:, part], lambda: state)
        return M, U, D, forgets, o, grads.q, grads.k, grads.v, grads.g, grads.beta

    whole = passes(starts)
    alone = [passes((start,)) for start in starts]
    for i, a in enumerate(whole):
        assert torch.equal(a, torch.cat([one[i] for one in alone], dim=0 if i < 4 else 1)), i


@pytest.mark.gpu
@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("forgetful", [False, True])
def test_fold_on_gpu(has_first, forgetful):
    """All segments in one launch, or one by one: the same bits, and those of the products in fp64."""
    N, B, HV, K, V = 5, 2, 3, 128, 64
    M, U, first = (torch.randn(*shape, device="cuda") for shape in ((N, B, HV, K, K), (N, B, HV, K, V), (B, HV, K, V)))
    M, continues = M / K**0.5, torch.rand(N, B, device="cuda") > 0.3
    M[:, 1][~continues[:, 1]] = torch.nan  # never read
    flags = (torch.rand(N, B, HV, device="cuda") < torch.tensor([1.0, 0.5, 0.0], device="cuda")).int()
    flags[:, 1][~continues[:, 1]] = 0  # nor these, where it is not told
    zero = (flags != 0)[..., None, None] & forgetful
    M, read, forgets = M.masked_fill(zero, 0.0), M.masked_fill(zero, torch.nan), flags if forgetful else None
    start = first if has_first else None
    for together, alone, order in (
        (LocalScan().forward(read, U, continues, forgets, start, True)(), fold, range(N)),
        (LocalScan().reverse(read, U, continues, forgets, start, True, True)(), reverse_fold, reversed(range(N))),
    ):
        state, exact = start, None if start is None else start.double()
        for n in order:
            if state is not None:
                assert torch.equal(together[0][n], state)
            state = alone(M[n], U[n], state, continues[n])
            exact = alone(M[n].double(), U[n].double(), exact, continues[n])
        assert torch.equal(together[1], state)
        assert (state.double() - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.gpu
def test_a_scale_that_is_no_float():
    inputs = random(256)
    do = torch.randn_like(inputs[2])
    once, again = (with_gradients(inputs, do, scale=scale) for scale in (1, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.gpu
def test_no_synchronisation_and_graph_capture():
    inputs = random(1000)
    bounds = torch.tensor([0, 100, 555, 1000], device="cuda", dtype=torch.int32)
    do = torch.randn_like(inputs[2])
    expected = with_gradients(inputs, do, cu_seqlens=bounds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(inputs, do, cu_seqlens=bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = with_gradients(inputs, do, cu_seqlens=bounds)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_bits_repeat_while_memory_is_busy(documents: bool) -> None:
    """Copies on another stream make the kernels' own late: what overtakes one of them shows in the bits."""
    inputs = random(2**15, H=16, HV=32)
    starts = torch.tensor([0, 700, 705, *range(3000, 2**15, 3001), 2**15], device="cuda", dtype=torch.int32)
    bounds = {"cu_seqlens": starts} if documents else {}
    do = torch.randn_like(inputs[2])
    aside, block = torch.cuda.Stream(), torch.empty(2**30, dtype=torch.uint8, device="cuda")
    expected = with_gradients(inputs, do, **bounds)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(aside):
            for _ in range(8):
                block.view(2, -1)[0].copy_(block.view(2, -1)[1])
        found = with_gradients(inputs, do, **bounds)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_beyond_32_bit_offsets():
    """2^32 elements of v: the last tokens are those of a run restarted from the state before them."""
    inputs = random(2**20, H=16, HV=32, decay=-0.02)
    with torch.no_grad():
        o, _ = chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True, segment_tokens=2**17)
        before, after = ([x[:, part] for x in inputs] for part in (slice(0, 2**20 - 4096), slice(2**20 - 4096, None)))
        _, state = chunk_gated_delta_rule(
            *before, output_final_state=True, use_qk_l2norm_in_kernel=True, segment_tokens=2**17
        )
        last, _ = chunk_gated_delta_rule(*after, initial_state=state, use_qk_l2norm_in_kernel=True)
        error = (o[:, -4096:].float() - last.float()).norm() / last.float().norm()
    assert error < 5e-3


@pytest.mark.gpu
def test_gradients_beyond_32_bit_offsets():
    """The same of the last tokens' gradients, in equal segments and so with equal bits."""
    torch.cuda.empty_cache()  # of the tests before
    if torch.cuda.mem_get_info()[0] < 100 * 2**30:
        pytest.skip("needs 100 GiB of the GPU")
    tokens, last = 2**20, 4096
    inputs = random(tokens, H=16, HV=32, decay=-0.02)
    do = torch.randn(1, last, 32, 128, device="cuda").bfloat16()
    found = with_gradients(inputs, F.pad(do, (0, 0, 0, 0, tokens - last, 0)), segment_tokens=last)
    found = [x[:, -last:].clone() for x in found]
    before, after = ([x[:, part] for x in inputs] for part in (slice(-last), slice(-last, None)))
    with torch.no_grad():
        _, state = chunk_gated_delta_rule(
            *before, output_final_state=True, use_qk_l2norm_in_kernel=True, segment_tokens=last
        )
    expected = with_gradients(after, do, initial_state=state, segment_tokens=last)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
