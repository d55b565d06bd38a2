"""What ``dnsp bench delta`` measures: shapes, the least work of each, random inputs, and their truth.

The least work, with C = 64, H key and HV value heads, T tokens in all:

    FLOPs of forward     T (HV (6 K V + 4 C V) + H 4 C K)
                         K S, Q S, K^T V'; A R, P V'; K K^T, Q K^T: whole squares; the inverse, under 1 %, is left out
    FLOPs of backward    twice that: a product each for the gradients of both factors; nothing computed anew counts
    bytes of forward     T (2 H K + 2 HV V) numbers and T 2 HV fp32 gates: q, k, v, g, beta in, o out
    bytes of backward    T (4 H K + 3 HV V) numbers and T 4 HV fp32 gates: q, k, v, do, g, beta in, their gradients out

Truth is the chunked form in torch operations in fp64 (1e-15 from the recurrence), on the same rounded inputs. Heads
are independent of each other, and it takes as many at a time as fit the device. An error is
``|found - truth| / |truth|`` over all of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.bench import common
from dnsp.choices import MULTIPROCESSORS
from dnsp.errors import UsageError
from dnsp.kernels.backend import Backend
from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.kernels.segments import CHUNK, Heads, check_segment_tokens, filling_tokens

KEYS = ("tokens", "heads", "K", "V", "batch", "dtype", "decay", "documents", "segment_tokens", "l2norm")
RESULTS = ("o", "dq", "dk", "dv", "dg", "dbeta")

# What is measured where nothing is asked for.
SHAPES = (
    "tokens=32768",
    "tokens=32768,l2norm=no",
    "tokens=32768,decay=-1e-4",
    "tokens=32768,segment_tokens=deterministic",
    "tokens=32768,documents=128",
    "tokens=32768,heads=16",
    "tokens=4096,batch=32",
    "tokens=131072",
    "tokens=131072,decay=-1e-4",
    "tokens=131072,decay=-20",
    "tokens=131072,heads=4/8",
)
CPU_SHAPES = ("tokens=512,heads=2/4,K=64,V=64", "tokens=512,heads=2/4,K=64,V=64,decay=-20,documents=5")


@dataclass(frozen=True)
class Shape:
    """``decay``: ``logsigmoid``, for ``logsigmoid(N(0, 1)) / 16`` a token, or a constant. ``segment_tokens`` None: the
    op's own choice. ``l2norm``: q and k are normalised in the call, or before it."""

    tokens: int = 32768
    key_heads: int = 16
    value_heads: int = 32
    K: int = 128
    V: int = 128
    batch: int = 1
    dtype: str = "bf16"
    decay: str = "logsigmoid"
    documents: int = 1
    segment_tokens: int | None = None
    l2norm: bool = True

    def __str__(self) -> str:
        rows = f"{self.batch} x " if self.batch > 1 else ""
        parts = [f"{rows}{self.tokens:,} tokens, {self.key_heads}/{self.value_heads} heads, K={self.K}, V={self.V}"]
        parts += [self.dtype, f"decay {self.decay}"]
        parts += [f"{self.documents} documents"] * (self.documents > 1)
        parts += [] if self.segment_tokens is None else [f"segments of {self.segment_tokens:,}"]
        parts += ["q and k normalised before"] * (not self.l2norm)
        return ", ".join(parts)

    @property
    def all_tokens(self) -> int:
        return self.batch * self.tokens

    def flops(self, what: str) -> int:
        """Of ``forward`` (or ``inference``), or of both passes, ``training``."""
        of_values = self.value_heads * (6 * self.K * self.V + 4 * CHUNK * self.V)
        forward = self.all_tokens * (of_values + self.key_heads * 4 * CHUNK * self.K)
        return 3 * forward if what == "training" else forward

    def bytes(self, what: str) -> int:
        """The least that is read and written."""
        size = common.DTYPES[self.dtype].itemsize
        keys, values = self.key_heads * self.K, self.value_heads * self.V
        forward = size * (2 * keys + 2 * values) + 4 * 2 * self.value_heads
        backward = size * (4 * keys + 3 * values) + 4 * 4 * self.value_heads
        return self.all_tokens * (forward + (backward if what == "training" else 0))


