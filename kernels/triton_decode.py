"""Triton kernels of a decode step: the convolution of one token, and the delta rule's update of one state.

Two launches a layer, not one. Every program of the delta rule needs the convolved query and key of its head, so that in
one launch the programs of a head would read the convolution's tail while one of them moves it on. Convolving first
gives each channel one program, leaves the tail in order for whoever reads it next, and keeps W rows of inputs and
filters out of the programs that stream the state, which is nearly all of a step's traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import proof
from .reference import Rule
from .signatures import ConvStep, DeltaStep, aligned

WIDEST = 256  # K and V
TAPS = 8  # of a convolution
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 32  # of the state, a program: rows of 128 bytes, a cache line; at K = 128, B = 1 and 32 heads 128 programs
NUMBERS = 2048  # of the state, a warp: 64 a thread, half of its registers
CHANNELS = 256  # of the convolution, a program


@triton.jit(do_not_specialize=["sxb"], do_not_specialize_on_alignment=["slots"])
def conv_step_kernel(
    x, tail, weight, bias, slots, y, sxb: tl.int64,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < D
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
        if slot < 0:
            tl.store(y + b * D + d, tl.zeros((BD,), y.dtype.element_ty), mask=inside)
            return
    at = tail + slot * (W - 1) * D + d
    new = tl.load(x + b * sxb + d, mask=inside, other=0.0)
    weight += d * W
    z = new.to(tl.float32) * tl.load(weight + W - 1, mask=inside, other=0.0).to(tl.float32)
    # Rows move up by one. A thread has a channel whole, so that it has read a row before it overwrites it.
    for tap in tl.static_range(W - 1):
        before = tl.load(at + tap * D, mask=inside, other=0.0)
        z += before.to(new.dtype).to(tl.float32) * tl.load(weight + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(at + (tap - 1) * D, before, mask=inside)
    if W > 1:
        tl.store(at + (W - 2) * D, new.to(tail.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        z += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y + b * D + d, z.to(new.dtype), mask=inside)


@triton.jit(
    do_not_specialize=["sqb", "skb", "svb", "sgb", "sbb"],
    do_not_specialize_on_alignment=["g", "beta", "A_log", "dt_bias", "slots"],
)
def delta_step_kernel(
    q, k, v, g, beta, A_log, dt_bias, slots, state, o, scale,
    sqb: tl.int64, skb: tl.int64, svb: tl.int64, sgb: tl.int64, sbb: tl.int64,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, HAS_G: tl.constexpr, PREVIOUS: tl.constexpr, NORM: tl.constexpr, GATES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    HV: tl.constexpr = H * G
    blocks: tl.constexpr = (V + BV - 1) // BV
    block = tl.program_id(0) % blocks  # neighbours in memory at about the same time
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, hv = row // HV, row % HV
    ck = tl.arange(0, BK)
    cv = block * BV + tl.arange(0, BV)
    k_inside, v_inside = ck < K, cv < V
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
        if slot < 0:
            tl.store(o + row * V + cv, tl.zeros((BV,), o.dtype.element_ty), mask=v_inside)
            return
    at = state + (slot * HV + hv) * (K * V) + ck[:, None] * V + cv[None, :]
    whole: tl.constexpr = (K == BK) and (V % BV == 0)
    qt = tl.load(q + b * sqb + (hv // G) * K + ck, mask=k_inside, other=0.0)
    kt = tl.load(k + b * skb + (hv // G) * K + ck, mask=k_inside, other=0.0)
    S = tl.load(at) if whole else tl.load(at, mask=k_inside[:, None] & v_inside[None, :], other=0.0)
    error = tl.load(v + b * svb + hv * V + cv, mask=v_inside, other=0.0).to(tl.float32)
    strength = tl.load(beta + b * sbb + hv).to(tl.float32)
    if HAS_G:
        decay = tl.load(g + b * sgb + hv).to(tl.float32)
    tl.debug_barrier()  # without it ptxas waits for the query before it asks for the state
    qt, kt = qt.to(tl.float32), kt.to(tl.float32)
    if NORM:
        qt *= tl.rsqrt(tl.sum(qt * qt, 0) + 1e-6)
        kt *= tl.rsqrt(tl.sum(kt * kt, 0) + 1e-6)
    qt *= scale
    if GATES:
        strength = tl.sigmoid(strength)
    if HAS_G:
        if GATES:
            rate = tl.exp(tl.load(A_log + hv).to(tl.float32))
            decay = -rate * softplus(decay + tl.load(dt_bias + hv).to(tl.float32))
        alpha = tl.exp(decay)
        if not PREVIOUS:
            S *= alpha
    if ERASE:
        error -= tl.sum(kt[:, None] * S, 0)
    if HAS_G and PREVIOUS:
        S *= alpha
    S += kt[:, None] * (strength * error)[None, :]
    if whole:
        tl.store(at, S)
    else:
        tl.store(at, S, mask=k_inside[:, None] & v_inside[None, :])
    ot = tl.sum(qt[:, None] * S, 0)
    tl.store(o + row * V + cv, ot.to(o.dtype.element_ty), mask=v_inside)


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``; where the sum rounds, the quotient undoes it (Higham, Accuracy and Stability, 1.14.1)."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, y, tl.log(u) * (y / (u - 1.0)))


def conv_step(
    x_BD: Tensor, tail_BWD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, slots_B: Tensor | None
) -> Tensor:
    """:func:`.decode.conv_step` of arguments that it has looked at."""
    B, D = x_BD.shape
    W = weight_DW.shape[1]
    x_BD = _packed(x_BD)
    y = torch.empty(B, D, dtype=x_BD.dtype, device=x_BD.device)
    if B:
        with torch.cuda.device_of(x_BD):
            bias_dtype, slots_dtype = (None if t is None else t.dtype for t in (bias_D, slots_B))
            signature = ConvStep(
                x_BD.dtype, tail_BWD.dtype, weight_DW.dtype, bias_dtype, slots_dtype, D, W, silu,
                tail_BWD.data_ptr() % 16 == 0,
            )  # fmt: skip
            proof.require_kernels(x_BD.device, signature)
            proof.launch(
                conv_step_kernel, (triton.cdiv(D, CHANNELS), B),
                x_BD, tail_BWD, aligned(weight_DW), y if bias_D is None else aligned(bias_D),
                y if slots_B is None else slots_B.contiguous(), y, x_BD.stride(0),
                D=D, W=W, BD=CHANNELS,
                SILU=silu, HAS_BIAS=bias_D is not None, HAS_SLOTS=slots_B is not None, num_warps=1,
            )  # fmt: skip
    return y


def delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BH: Tensor | None,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    scale: float,
    rule: Rule,
    l2norm: bool,
    slots_B: Tensor | None,
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`.decode.delta_step` of arguments that it has looked at. With ``gates``, ``(A_log, dt_bias)`` ``[HV]``, g
    and beta are the projections that the gates are made of."""
    B, H, K = q_BHK.shape
    HV, V = v_BHV.shape[1:]
    q, k, v, beta = (_packed(x) for x in (q_BHK, k_BHK, v_BHV, beta_BH))
    g = beta if g_BH is None else _packed(g_BH)
    A_log, dt_bias = (beta, beta) if gates is None else (x.contiguous() for x in gates)
    BK, BV = triton.next_power_of_2(K), min(COLUMNS, triton.next_power_of_2(V))
    o = torch.empty(B, HV, V, dtype=v.dtype, device=v.device)
    if B:
        with torch.cuda.device_of(v):
            g_dtype, slots_dtype = (None if t is None else t.dtype for t in (g_BH, slots_B))
            A_dtype, bias_dtype = (None, None) if gates is None else (A_log.dtype, dt_bias.dtype)
            signature = DeltaStep(
                q.dtype, k.dtype, v.dtype, beta.dtype, g_dtype, A_dtype, bias_dtype, slots_dtype, H, HV, K, V, rule,
                l2norm, state_BHKV.data_ptr() % 16 == 0,
            )  # fmt: skip
            proof.require_kernels(v.device, signature)
            proof.launch(
                delta_step_kernel, (B * HV * triton.cdiv(V, BV),),
                q, k, v, g, beta, A_log, dt_bias, o if slots_B is None else slots_B.contiguous(), state_BHKV, o,
                float(scale),
                q.stride(0), k.stride(0), v.stride(0), g.stride(0), beta.stride(0),
                H=H, G=HV // H, K=K, V=V, BK=BK, BV=BV, ERASE=rule.erase, HAS_G=g_BH is not None,
                PREVIOUS=rule.error_decay == "previous", NORM=l2norm, GATES=gates is not None,
                HAS_SLOTS=slots_B is not None, num_warps=warps(BK, BV),
            )  # fmt: skip
    return o


