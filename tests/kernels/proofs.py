"""What tests of proofs share: signatures, a toolchain, and kernels that are right but for one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dnsp.kernels.reference import Rule
from dnsp.kernels.signatures import AnySignature, Conv, ConvStep, DeltaStep, Norm, Post, Signature
from dnsp.kernels.triton_post import RING
from dnsp.kernels.verdicts import Toolchain

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
H200 = Toolchain("NVIDIA H200", (9, 0), "3.6.0", "12.8.93", "of the tests")


def make_signature(
    dtype: torch.dtype = torch.float32,
    H: int = 1,
    HV: int = 2,
    K: int = 16,
    V: int = 16,
    g: bool = True,
    documents: torch.dtype | None = torch.int32,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    normalise: bool = True,
) -> Signature:
    """Of q, k and v as a model splits them from one tensor."""
    width = 2 * H * K + HV * V
    qk = width, K if H > 1 else 0
    gates = HV, 1 if HV > 1 else 0
    return Signature(
        dtype, H, HV, K, V, qk, qk, (width, V if HV > 1 else 0), gates, torch.float32,
        gates if g else None, torch.float32 if g else None, documents, rule, normalise,
    )  # fmt: skip


DELTA = {
    "model": make_signature(),
    "no decay": make_signature(BF16, H=2, HV=4, g=False, documents=None, rule=Rule(erase=False)),
    "of a Hopper's widths": make_signature(BF16, K=128, V=128),
    "expanded": make_signature(HV=4, documents=torch.int64)._replace(beta=(0, 1), g=(1, 0), normalise=False),
}
LAYERS: dict[str, AnySignature] = {
    "conv": Conv(FP32, FP32, None, None, None, 32, 4, True),
    "conv, everything": Conv(FP32, FP32, FP32, FP32, torch.int32, 20, 3, False),
    "norm": Norm(FP32, FP32, FP32, 24, 1),
    "norm, heads apart": Norm(FP32, FP32, FP32, 40, 3),
    "conv step": ConvStep(FP32, FP32, FP32, FP32, torch.int64, 20, 3, False, False),
    "delta step": DeltaStep(FP32, FP32, FP32, FP32, FP32, FP32, FP32, torch.int32, 1, 3, 12, 20, Rule(), True, False),
    "delta step, no erase": DeltaStep(
        *(FP32,) * 4, *(None,) * 4, 1, 1, 3, 5, Rule(erase=False), False, True
    ),
    "post": Post(RING),
}  # fmt: skip


class Wrong:
    """A kernel that is right but for the last of its outputs of a name, which it changes."""

    def __init__(self, kernel: Any, output: str, change: Callable[[Tensor], Any]) -> None:
        self.kernel, self.change = kernel, change
        self.__name__, self.at = kernel.__name__, kernel.arg_names.index(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Any:
            binary = self.kernel[grid](*args, **constants)
            if not constants.get("SUMMARY"):  # there an output may be unused, and one of the inputs stand in its place
                self.change(args[self.at])
            return binary

        return run


@contextmanager
def wrong(module: ModuleType, kernel: str, output: str, change: Callable[[Tensor], Any]) -> Iterator[None]:
    """A module launches this kernel so."""
    right = getattr(module, kernel)
    setattr(module, kernel, Wrong(right, output, change))
    try:
        yield
    finally:
        setattr(module, kernel, right)
