"""Inputs for the delta rule in the regimes that break implementations, its fp64 truth, and how the two are compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels.backend import Backend
from dnsp.kernels.delta_rule import Segments, delta_rule
from dnsp.kernels.reference import Rule, recurrence
from dnsp.kernels.scan import LocalScan, Scan

INPUTS = ("q", "k", "v", "g", "beta", "initial")

# Log decays a token; a row of the batch each.
DECAYS = {
    "none": lambda T, u: torch.zeros_like(u),
    "weak": lambda T, u: -0.1 * u,
    "strong": lambda T, u: torch.full_like(u, -20.0),
    "any": lambda T, u: -20.0 * u,
    # 32 tokens at -20, then 32 at -0.01: a running sum in fp32 loses the weak ones behind the strong
    "mixed": lambda T, u: torch.where((torch.arange(T) // 32 % 2 == 0)[:, None], -20.0, -0.01).expand_as(u),
    "spikes": lambda T, u: torch.where(u > 0.9, -20.0 * u, -0.02 * u),
}


@dataclass(frozen=True)
class Case:
    """One call of the rule; rows of the batch differ in decay and documents."""

    T: int
    decays: tuple[str, ...] = tuple(DECAYS)
    starts: tuple[tuple[int, ...], ...] | None = None  # of each row's documents; None: one document
    H: int = 1
    HV: int = 2
    K: int = 16
    V: int = 12
    key_norm: float = 1.0  # |k|^2 is its square
    beta: tuple[float, float] = (0.0, 1.0)
    g: bool = True
    rule: Rule = field(default_factory=Rule)
    l2norm: bool = False
    initial: bool = False
    final: bool = False
    scale: float = 0.25
    seed: int = 0

    @property
    def B(self) -> int:
        return len(self.decays)

    @property
    def names(self) -> list[str]:
        return [n for n in INPUTS if (n != "g" or self.g) and (n != "initial" or self.initial)]

    def doc_start(self) -> Tensor | None:
        """``[B, T]``. With an initial state the first document goes on from it."""
        if self.starts is None:
            return None
        bounds = torch.zeros(self.B, self.T, dtype=torch.int64)
        for row, starts in enumerate(self.starts):
            for s in starts:
                bounds[row, s:] = s
        return torch.where(bounds == 0, -1 if self.initial else 0, bounds).to(torch.int32)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """fp32 numbers, or those rounded to bf16, so that every dtype above has the same truth."""
        generator = torch.Generator().manual_seed(self.seed)
        B, T, H, HV, K, V = self.B, self.T, self.H, self.HV, self.K, self.V
        keys = F.normalize(torch.randn(B, T, H, K, generator=generator), dim=-1)
        uniform = torch.rand(B, T, HV, generator=generator)
        values = {
            "q": torch.randn(B, T, H, K, generator=generator),
            "k": keys * self.key_norm,
            "v": torch.randn(B, T, HV, V, generator=generator),
            "g": torch.stack([DECAYS[name](T, u) for name, u in zip(self.decays, uniform, strict=True)]),
            "beta": self.beta[0] + (self.beta[1] - self.beta[0]) * torch.rand(B, T, HV, generator=generator),
            "initial": torch.randn(B, HV, K, V, generator=generator),
        }
        return {name: values[name].to(device, dtype).requires_grad_() for name in self.names}

    def output_gradients(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        B, T, HV, K, V = self.B, self.T, self.HV, self.K, self.V
        return torch.randn(B, T, HV, V, generator=generator), torch.randn(B, HV, K, V, generator=generator)

    def results(self, o: Tensor, final: Tensor | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, final state and the gradient of every input."""
        do, dfinal = self.output_gradients()
        outputs, gradients = [o], [do.to(o)]
        if self.final:
            assert final is not None
            outputs, gradients = [o, final], [do.to(o), dfinal.to(final)]
        grads = torch.autograd.grad(outputs, list(inputs.values()), gradients)
        found = {"o": o.detach()} | {"d" + name: grad for name, grad in zip(inputs, grads, strict=True)}
        return found | ({"final": final.detach()} if self.final and final is not None else {})


