"""The seven pitfalls that the document names, each as what it does to an associative memory, measured.

A row is one way of doing it: ``what``, and figures with names. ``says`` puts them into a sentence. Memories are written
token by token in fp64, unless precision or time is what is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.kernels.reference import recurrence
from dnsp.tasks.chunks import problem, relative, wait
from dnsp.tasks.suite import PITFALLS

Figures = dict[str, Any]
NOT_FINITE = "not finite"
ASKED = 8  # the newest pairs, which are asked for again


def demonstrate(pitfall: str, tokens: int, width: int) -> Figures:
    """One pitfall over ``tokens`` tokens with keys and values ``width`` wide."""
    rows, says = DEMONSTRATIONS[pitfall](tokens, width)
    rows = [{name: _cell(figure) for name, figure in row.items()} for row in rows]
    return {"pitfall": pitfall, "number": PITFALLS.index(pitfall) + 1, "tokens": tokens, "width": width,
            "rows": rows, "says": says}  # fmt: skip


def drawn(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values, normal, ``[T, K]`` and ``[T, V]`` in fp64."""
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, tokens, width, generator=random, dtype=torch.float64)
    return k, v


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def write(k_TK: Tensor, v_TV: Tensor, beta: float, erase: bool = True) -> Tensor:
    """The state after all tokens, ``S += beta k (v - k S)``; it stops growing where it is no number any more."""
    S = k_TK.new_zeros(k_TK.shape[1], v_TV.shape[1])
    for k, v in zip(k_TK, v_TV, strict=True):
        error = v - k @ S if erase else v
        S = S + beta * torch.outer(k, error)
        if not torch.isfinite(S).all():
            break
    return S


def asked_back(S: Tensor, k_TK: Tensor, v_TV: Tensor) -> float:
    """``|k S - v| / |v|`` of the newest pairs: 0 where they come back, 1 where nothing does."""
    k, v = k_TK[-ASKED:], v_TV[-ASKED:]
    return float((k @ S - v).norm() / v.norm())


def _cell(figure: Any) -> Any:
    """As a result keeps it: JSON has no number that is not finite, and ``null`` is what is not there."""
    return figure if not isinstance(figure, float) or math.isfinite(figure) else NOT_FINITE


def _number(x: float) -> str:
    return f"{x:.3g}" if math.isfinite(x) else NOT_FINITE


def no_norm(tokens: int, width: int) -> tuple[list[Figures], str]:
    k, v = drawn(tokens, width)
    rows: list[Figures] = []
    for what, keys in (("keys of norm 1", unit(k)), ("keys as projected", k)):
        for beta in (0.1, 0.5):
            S = write(keys, v, beta)
            rows.append({"what": f"{what}, beta {beta}", "state norm": float(S.norm()), "error of the newest pairs":
                         asked_back(S, keys, v)})  # fmt: skip
    limit = 2 / width
    return rows, (
        f"keys of norm {width**0.5:.3g} erase 1 - beta |k|^2 of their direction, which is below -1 where beta is above "
        f"{limit:.3g}: the state norm is {_number(rows[3]['state norm'])} after {tokens:,} tokens at beta 0.5, "
        f"{_number(rows[1]['state norm'])} with keys of norm 1"
    )


def update_first(tokens: int, width: int) -> tuple[list[Figures], str]:
    k, v = drawn(1, width)
    k, beta = unit(k)[0], 0.5
    rows: list[Figures] = []
    for what, first in (("predict, then update", False), ("update, then predict", True)):
        S = k.new_zeros(width, width)
        for _ in range(64):  # the same pair, again and again
            if first:
                S = S + beta * torch.outer(k, v[0])
            S = S + beta * torch.outer(k, v[0] - k @ S)
        back = float((k @ S) @ v[0] / (v[0] @ v[0]))
        rows.append({"what": what, "what comes back, of the value": back, "state norm": float(S.norm()),
                     "error of the pair": float((k @ S - v[0]).norm() / v[0].norm())})  # fmt: skip
    good, bad = (row["what comes back, of the value"] for row in rows)
    return rows, (
        f"a pair that is written again and again at beta {beta} comes back {good:.3f} times; with the error taken from "
        f"the updated state {bad:.3f} times, 2 - beta"
    )


def no_denominator(tokens: int, width: int) -> tuple[list[Figures], str]:
    k, v = drawn(tokens, width)
    k = unit(k)
    random = torch.Generator().manual_seed(3)
    q = unit(torch.randn(tokens, width, generator=random, dtype=torch.float64))
    rows: list[Figures] = []
    plain: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for what, erase in (("delta rule", True), ("linear attention, any keys", False)):
        S, outputs = k.new_zeros(width, width), []
        for k_t, v_t, q_t in zip(k, v, q, strict=True):
            S = S + 0.5 * torch.outer(k_t, v_t - k_t @ S if erase else v_t)
            outputs.append(q_t @ S)
        plain[what], states[what] = torch.stack(outputs), S
        rows.append({"what": what, "denominator": "no", "state norm": float(S.norm()), "error of the newest pairs":
                     asked_back(S, k, v), "largest output": float(plain[what].abs().max()), "smallest |q D|": None,
                     })  # fmt: skip
    qD = (q * k.cumsum(0)).sum(-1)
    newest_k, newest_v = k[-ASKED:], v[-ASKED:]
    back = newest_k @ states["delta rule"] / (newest_k @ k.sum(0) + 1e-6).unsqueeze(-1)
    error = float((back - newest_v).norm() / newest_v.norm())
    divided = plain["delta rule"] / (qD + 1e-6).unsqueeze(-1)
    rows.append({"what": "delta rule", "denominator": "yes", "state norm": rows[0]["state norm"],
                 "error of the newest pairs": error, "largest output": float(divided.abs().max()),
                 "smallest |q D|": float(qD.abs().min())})  # fmt: skip
    return rows, (
        f"not borne out: without it the delta rule's state norm is {_number(rows[0]['state norm'])} after {tokens:,} "
        f"tokens, for what is erased does not add up (linear attention's is {_number(rows[1]['state norm'])}); with it "
        f"q D passes through zero, {_number(rows[2]['smallest |q D|'])} at the least, and an output is "
        f"{_number(rows[2]['largest output'])}"
    )


