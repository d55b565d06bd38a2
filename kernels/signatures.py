"""What decides the binaries of a call: one kind of signature for each family of kernels.

Triton makes a binary for the constants of a launch, and for what it knows of the other arguments: their dtypes, and
which of them are multiples of 16. So the families lay their arguments out alike (:func:`aligned`, :func:`stepped`)
before they ask for a signature, and what is left open is one of its fields.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Rule
from .segments import Inputs


class Signature(NamedTuple):
    """Of the delta rule's passes (:mod:`.chunk_triton`); strides are those of tokens and heads."""

    dtype: torch.dtype  # of q, k, v
    H: int
    HV: int
    K: int
    V: int
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    beta: tuple[int, ...]
    beta_dtype: torch.dtype
    g: tuple[int, ...] | None
    g_dtype: torch.dtype | None
    documents: torch.dtype | None
    rule: Rule
    normalise: bool

    @staticmethod
    def of(x: Inputs) -> Signature:
        """Of inputs as the kernels are given them."""
        (_, _, H, K), (_, _, HV, V) = x.k.shape, x.v.shape
        g, doc = x.g, x.doc_start
        return Signature(
            x.v.dtype, H, HV, K, V, strides(x.q, H), strides(x.k, H), strides(x.v, HV), strides(x.beta, HV),
            x.beta.dtype, None if g is None else strides(g, HV), None if g is None else g.dtype,
            None if doc is None else doc.dtype, x.rule, x.normalise_qk,
        )  # fmt: skip

    def __str__(self) -> str:
        parts = [f"{short(self.dtype)}, {self.H} key and {self.HV} value heads, K={self.K}, V={self.V}"]
        parts += ["decay"] * (self.g is not None) + ["documents"] * (self.documents is not None)
        return ", ".join(parts + _options(self.rule, self.normalise))


class Fold(NamedTuple):
    """Of the fold of summaries (:mod:`.triton_scan`)."""

    K: int
    V: int

    def __str__(self) -> str:
        return f"fold of states, K={self.K}, V={self.V}"


class Conv(NamedTuple):
    """Of the convolution (:mod:`.triton_conv`)."""

    dtype: torch.dtype  # of x
    weight: torch.dtype
    bias: torch.dtype | None
    halo: torch.dtype | None
    documents: torch.dtype | None
    D: int
    W: int
    silu: bool

    def __str__(self) -> str:
        parts = [f"convolution, {short(self.dtype)}, {self.D} channels, {self.W} taps"]
        parts += [f"{short(self.weight)} filters"] * (self.weight != self.dtype) + ["SiLU"] * self.silu
        given = {"bias": self.bias, "halo": self.halo, "documents": self.documents}
        return ", ".join(parts + [name for name, dtype in given.items() if dtype is not None])


class Norm(NamedTuple):
    """Of the gated norm (:mod:`.triton_norm`); H: heads that lie apart from each other, 1 where all rows lie alike."""

    dtype: torch.dtype  # of x
    gate: torch.dtype
    weight: torch.dtype
    D: int
    H: int

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys(map(short, (self.dtype, self.gate, self.weight))))
        return f"gated norm, {dtypes}, {self.D} wide" + f", {self.H} heads apart" * (self.H > 1)


class ConvStep(NamedTuple):
    """Of the convolution of one token (:mod:`.triton_decode`)."""

    dtype: torch.dtype  # of x
    tail: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None
    slots: torch.dtype | None
    D: int
    W: int
    silu: bool
    aligned: bool  # the tail, which is changed where it lies

    def __str__(self) -> str:
        parts = [f"decode, convolution, {short(self.dtype)}, {self.D} channels, {self.W} taps"]
        parts += ["SiLU"] * self.silu + ["bias"] * (self.bias is not None) + ["slots"] * (self.slots is not None)
        return ", ".join(parts + ["a tail at an odd address"] * (not self.aligned))


class DeltaStep(NamedTuple):
    """Of one token of the delta rule (:mod:`.triton_decode`)."""

    q: torch.dtype
    k: torch.dtype
    v: torch.dtype
    beta: torch.dtype
    g: torch.dtype | None
    A_log: torch.dtype | None  # where the gates are made here
    dt_bias: torch.dtype | None
    slots: torch.dtype | None
    H: int
    HV: int
    K: int
    V: int
    rule: Rule
    normalise: bool
    aligned: bool  # the state, which is changed where it lies

    def __str__(self) -> str:
        parts = [f"decode, {short(self.v)}, {self.H} key and {self.HV} value heads, K={self.K}, V={self.V}"]
        parts += ["decay"] * (self.g is not None) + ["gates"] * (self.A_log is not None)
        parts += ["slots"] * (self.slots is not None) + _options(self.rule, self.normalise)
        return ", ".join(parts + ["a state at an odd address"] * (not self.aligned))


class Post(NamedTuple):
    """Of messages between memories that processes share (:mod:`.triton_post`); they have one binary each."""

    ring: int  # messages under way

    def __str__(self) -> str:
        return "messages between ranks"


AnySignature = Signature | Fold | Conv | Norm | ConvStep | DeltaStep | Post
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Signature, Fold, Conv, Norm, ConvStep, DeltaStep, Post)}
# The modules that launch each kind's kernels, or make what these are given.
MODULES = {
    "Signature": ("chunk_triton", "launches", "gluon_chunk", "triton_scan"),
    "Fold": ("triton_scan",),
    "Conv": ("triton_conv",),
    "Norm": ("triton_norm",),
    "ConvStep": ("triton_decode",),
    "DeltaStep": ("triton_decode",),
    "Post": ("triton_post", "triton_scan"),
}


def _options(rule: Rule, normalise: bool) -> list[str]:
    parts = ["normalised q and k"] * normalise + ["no erase"] * (not rule.erase)
    return parts + ["error from the undecayed state"] * (rule.error_decay == "previous")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_json(signature: AnySignature) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        return short(x) if isinstance(x, torch.dtype) else asdict(x) if isinstance(x, Rule) else x

    fields = {name: plain(x) for name, x in signature._asdict().items()}
    return {"kind": type(signature).__name__} | fields


def from_json(values: dict[str, Any]) -> AnySignature:
    def read(x: Any) -> Any:
        if isinstance(x, str):
            return getattr(torch, x)
        return tuple(x) if isinstance(x, list) else Rule(**x) if isinstance(x, dict) else x

    return KINDS[values["kind"]](**{name: read(x) for name, x in values.items() if name != "kind"})


def strides(x: Tensor, heads: int) -> tuple[int, int]:
    """Of tokens and heads; where there is one head its stride is nobody's, and 0."""
    along = x.stride()
    return along[1], along[2] if heads > 1 else 0


def aligned(x: Tensor) -> Tensor:
    """x, contiguous, at a multiple of 16 bytes; parameters that lie in one flat buffer need not be."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def is_stepped(x: Tensor) -> bool:
    """Whether x's rows, numbers one after another, begin at multiples of 16 bytes and of 16 numbers from each other."""
    return x.data_ptr() % 16 == 0 and _steps(x.shape, x.stride())


@lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if strides[-1] != 1 and shape[-1] != 1:
        return False
    return all(stride % 16 == 0 or size <= 1 for stride, size in zip(strides, shape[:-1], strict=False))


def stepped(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows lie so."""
    if is_stepped(x):
        return x
    *rows, width = x.shape
    return x.new_empty(*rows, -(-width // 16) * 16)[..., :width].copy_(x)