def parse_shape(text: str, deterministic: bool = False) -> Shape:
    """``tokens=32768,heads=16/32,decay=-1e-4``; what is not named is as in :class:`Shape`.

    Raises: UsageError, for values that make no shape.
    """
    given = common.parse_settings(text, KEYS, "bench delta")
    values: dict[str, Any] = {
        key: common.whole_number(key, given[key]) for key in ("tokens", "K", "V", "batch", "documents") if key in given
    }
    if "heads" in given:
        values["key_heads"], values["value_heads"] = common.parse_heads(given["heads"])
    if "dtype" in given:
        common.parse_dtype(given["dtype"])
        values["dtype"] = given["dtype"]
    if "decay" in given:
        values["decay"] = parse_decay(given["decay"])
    if "l2norm" in given:
        if given["l2norm"] not in ("yes", "no"):
            raise UsageError(f"l2norm={given['l2norm']}: must be yes (q, k normalised in the call) or no (before it)")
        values["l2norm"] = given["l2norm"] == "yes"
    shape = Shape(**values)
    if shape.documents > 1 and shape.batch > 1:
        raise UsageError(
            f"documents={shape.documents} with batch={shape.batch}: documents are packed into one row; give batch=1, "
            f"tokens={shape.all_tokens}"
        )
    if shape.documents > shape.tokens:
        raise UsageError(f"documents={shape.documents}: {shape.tokens} tokens hold no more than {shape.tokens} of them")
    asked = given.get("segment_tokens", "deterministic" if deterministic else "auto")
    if asked == "auto":
        return shape
    if asked == "deterministic":
        tokens = deterministic_segment_tokens(shape)
    else:
        tokens = common.whole_number("segment_tokens", asked)
        try:
            check_segment_tokens(tokens)
        except ValueError as error:
            raise UsageError(f"{error}, or auto, or deterministic") from None
    return Shape(**(values | {"segment_tokens": tokens}))


def parse_decay(text: str) -> str:
    """``decay`` of a :class:`Shape`. Raises: UsageError, for what is none."""
    if text == "logsigmoid":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -math.inf < value <= 0:
        raise UsageError(
            f"decay={text}: must be logsigmoid, or the log decay of a token, a number of at most 0, as in decay=-1e-4"
        )
    return text


def deterministic_segment_tokens(shape: Shape) -> int:
    """What training takes where engine.deterministic asks for bits that do not depend on the device."""
    dtype = common.DTYPES[shape.dtype]
    heads = Heads(shape.batch, shape.key_heads, shape.value_heads, shape.K, shape.V, dtype)
    return filling_tokens(heads, MULTIPROCESSORS, shape.tokens)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    do: Tensor
    cu_seqlens: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.leaves, self.do))

    def part(self, keys: slice, values: slice, dtype: torch.dtype) -> Inputs:
        """Some heads, as leaves of their own."""

        def leaf(x: Tensor, heads: slice) -> Tensor:
            return x.detach()[:, :, heads].to(dtype).requires_grad_()

        q, k = leaf(self.q, keys), leaf(self.k, keys)
        v, g, beta = leaf(self.v, values), leaf(self.g, values), leaf(self.beta, values)
        return Inputs(q, k, v, g, beta, self.do[:, :, values].to(dtype), self.cu_seqlens)


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """q, k, v and the outputs' gradient from N(0, 1), beta the sigmoid of it; gates in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = common.DTYPES[shape.dtype]

    def normal(heads: int, *width: int) -> Tensor:
        return torch.randn(shape.batch, shape.tokens, heads, *width, generator=generator, device=device)

    q, k = normal(shape.key_heads, shape.K), normal(shape.key_heads, shape.K)
    if not shape.l2norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v, do = normal(shape.value_heads, shape.V), normal(shape.value_heads, shape.V)
    gates = normal(shape.value_heads)
    g = F.logsigmoid(gates) / 16 if shape.decay == "logsigmoid" else torch.full_like(gates, float(shape.decay))
    beta = normal(shape.value_heads).sigmoid()
    cu_seqlens = None
    if shape.documents > 1:
        cuts = torch.randperm(shape.tokens - 1, generator=torch.Generator().manual_seed(0))[: shape.documents - 1]
        cu_seqlens = torch.tensor([0, *sorted((cuts + 1).tolist()), shape.tokens], device=device)
    made = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), g, beta, do.to(dtype), cu_seqlens)
    for leaf in made.leaves:
        leaf.requires_grad_()
    return made


def compute(shape: Shape, x: Inputs, backend: Backend | None = None) -> Tensor:
    """Our op's outputs."""
    cu_seqlens = x.cu_seqlens if shape.documents > 1 else None
    return chunk_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm_in_kernel=shape.l2norm, cu_seqlens=cu_seqlens,
        segment_tokens=shape.segment_tokens, backend=backend,
    )[0]  # fmt: skip