def large_beta(tokens: int, width: int) -> tuple[list[Figures], str]:
    k, v = drawn(tokens, width)
    rows: list[Figures] = []
    for norm, keys in (("l2", unit(k)), ("RMSNorm", unit(k) * width**0.5)):
        for beta in (0.5, 1.0, 1.9, 2.1) if norm == "l2" else (1 / width, 0.5):
            S = write(keys, v, beta)
            rows.append({"what": f"keys by {norm}, beta {beta:.3g}", "state norm": float(S.norm()),
                         "error of the newest pairs": asked_back(S, keys, v)})  # fmt: skip
    return rows, (
        f"what counts is beta |k|^2, and its bound is 2: with keys of norm 1 the state norm is "
        f"{_number(rows[1]['state norm'])} at beta 1 and {_number(rows[3]['state norm'])} at 2.1; with RMSNorm's keys "
        f"|k|^2 = {width}, and the document's own cap of 0.5 gives {_number(rows[5]['state norm'])}"
    )


def vector_state(tokens: int, width: int) -> tuple[list[Figures], str]:
    pairs = max(1, width // 4)
    k, v = drawn(pairs, width)
    k = unit(k)
    S, s = write(k, v, 1.0), torch.zeros(width, dtype=torch.float64)
    scale = width**0.5  # keys whose entries are of size 1: the best that a channel by itself can be given
    for k_t, v_t in zip(k * scale, v, strict=True):
        s = s + k_t * (v_t - k_t * s) / k_t.square().clamp_min(1.0)
    matrix = float((k @ S - v).norm() / v.norm())
    vector = float((k * scale * s - v).norm() / v.norm())
    rows: list[Figures] = [
        {"what": "matrix, d x d", "bytes a head in fp32": 4 * width**2, "state norm": float(S.norm()),
         "error of all pairs": matrix},
        {"what": "vector, d", "bytes a head in fp32": 4 * width, "state norm": float(s.norm()),
         "error of all pairs": vector},
    ]  # fmt: skip
    return rows, (
        f"{pairs} pairs come back with an error of {matrix:.3f} from a matrix, {vector:.3f} from a vector, in which "
        "each channel holds the newest pair's alone"
    )


def precision(tokens: int, width: int) -> tuple[list[Figures], str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [x.detach() for x in problem(tokens, 4, width, device)]
    truth = by_token([x.double() for x in inputs], torch.float64)
    rows: list[Figures] = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16, states in fp32")):
        q, k, v = (x.to(dtype) for x in inputs[:3])
        run = _chunked(q, k, v, inputs[3], inputs[4])
        rows.append({"what": name, "ms": _median_ms(run, q), "error": relative(run(), truth)})
    for dtype, name in ((torch.bfloat16, "states in bf16 too"), (torch.float16, "states in fp16 too")):
        o = by_token([x.to(dtype) for x in inputs], dtype)
        rows.append({"what": name, "ms": None, "error": relative(o, truth)})
    return rows, (
        f"products in bf16 with states in fp32 are off by {rows[1]['error']:.1e}, with states in bf16 by "
        f"{rows[2]['error']:.1e}, in fp16, which keys of norm 1 do not overflow, by {rows[3]['error']:.1e}; "
        f"{rows[1]['ms']:.2f} ms against fp32's {rows[0]['ms']:.2f} on {device}"
    )


def sequential(tokens: int, width: int) -> tuple[list[Figures], str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = min(tokens, 2048)
    inputs = problem(tokens, 4, width, device)
    truth = by_token([x.detach().double() for x in inputs], torch.float64)
    rows: list[Figures] = []

    def one_by_one() -> Tensor:
        return by_token(inputs, torch.float32)

    for what, forward in (("token by token", one_by_one), ("in chunks of 64", _chunked(*inputs))):

        def both(forward: Callable[[], Tensor] = forward) -> Tensor:
            o = forward()
            o.sum().backward()
            return o.detach()

        ms = _median_ms(both, inputs[0], repeats=3)
        rows.append({"what": what, "ms, forward and backward": ms, "error": relative(both(), truth)})
    slow, fast = (row["ms, forward and backward"] for row in rows)
    return rows, f"{tokens:,} tokens take {slow:.0f} ms one by one, {fast:.1f} ms in chunks: {slow / fast:.0f} times"


def by_token(inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    q, k, v, g, beta = inputs
    return recurrence(q, k, v, g, beta, scale=1.0, dtype=dtype)[0]


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Callable[[], Tensor]:
    return lambda: chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]


def _median_ms(run: Callable[[], Tensor], like: Tensor, repeats: int = 5) -> float:
    run()
    found = []
    for _ in range(repeats):
        wait(like)
        began = time.perf_counter()
        run()
        wait(like)
        found.append(1e3 * (time.perf_counter() - began))
    return sorted(found)[len(found) // 2]


DEMONSTRATIONS: dict[str, Callable[[int, int], tuple[list[Figures], str]]] = dict(
    zip(PITFALLS, (no_norm, update_first, no_denominator, large_beta, vector_state, precision, sequential), strict=True)
)
