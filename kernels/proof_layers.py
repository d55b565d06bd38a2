"""Proof cases of the kernels around the delta rule, forward and backward: inputs, what kernels find, the truth in fp64.

Small inputs at a signature's own widths: more than a run of tokens and a tail of it, documents that begin anywhere, a
halo of which a part belongs to the first of them, rows of a batch that stand idle, memories changed in place over
several tokens, messages of less and of more than a block. :mod:`.proof_run` runs the kernels twice, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_conv, triton_decode, triton_norm, triton_post
from .conv import Activation, causal_conv1d
from .decode import conv_step, delta_step
from .norm import gated_rms_norm
from .signatures import AnySignature, Conv, ConvStep, DeltaStep, Norm, Post
from .triton_scan import make_clock

Tensors = dict[str, Any]  # a case's inputs; None for what a signature has not
Results = dict[str, Tensor]  # in rows, each of which is compared by itself

BATCH, STEPS = 3, 3
TOKENS = (150, 2)  # of a convolution
BEGIN = 40  # of an interval with a halo
# Where each row's documents begin, from the interval's first token; those before a sequence's first token begin there.
DOCUMENTS = ((-BEGIN, 5, 6, 7, 63, 65, 130), (-2, 64, 100), (0, 1, 149))
NORM = ((37, None), (150, 2))  # tokens of a norm, programs of its backward pass at the most
EPS = 0.1  # that large, lest gradients of a narrow row cancel
ROW = 64  # numbers that are compared together at the least: one alone may be near zero
MESSAGES = (5, 4096, 5000, 1, 9000, 12)  # words


def results(device: torch.device, signature: AnySignature) -> Iterator[tuple[Results, Results, Results]]:
    """What the kernels find, what they find again, and the truth, for each case."""
    cases, kernels, truth = FAMILIES[type(signature)]
    for tensors in cases(signature, device):
        yield kernels(signature, tensors), kernels(signature, tensors), truth(signature, tensors)


def _rows(x: Tensor, width: int) -> Tensor:
    """x in rows of one or more times ``width`` numbers, the last one filled with zeros."""
    numbers = width * -(-ROW // width)
    return F.pad(x.flatten(), (0, -x.numel() % numbers)).view(-1, numbers)


class _Draw:
    """Normal numbers, the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, dtype: torch.dtype | None, *shape: int) -> Any:
        return None if dtype is None else torch.randn(*shape, generator=self.generator).to(self.device, dtype)


def _double(tensors: Tensors) -> Tensors:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in tensors.items()}


# The convolution.


def _conv_cases(s: Conv, device: torch.device) -> Iterator[Tensors]:
    for T in TOKENS:
        draw = _Draw(device)
        made = {"x": draw(s.dtype, BATCH, T, s.D), "weight": draw(s.weight, s.D, s.W), "bias": draw(s.bias, s.D)}
        made |= {"halo": draw(s.halo, BATCH, s.W - 1, s.D), "dy": draw(s.dtype, BATCH, T, s.D)}
        made["start"] = BEGIN if s.halo else 0
        yield made | {"doc_start": _documents(T, made["start"], s.documents, device)}


def _documents(T: int, start: int, dtype: torch.dtype | None, device: torch.device) -> Tensor | None:
    if dtype is None:
        return None
    doc_start = torch.full((BATCH, T), -1 if start else 0)
    for row, begins in zip(doc_start, DOCUMENTS, strict=True):
        for begin in begins:
            if start + begin > 0:
                row[max(begin, 0) :] = start + begin
    return doc_start.to(device, dtype)


def _conv_kernels(s: Conv, t: Tensors) -> Results:
    arguments = t["x"], t["weight"], t["bias"], t["halo"], t["doc_start"], t["start"], s.silu
    y = triton_conv.forward(*arguments)
    return _conv_results(s, y, *triton_conv.backward(t["dy"], *arguments))


def _conv_truth(s: Conv, t: Tensors) -> Results:
    t = _double(t)
    leaves = {name: t[name].requires_grad_() for name in ("x", "weight", "bias", "halo") if t[name] is not None}
    y = causal_conv1d(
        t["x"], t["weight"], t["bias"], activation="silu" if s.silu else None, doc_start_BT=t["doc_start"],
        start=t["start"], halo_BWD=t["halo"], backend="torch",
    )  # fmt: skip
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), t["dy"]), strict=True))
    return _conv_results(s, y.detach(), *(grads.get(name) for name in ("x", "weight", "bias", "halo")))