def warps(BK: int, BV: int) -> int:
    return max(1, BK * BV // NUMBERS)


def _packed(x: Tensor) -> Tensor:
    """x with all but its first axis packed, at a multiple of 16 bytes; a row may be part of a longer one, as in a
    projection's output."""
    inner = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if size > 1 and stride != inner:
            return aligned(x)
        inner *= size
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def refuse(widths: dict[str, int], floats: dict[str, Tensor], in_place: dict[str, Tensor], way_out: str) -> None:
    """Say what has no kernel here, and the way out."""
    for name, width in widths.items():
        most = TAPS if name == "W" else WIDEST
        if not 1 <= width <= most:
            raise ValueError(f"{name}={width}: the decode kernels have {name} of 1 to {most}; {way_out}")
    for name, x in floats.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}: the decode kernels take bf16, fp16 and fp32; cast it, or {way_out}")
    for name, x in in_place.items():
        if name == "state" and x.dtype != torch.float32:
            raise TypeError(f"state is {x.dtype}: the decode kernels keep it in fp32; make it so, or {way_out}")
        if not x.is_contiguous():
            raise ValueError(
                f"{name} has strides {x.stride()}: the decode kernels update it in place and need it contiguous; "
                f"keep it so from where it is made, or {way_out}"
            )
        if not x.is_cuda and not isinstance(delta_step_kernel, InterpretedFunction):
            raise ValueError(
                f"{name} is on {x.device}: the decode kernels run on a GPU (or slowly anywhere, with "
                f"TRITON_INTERPRET=1 set before they are imported); move it there, or {way_out}"
            )