def truth(shape: Shape, inputs: Inputs, at_once: int) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
    """``(key heads, value heads, their results)`` in fp64, some key heads with their value heads at a time."""
    group = shape.value_heads // shape.key_heads
    for first in range(0, shape.key_heads, at_once):
        last = min(first + at_once, shape.key_heads)
        keys, values = slice(first, last), slice(first * group, last * group)
        part = inputs.part(keys, values, torch.float64)
        o = compute(replace(shape, segment_tokens=None), part, backend="torch")
        grads = torch.autograd.grad(o, part.leaves, part.do)
        yield keys, values, dict(zip(RESULTS, (o.detach(), *grads), strict=True))


def heads_at_once(shape: Shape, device: torch.device) -> int:
    """Key heads whose truth fits two thirds of the device's free memory, by what a token of a value head was seen to
    take."""
    if device.type != "cuda":
        return shape.key_heads
    common.give_back_memory(device)
    numbers = 10 * (shape.K + shape.V) + 18 * CHUNK + 4 * shape.K * shape.V // CHUNK
    one = 8 * numbers * (shape.all_tokens + CHUNK) * shape.value_heads // shape.key_heads
    return max(1, min(shape.key_heads, torch.cuda.mem_get_info(device)[0] * 2 // 3 // one))


def measure_errors(
    shape: Shape, inputs: Inputs, found: Sequence[dict[str, Tensor]], device: torch.device
) -> tuple[list[dict[str, float]], str]:
    """``|found - truth| / |truth|`` of each result of each side, and how the truth was come by."""
    at_once = heads_at_once(shape, device)
    while True:
        try:
            return errors_of(shape, inputs, found, at_once), f"fp64, {at_once} of {shape.key_heads} key heads at a time"
        except torch.OutOfMemoryError as error:
            if at_once == 1:
                return [{} for _ in found], f"no truth: {common.reason(error)}"
        at_once = at_once // 2
        common.give_back_memory(device)


def errors_of(
    shape: Shape, inputs: Inputs, found: Sequence[dict[str, Tensor]], at_once: int
) -> list[dict[str, float]]:
    zero = torch.zeros((), dtype=torch.float64, device=inputs.v.device)
    wrong = [dict.fromkeys(results, zero) for results in found]
    size = dict.fromkeys(RESULTS, zero)
    for keys, values, exact in truth(shape, inputs, at_once):
        for name, b in exact.items():
            part = keys if name in ("dq", "dk") else values
            size[name] = size[name] + b.square().sum()
            for sums, results in zip(wrong, found, strict=True):
                if name in results:
                    sums[name] = sums[name] + (results[name][:, :, part].double() - b).square().sum()
    return [{name: _ratio(float(total), float(size[name])) for name, total in sums.items()} for sums in wrong]


def _ratio(wrong: float, size: float) -> float:
    if size == 0:  # a truth of zero is to be found as zero
        return 0.0 if wrong == 0 else math.inf
    return math.sqrt(wrong / size)
