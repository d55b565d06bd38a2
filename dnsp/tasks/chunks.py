"""The delta rule's torch path in chunks of other lengths than the 64 that is built in: time and error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dnsp.kernels import chunk_torch
from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.kernels.reference import recurrence

REPEATS = 5


def chunk(tokens: int, heads: int, width: int, chunk: int) -> dict[str, Any]:
    """Forward and backward of one sequence in fp32, in chunks of ``chunk`` tokens: the median of five, and the error
    ``|out - ref| / |ref|`` of outputs and of the keys' gradient against the recurrence in fp64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = problem(tokens, heads, width, device)
    grad = torch.randn(1, tokens, heads, width, generator=torch.Generator().manual_seed(2)).to(device)
    with chunks_of(chunk):
        found = [timed_pass(inputs, grad) for _ in range(REPEATS + 1)][1:]
    _, outputs, keys_grad = found[-1]
    q, k, v, g, beta = (x.detach().double().requires_grad_() for x in inputs)
    reference, _ = recurrence(q, k, v, g, beta, scale=1.0)
    reference.backward(grad.double())
    wide_grad = k.grad
    assert wide_grad is not None
    return {
        "chunk": chunk,
        "tokens": tokens,
        "ms": 1e3 * median(seconds for seconds, _, _ in found),
        "output_error": relative(outputs, reference),
        "gradient_error": relative(keys_grad, wide_grad),
    }


def problem(tokens: int, heads: int, width: int, device: str) -> list[Tensor]:
    """q, k of norm 1, v, g, beta of one sequence, fp32, with gradients."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, tokens, heads, width, generator=random) for _ in range(3))
    gates = torch.randn(2, 1, tokens, heads, generator=random)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    parts = (q, k, v, -0.1 * gates[0].exp(), gates[1].sigmoid())
    return [x.to(device).requires_grad_() for x in parts]


def timed_pass(inputs: list[Tensor], grad: Tensor) -> tuple[float, Tensor, Tensor]:
    for x in inputs:
        x.grad = None
    wait(grad)
    began = time.perf_counter()
    q, k, v, g, beta = inputs
    o, _ = chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0, backend="torch")
    o.backward(grad)
    wait(grad)
    seconds = time.perf_counter() - began
    keys_grad = inputs[1].grad
    assert keys_grad is not None
    return seconds, o.detach(), keys_grad


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x.detach().double() - reference.detach()).norm() / reference.detach().norm())


@contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    """The torch path's chunk length, for as long as this is measured: it is a constant everywhere else, because the
    grid of segments and of ranks is made of it."""
    before = chunk_torch.CHUNK
    chunk_torch.CHUNK = tokens
    try:
        yield
    finally:
        chunk_torch.CHUNK = before
