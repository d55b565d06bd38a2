"""Launches as operators: schemas and fakes that say what kernels do, and torch.compile and policies that see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dnsp.kernels import operators
from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.decode import gated_delta_step
from dnsp.kernels.delta_rule import chunk_gated_delta_rule, delta_rule
from dnsp.kernels.norm import gated_rms_norm
from dnsp.kernels.scan import LocalScan
from dnsp.kernels.segments import Inputs, Segments
from dnsp.kernels.variants import DELTA, FORGET_GATE
from tests.kernels.interpreter import Interpreter

dnsp = torch.ops.dnsp
DEVICE, DTYPE = "cpu", torch.float32  # of operands; on a GPU bf16 at widths that Hopper has kernels of its own for
T, H, HV, K, V = 70, 1, 2, 16, 32


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def inputs() -> dict[str, Tensor]:
    made = {"q": drawn(1, T, H, K), "k": drawn(1, T, H, K, scale=0.3), "v": drawn(1, T, HV, V)}
    made = {name: x.to(DTYPE) for name, x in made.items()}
    return made | {"g": -drawn(1, T, HV).abs(), "beta": drawn(1, T, HV).sigmoid()}


# Each operator on its own: (operator, arguments) for opcheck.


def passes(documents: bool, decay: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """The arguments that the passes of a call have, one after another."""
    given = inputs()
    doc = torch.zeros(1, T, dtype=torch.int32, device=DEVICE) if documents else None
    if doc is not None:
        doc[0, 66:] = 66
    x = Inputs(
        given["q"], given["k"], given["v"].transpose(1, 2).contiguous().transpose(1, 2), given["g"] if decay else None,
        given["beta"], doc, Segments(64, (0, 64), T), 0.2, DELTA if decay else FORGET_GATE, True,
    )  # fmt: skip
    found: list[tuple[Any, tuple[Any, ...]]] = []

    def noted(self: Any, operator: Any, *own: Any) -> Any:
        def keep(op: Any, *args: Any) -> Any:
            found.append((op, args))
            return op(*args)

        return call(self, partial(keep, operator), *own)

    call = operators.Dispatched.call
    operators.Dispatched.call = noted  # type: ignore[method-assign]
    try:
        p = operators.prepare(x)
        yes = True, True
        M, U, forgets = operators.summarise(p, yes, yes)
        do = torch.ones_like(operators.apply(p, U))
        D = operators.summarise_backward(p, do, yes)
        operators.apply_backward(p, U, do, lambda: D)
    finally:
        operators.Dispatched.call = call  # type: ignore[method-assign]
    assert len(found) == 5
    return [*found, (dnsp.fold.default, (M, U, None, None, forgets, 1, False))]


def layers() -> list[tuple[Any, tuple[Any, ...]]]:
    x, weight, bias = drawn(2, 9, 24)[..., 8:], drawn(16, 3), drawn(16)
    doc = torch.tensor([[0] * 5 + [5] * 4] * 2, dtype=torch.int32, device=DEVICE)
    halo, dy = drawn(2, 2, 16), drawn(2, 9, 16)
    wide, gate, scale = drawn(2, 5, 3, 32), drawn(2, 5, 3, 64)[..., 32:], drawn(32)
    return [
        (dnsp.conv.default, (x, weight, None, None, doc, 0, True)),
        (dnsp.conv.default, (x, weight, bias, halo, None, 7, False)),
        (dnsp.conv_backward.default, (dy, x, weight, None, None, doc, 0, True)),
        (dnsp.conv_backward.default, (dy, x, weight, bias, halo, None, 7, False)),
        (dnsp.gated_norm.default, (wide, gate, scale, 1e-6)),
        (dnsp.gated_norm_backward.default, (wide, wide, gate, scale, 1e-6)),
    ]


def steps() -> list[tuple[Any, tuple[Any, ...]]]:
    slots = torch.tensor([2, -1], device=DEVICE)
    q, k, v, state = drawn(2, H, K), drawn(2, H, K), drawn(2, HV, V), drawn(3, HV, K, V)
    gates, by_head = drawn(2, HV), drawn(HV)
    rest = 0.2, True, False, True
    return [
        (dnsp.conv_step.default, (drawn(2, 16), drawn(3, 2, 16), drawn(16, 3), None, True, slots)),
        (dnsp.delta_step.default, (q, k, v, gates, gates, state, *rest, slots, by_head, by_head)),
        (dnsp.delta_step.default, (q, k, v, None, gates, state[:2].clone(), *rest, None, None, None)),
    ]


def check_operators(made: Callable[[], list[tuple[Any, tuple[Any, ...]]]]) -> None:
    for operator, args in made():
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


# torch.compile: one graph, in which the operators are, and the bits of the plain call.


def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
    options = {"segment_tokens": 64, "use_qk_l2norm_in_kernel": True, "backend": "triton"} | options
    o, final = chunk_gated_delta_rule(q * 1.0, k, v, g, beta, **options)
    return o * 2.0 if final is None else (o * 2.0).sum() + final.square().sum()


def layer(x: Tensor, gate: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    mixed = causal_conv1d(x, weight, backend="triton")
    return gated_rms_norm(mixed.unflatten(-1, (2, 8)), gate, scale, backend="triton")


def decoded(mixed: Tensor, a: Tensor, tail: Tensor, state: Tensor, weight: Tensor, head: Tensor) -> Tensor:
    return gated_delta_step(
        mixed, a, a, tail, state, weight_DW=weight, A_log_H=head, dt_bias_H=head, backend="triton"
    ).square()


def results(fn: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


class Seen:
    """A backend that notes the operators of its graphs, forward and backward, and runs them as they are."""

    def __init__(self) -> None:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        self.boxed = make_boxed_func
        self.operators: Counter[str] = Counter()
        self.backend = aot_autograd(fw_compiler=self.note, bw_compiler=self.note)

    def note(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        for node in graph.graph.nodes:
            if "dnsp." in str(node.target):
                self.operators[str(node.target).split(".")[1]] += 1
        return self.boxed(graph.forward)


DELTA_RULE = ("prepare", "summarise", "apply", "summarise_backward", "apply_backward")
LAYER = ("conv", "conv_backward", "gated_norm", "gated_norm_backward")
COMPILED: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "delta rule": lambda: rule,
    "states": lambda: partial(rule, output_final_state=True, initial_state=drawn(1, HV, K, V)),
    "documents": lambda: partial(rule, cu_seqlens=torch.tensor([0, 30, 66, T], device=DEVICE)),
    "layer": lambda: layer,
}


def tensors_of(name: str) -> list[Tensor]:
    if name == "layer":
        return [drawn(2, 9, 16), drawn(2, 9, 2, 8), drawn(16, 3), drawn(8)]
    return list(inputs().values())


def check_compiled(name: str) -> None:
    fn, tensors, seen = COMPILED[name](), tensors_of(name), Seen()
    # The fold of a CPU's states is torch's own.
    folds = 2 if DEVICE == "cuda" and name != "layer" else 0
    expected = Counter(LAYER if name == "layer" else DELTA_RULE) + Counter(fold=folds)
    plain = results(fn, tensors)
    torch._dynamo.reset()
    compiled = results(torch.compile(fn, backend=seen.backend, fullgraph=True), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    assert seen.operators == expected, seen.operators


def check_decoding() -> None:
    """Memories that are changed in place."""
    given = drawn(2, 2 * H * K + HV * V), drawn(2, HV)
    fixed = drawn(2 * H * K + HV * V, 3), drawn(HV)
    found = []
    torch._dynamo.reset()
    for step in (decoded, torch.compile(decoded, backend="aot_eager", fullgraph=True)):
        tail, state = drawn(2, 2, 2 * H * K + HV * V), drawn(2, HV, K, V)
        outputs = [step(*given, tail, state, *fixed) for _ in range(2)]
        found.append([*outputs, tail, state])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Elsewhere:
    """A scan that is not local, as parallel's: what it does is no operator's."""

    here = False

    def __init__(self) -> None:
        self.compiling: list[bool] = []

    def forward(self, *args: Any) -> Any:
        self.compiling.append(torch.compiler.is_compiling())
        return LocalScan().forward(*args)

    def reverse(self, *args: Any) -> Any:
        return LocalScan().reverse(*args)


def check_a_scan_that_communicates() -> None:
    """It runs, and is not traced: one break between two graphs."""
    scan, graphs = Elsewhere(), []

    def fn(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        segments = Segments(64, (0, 64), T)
        return delta_rule(q * 1.0, k, v, g, beta, scale=0.2, segments=segments, scan=scan, backend="triton")[0] * 2.0

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    tensors = tensors_of("delta rule")
    plain = fn(*tensors)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend)
    assert all(torch.equal(plain, compiled(*tensors)) for _ in range(2))
    assert scan.compiling == [False] * 3 and len(graphs) == 2


# Selective activation checkpointing.


def check_policy() -> None:
    """What a policy names is kept, all else is made again."""
    ran: Counter[str] = Counter()

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "dnsp":
                ran[func._schema.name.removeprefix("dnsp::")] += 1
            return func(*args, **(kwargs or {}))

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in (dnsp.apply.default, dnsp.summarise.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*tensors: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(rule, *tensors, use_reentrant=False, context_fn=contexts)

    tensors = tensors_of("delta rule")
    plain = results(rule, tensors)
    with Counted():
        found = results(checkpointed, tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    folds = {"fold": 3} if DEVICE == "cuda" else {}
    assert ran == Counter(DELTA_RULE) + Counter(prepare=1) + Counter(folds), ran


CHECKS: dict[str, Callable[[], None]] = {
    "operators: decay, documents": partial(check_operators, partial(passes, True, True)),
    "operators: no decay": partial(check_operators, partial(passes, False, False)),
    "operators: layers": partial(check_operators, layers),
    "operators: steps": partial(check_operators, steps),
    **{f"compile: {name}": partial(check_compiled, name) for name in COMPILED},
    "compile: decoding": check_decoding,
    "compile: a scan that communicates": check_a_scan_that_communicates,
    "policy": check_policy,
}


SLOW = {"operators: decay, documents", "compile: states", "compile: documents"}


def check(name: str) -> None:
    CHECKS[name]()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CHECKS])
def test_interpreted(interpreter: Interpreter, name: str) -> None:
    interpreter("test_operators:check", name)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"DEVICE": "cuda", "DTYPE": torch.bfloat16, "K": 128, "V": 128}.items():
        monkeypatch.setitem(globals(), variable, value)
    CHECKS[name]()


def test_nobody_follows_a_plain_call() -> None:
    x = torch.zeros(1)
    assert not operators.dispatched(x) and not operators.dispatched(torch.nn.Parameter(x))
    with torch._subclasses.FakeTensorMode():
        assert operators.dispatched(torch.zeros(1))