WEAK, PACKED = ("weak", "mixed"), ((0, 33, 97, 150), (0, 1, 2, 64))
# What every backend computes, torch, Triton's interpreter and a GPU, each in segments of so many tokens (None: one).
SHAPES: dict[str, tuple[Case, int | None]] = {
    "one chunk": (Case(50, decays=("weak",), HV=1, V=16), None),
    "previous": (Case(130, decays=WEAK, V=16, rule=Rule(error_decay="previous")), 64),
    "no erase": (Case(130, decays=("weak", "any"), V=16, rule=Rule(erase=False)), 64),
    "no decay": (Case(100, decays=("none",), V=16, g=False, l2norm=True, initial=True, final=True), 128),
    "neither decay nor erase": (  # linear attention, whose sum of keys is a case of one value column
        Case(100, decays=("none",), V=1, HV=1, g=False, rule=Rule(erase=False), starts=((0, 33, 70),)),
        64,
    ),
    "two halves of K": (Case(70, decays=("weak",), K=128, V=32, H=1, HV=1, l2norm=True), 64),
    "documents": (Case(200, decays=WEAK, V=32, K=32, starts=PACKED, initial=True, final=True, l2norm=True), 64),
    "decays": (Case(200, decays=("weak", "strong", "mixed"), H=2, HV=4, V=32), 64),
    "previous, documents": (
        Case(200, decays=WEAK, V=16, starts=PACKED, rule=Rule(error_decay="previous"), initial=True, final=True),
        64,
    ),
    "beta over 2": (Case(130, decays=("spikes",), V=16, beta=(2.0, 2.4)), 64),
    "grouped heads": (Case(400, decays=("weak", "strong", "mixed", "any"), H=2, HV=4, K=64, V=128, l2norm=True), 128),
    "K over V": (Case(300, decays=WEAK, H=1, HV=2, K=128, V=32), 128),
    "wide": (Case(300, decays=WEAK, H=1, HV=1, K=256, V=256, l2norm=True), 128),
    "normaliser": (Case(300, decays=("none",), K=16, V=1, HV=1, g=False, rule=Rule(erase=False), initial=True), 128),
}
NOT_INTERPRETED = {"grouped heads", "K over V", "wide", "normaliser"}  # minutes there


@cache
def truth(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The recurrence in fp64, on inputs that were rounded to ``dtype``."""
    inputs = {n: x.detach().double().requires_grad_() for n, x in case.inputs(dtype).items()}
    o, final = recurrence(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs.get("g"),
        inputs["beta"],
        scale=case.scale,
        doc_start_BT=case.doc_start(),
        initial_state_BHKV=inputs.get("initial"),
        rule=case.rule,
        normalise_qk=case.l2norm,
    )
    return case.results(o, final, inputs)


def segments(case: Case, tokens: int | None) -> Segments:
    """The whole sequence in segments of ``tokens``; None: one."""
    tokens = -(-case.T // 64) * 64 if tokens is None else tokens
    starts = tuple(range(0, case.T, tokens))
    doc_start = case.doc_start()
    if doc_start is None:
        return Segments(tokens, starts, case.T)
    ends = [min(s + tokens, case.T) - 1 for s in starts]
    continues = (doc_start[:, ends] < torch.tensor(starts)).T
    return Segments(tokens, starts, case.T, continues, tuple(continues.any(1).tolist()))


def call(
    case: Case,
    inputs: dict[str, Tensor],
    part: Segments,
    scan: Scan,
    local: slice = slice(None),
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The rule on the tokens ``local`` of the case, which are the segments ``part``, on the device of its inputs."""
    doc_start, device = case.doc_start(), inputs["q"].device
    if part.continues_NB is not None:
        part = replace(part, continues_NB=part.continues_NB.to(device))
    return delta_rule(
        inputs["q"][:, local],
        inputs["k"][:, local],
        inputs["v"][:, local],
        inputs["g"][:, local] if case.g else None,
        inputs["beta"][:, local],
        scale=case.scale,
        segments=part,
        scan=scan,
        doc_start_BT=None if doc_start is None else doc_start[:, local].to(device),
        initial_state_BHKV=inputs.get("initial"),
        output_final_state=case.final,
        rule=case.rule,
        normalise_qk=case.l2norm,
        backend=backend,
    )


def chunked(
    case: Case, dtype: torch.dtype, tokens: int | None = None, device: str = "cpu", backend: Backend | None = None
) -> dict[str, Tensor]:
    """Outputs, final state and gradients of the chunked form."""
    inputs = case.inputs(dtype, device)
    return case.results(*call(case, inputs, segments(case, tokens), LocalScan(), backend=backend), inputs)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor], smallest: float = 0.0) -> dict[str, float]:
    """``|error| / |truth|`` of each tensor in the row of the batch where it is worst.

    Where the truth is exactly zero, so must be what was found. A row that is smaller than ``smallest`` throughout
    counts as if it were as large.
    """
    assert found.keys() == exact.keys()
    worst = {}
    for name, b in exact.items():
        a = found[name].double()
        assert a.shape == b.shape, name
        assert not a[b == 0].any(), f"{name}: the truth is zero, found {a[b == 0].abs().max():.3g}"
        norms = b.flatten(1).norm(dim=1).clamp(min=smallest * b[0].numel() ** 0.5)
        worst[name] = ((a - b).flatten(1).norm(dim=1) / norms.masked_fill(norms == 0, 1)).max().item()
    return worst


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    wrong = {name: f"{e:.2e}" for name, e in errors(found, exact).items() if not e < tolerance}
    assert not wrong, f"beyond {tolerance:.0e}: {wrong}"