def _conv_results(s: Conv, y: Tensor, *grads: Tensor | None) -> Results:
    named = dict(zip(("dx", "dweight", "dbias", "dhalo"), grads, strict=True))
    widths = {"dweight": s.W}
    found = {"y": y} | {name: x for name, x in named.items() if x is not None}
    return {name: _rows(x, widths.get(name, s.D)) for name, x in found.items()}


# The gated norm.


def _norm_cases(s: Norm, device: torch.device) -> Iterator[Tensors]:
    for N, most in NORM:
        draw = _Draw(device)

        def rows(dtype: torch.dtype, N: int = N, draw: _Draw = draw) -> Tensor:
            if s.H == 1:
                return draw(dtype, N, s.D)
            # No two axes can be counted as one: one head more than are taken, and one token.
            return draw(dtype, 2, N + 1, s.H + 1, -(-s.D // 16) * 16)[:, :N, : s.H, : s.D]

        x, gate, dy = rows(s.dtype), rows(s.gate), rows(s.dtype)
        yield {"x": x, "gate": gate, "weight": draw(s.weight, s.D), "dy": dy, "most": most}


def _norm_kernels(s: Norm, t: Tensors) -> Results:
    arguments = t["x"], t["gate"], t["weight"], EPS
    y = triton_norm.forward(*arguments)
    return _norm_results(s, y, *triton_norm.backward(t["dy"], *arguments, t["most"]))


def _norm_truth(s: Norm, t: Tensors) -> Results:
    t = _double(t)
    x, gate, weight = leaves = [t[name].requires_grad_() for name in ("x", "gate", "weight")]
    y = gated_rms_norm(x, gate, weight, EPS, backend="torch")
    return _norm_results(s, y.detach(), *torch.autograd.grad(y, leaves, t["dy"]))


def _norm_results(s: Norm, *found: Tensor) -> Results:
    return {name: _rows(x, s.D) for name, x in zip(("y", "dx", "dgate", "dweight"), found, strict=True)}


# Decoding.


def _memory(draw: _Draw, dtype: torch.dtype, aligned: bool, *shape: int) -> Tensor:
    """A contiguous memory, at a multiple of 16 bytes or not."""
    numbers = draw(dtype, torch.Size(shape).numel() + 1)
    return (numbers[:-1].clone() if aligned else numbers[1:]).view(shape)


def _slots(dtype: torch.dtype | None, device: torch.device) -> tuple[int, Tensor | None]:
    """Rows of a memory, and which of them each row of the batch has: one more than that, and one row is idle."""
    return (BATCH, None) if dtype is None else (BATCH + 1, torch.tensor([2, -1, 0], dtype=dtype, device=device))


def _changed(memory: Tensor) -> Tensor:
    """A copy to change, at an address like the memory's."""
    room = memory.new_empty(memory.numel() + 16)
    offset = memory.data_ptr() % 16 // memory.element_size()
    return room[offset:][: memory.numel()].view(memory.shape).copy_(memory)


def _conv_step_cases(s: ConvStep, device: torch.device) -> Iterator[Tensors]:
    draw = _Draw(device)
    rows, slots = _slots(s.slots, device)
    made = {"x": draw(s.dtype, STEPS, BATCH, s.D), "weight": draw(s.weight, s.D, s.W), "bias": draw(s.bias, s.D)}
    tail = _memory(draw, s.tail, s.aligned, rows, s.W - 1, s.D)
    tail.copy_(tail.to(s.dtype))  # what comes to lie there is of x's dtype
    yield made | {"tail": tail, "slots": slots}


def _conv_step(s: ConvStep, t: Tensors, step: Callable[..., Tensor]) -> Results:
    tail = _changed(t["tail"])
    y = torch.stack([step(x, tail, t["weight"], t["bias"]) for x in t["x"]])
    return {"y": _rows(y, s.D)} | ({"tail": _rows(tail, s.D)} if s.W > 1 else {})


def _conv_step_kernels(s: ConvStep, t: Tensors) -> Results:
    def step(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return triton_decode.conv_step(x, tail, weight, bias, s.silu, t["slots"])

    return _conv_step(s, t, step)


def _conv_step_truth(s: ConvStep, t: Tensors) -> Results:
    def step(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        activation: Activation = "silu" if s.silu else None
        return conv_step(x, tail, weight, bias, activation, slots_B=t["slots"], backend="torch")

    return _conv_step(s, _double(t), step)


def _delta_step_cases(s: DeltaStep, device: torch.device) -> Iterator[Tensors]:
    draw = _Draw(device)
    rows, slots = _slots(s.slots, device)
    keys, values, heads = (STEPS, BATCH, s.H, s.K), (STEPS, BATCH, s.HV, s.V), (STEPS, BATCH, s.HV)
    q, k, v = draw(s.q, *keys), draw(s.k, *keys), draw(s.v, *values)
    k = k if s.normalise else F.normalize(k.float(), dim=-1).to(s.k)
    g, beta = draw(s.g, *heads), draw(s.beta, *heads)
    if s.A_log is None:
        g, beta = None if g is None else -g.abs(), beta.sigmoid()
    gates = None if s.A_log is None else (draw(s.A_log, s.HV), draw(s.dt_bias, s.HV))
    state = _memory(draw, torch.float32, s.aligned, rows, s.HV, s.K, s.V)
    yield {"q": q, "k": k, "v": v, "g": g, "beta": beta, "gates": gates, "state": state, "slots": slots}


def _delta_step(s: DeltaStep, t: Tensors, step: Callable[..., Tensor]) -> Results:
    state = _changed(t["state"])
    o = [
        step(*(None if t[name] is None else t[name][n] for name in ("q", "k", "v", "g", "beta")), state)
        for n in range(STEPS)
    ]
    return {"o": _rows(torch.stack(o), s.V), "state": _rows(state, s.K * s.V)}


def _delta_step_kernels(s: DeltaStep, t: Tensors) -> Results:
    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor) -> Tensor:
        options = s.K**-0.5, s.rule, s.normalise, t["slots"], t["gates"]
        return triton_decode.delta_step(q, k, v, g, beta, state, *options)

    return _delta_step(s, t, step)


def _delta_step_truth(s: DeltaStep, t: Tensors) -> Results:
    gates, t = t["gates"], _double(t)
    if gates is not None:
        A_log, dt_bias = (x.double() for x in gates)
        t |= {"g": -A_log.exp() * F.softplus(t["g"] + dt_bias), "beta": t["beta"].sigmoid()}

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor) -> Tensor:
        slots = t["slots"]
        return delta_step(q, k, v, g, beta, state, rule=s.rule, l2norm=s.normalise, slots_B=slots, backend="torch")

    return _delta_step(s, t, step)


# Messages, from a memory to itself.


def _post_cases(s: Post, device: torch.device) -> Iterator[Tensors]:
    draw = _Draw(device)
    yield {"messages": [draw(torch.float32, words).view(torch.int32) for words in MESSAGES]}


def _post_kernels(s: Post, t: Tensors) -> Results:
    device, slots = t["messages"][0].device, 2

    def words(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    memory, ring, emptied, filled = (words(*n) for n in ((slots, max(MESSAGES)), (s.ring,), (slots, 4), (slots, 4)))
    (sent, posted, taken), clock = words(3, 4), make_clock(1, device, 30.0)
    found = []
    for n, message in enumerate(t["messages"]):
        slot = n % slots
        triton_post.wait_room(filled[slot], emptied[slot], clock, 0, 0)
        memory[slot, : len(message)] = message
        triton_post.post(sent, filled[slot], ring, posted, clock, slot)
        triton_post.wait_message(posted, taken, clock, 0, 0)
        found.append(words(len(message)))
        triton_post.take(memory, ring, taken, emptied, found[-1])
    return {"message": _rows(torch.cat(found), 1)}


def _post_truth(s: Post, t: Tensors) -> Results:
    return {"message": _rows(torch.cat(t["messages"]), 1).double()}


Family = tuple[Callable[..., Iterator[Tensors]], Callable[..., Results], Callable[..., Results]]
FAMILIES: dict[type[AnySignature], Family] = {
    Conv: (_conv_cases, _conv_kernels, _conv_truth),
    Norm: (_norm_cases, _norm_kernels, _norm_truth),
    ConvStep: (_conv_step_cases, _conv_step_kernels, _conv_step_truth),
    DeltaStep: (_delta_step_cases, _delta_step_kernels, _delta_step_truth),
    Post: (_post_cases, _post_kernels, _post_truth),
}
