"""One token at a time: the recurrent form of the layer's three memories, each updated in place.

What a step costs does not grow with the tokens before it. No step is differentiable; the chunked forms are.
Rows are independent: a batch of sequences at different positions takes one call. With ``slots_B`` the memories are
tables of more rows than the batch: row b of the batch uses row ``slots_B[b]`` of them, and where that is negative the
row is idle: its output is zero and no memory changes (so that a CUDA graph of fixed size serves a changing batch).
Live slots differ from each other; their values are looked at on a CPU only, where that does not wait.

On a GPU Triton's kernels (:mod:`.triton_decode`) do the work, elsewhere torch operations; ``backend`` or the
environment's DNSP_DELTA_RULE, ``"torch"`` or ``"triton"``, say otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators, variants
from .backend import WAY_OUT, Backend, choose
from .checks import check_floating
from .conv import Activation, convolve, silu
from .norm import l2norm as normalise
from .reference import Rule


@torch.no_grad()
def conv_step(
    x_BD: Tensor,
    tail_BWD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: Activation = "silu",
    *,
    slots_B: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One token of :func:`~dnsp.kernels.conv.causal_conv1d`: returns ``y_BD``. In torch operations, with its bits.

    ``tail_BWD`` ``[B, W-1, D]`` holds the W-1 tokens before this one, zeros where a document begins; moves on in place.
    """
    _check_conv(x_BD, tail_BWD, weight_DW, bias_D, activation, slots_B)
    if choose(backend, x_BD) == "triton":
        from . import triton_decode

        floats = {"x": x_BD, "tail": tail_BWD, "weight": weight_DW}
        floats |= {} if bias_D is None else {"bias": bias_D}
        triton_decode.refuse({"W": weight_DW.shape[1]}, floats, {"tail": tail_BWD}, WAY_OUT)
        return operators.conv_step(x_BD, tail_BWD, weight_DW, bias_D, activation == "silu", slots_B)
    if slots_B is None:
        return _conv_step(x_BD, tail_BWD, weight_DW, bias_D, activation)
    y, live, rows = torch.zeros_like(x_BD), slots_B >= 0, slots_B[slots_B >= 0]
    tail = tail_BWD[rows]
    y[live] = _conv_step(x_BD[live], tail, weight_DW, bias_D, activation)
    tail_BWD[rows] = tail
    return y


def _conv_step(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    window = torch.cat([tail.to(x.dtype), x[:, None]], dim=1)
    tail.copy_(window[:, 1:])
    z = convolve(window.to(torch.promote_types(x.dtype, torch.float32)), weight, bias)[:, 0]
    return (silu(z) if activation == "silu" else z).to(x.dtype)


@torch.no_grad()
def delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BH: Tensor | None,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    l2norm: bool = False,
    slots_B: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One token of the delta rule (Yang et al., arXiv:2412.06464, equation 10): returns ``o_BHV`` in v's dtype.

    Args:
        q_BHK, k_BHK: ``[B, H, K]``. v_BHV: ``[B, HV, V]``, HV a multiple of H.
        g_BH: log decay, ``[B, HV]``, or None for none. beta_BH: write strength, ``[B, HV]``.
        state_BHKV: ``[B, HV, K, V]``, updated in place; its dtype (fp32, or in torch operations fp64) is the one
            computed in. With slots a table of any number of rows.
        scale: of the queries; None is ``K ** -0.5``.
        rule: erase or not, and which decay the error sees.
        l2norm: normalise q and k first.
        slots_B: ``[B]`` integers, the state's row of each row of the batch; None: the same.
        backend: see the module.

    Raises:
        ValueError, TypeError: shapes, dtypes, strides or devices that do not fit, or that have no kernel.
    """
    _check_delta(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV, slots_B)
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    if choose(backend, v_BHV) == "triton":
        from . import triton_decode

        floats = {"q": q_BHK, "k": k_BHK, "v": v_BHV, "beta": beta_BH} | ({} if g_BH is None else {"g": g_BH})
        widths = {"K": q_BHK.shape[-1], "V": v_BHV.shape[-1]}
        triton_decode.refuse(widths, floats, {"state": state_BHKV}, WAY_OUT)
        return operators.delta_step(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV, scale, rule, l2norm, slots_B)
    if slots_B is None:
        return _delta_step(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV, scale, rule, l2norm)
    o, live, rows = torch.zeros_like(v_BHV), slots_B >= 0, slots_B[slots_B >= 0]
    state = state_BHKV[rows]
    q, k, v, beta = (x[live] for x in (q_BHK, k_BHK, v_BHV, beta_BH))
    o[live] = _delta_step(q, k, v, None if g_BH is None else g_BH[live], beta, state, scale, rule, l2norm)
    state_BHKV[rows] = state
    return o


def _delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
    rule: Rule,
    l2norm: bool,
) -> Tensor:
    dtype, group = state.dtype, v.shape[1] // q.shape[1]
    out = v.dtype
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    if l2norm:
        q, k = normalise(q), normalise(k)
    q, k = (x.repeat_interleave(group, dim=1) for x in (q * scale, k))

    decay = None if g is None else g.to(dtype).exp()[..., None, None]
    if decay is not None and rule.error_decay == "current":
        state.mul_(decay)
    error = v - (k.unsqueeze(-1) * state).sum(-2) if rule.erase else v  # autocast leaves sums alone
    if decay is not None and rule.error_decay == "previous":
        state.mul_(decay)
    state += k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (q.unsqueeze(-1) * state).sum(-2).to(out)


@torch.no_grad()
def gated_delta_step(
    mixed_BD: Tensor,
    a_BH: Tensor,
    b_BH: Tensor,
    tail_BWD: Tensor,
    state_BHKV: Tensor,
    *,
    weight_DW: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    scale: float | None = None,
    slots_B: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One token of a gated delta layer between its projections and its output norm: returns ``o_BHV``.

        q, k, v = silu(conv(mixed))     g = -exp(A_log) softplus(a + dt_bias)     beta = sigmoid(b)

    and the delta rule on normalised q and k. Two kernels on a GPU: the convolution, and all the rest.

    Args:
        mixed_BD: queries, keys and values before the convolution, ``[B, 2 H K + HV V]`` in this order.
        a_BH, b_BH: what decay and write strength are made of, ``[B, HV]``.
        tail_BWD: the convolution's last inputs, ``[B, W-1, D]``; moves on in place.
        state_BHKV: ``[B, HV, K, V]``, updated in place.
        weight_DW: the filters ``[D, W]``. A_log_H, dt_bias_H: ``[HV]``.
        scale, slots_B, backend: as of :func:`delta_step`; slots are rows of the tail's table too.

    Raises:
        ValueError, TypeError: as :func:`conv_step` and :func:`delta_step`, before either memory is touched.
    """
    if state_BHKV.dim() != 4 or mixed_BD.dim() != 2:
        raise ValueError(
            f"mixed{list(mixed_BD.shape)}, state{list(state_BHKV.shape)}: expected mixed [B, D], state [B, HV, K, V]"
        )
    HV, K, V = state_BHKV.shape[1:]
    keys = (mixed_BD.shape[1] - HV * V) // 2
    if keys <= 0 or keys % K or 2 * keys + HV * V != mixed_BD.shape[1]:
        raise ValueError(
            f"mixed{list(mixed_BD.shape)} must be [B, 2 H K + HV V] for a state of HV, K, V = {[HV, K, V]} and a "
            f"number of key heads H; pass the projection of q, k and v in one"
        )
    for name, x in {"A_log": A_log_H, "dt_bias": dt_bias_H}.items():
        if x.shape != (HV,) or x.device != state_BHKV.device:
            raise ValueError(f"{name}{list(x.shape)} on {x.device}: must be [HV] = [{HV}] on {state_BHKV.device}")
    backend = choose(backend, mixed_BD)
    widths = (keys, keys, HV * V)

    def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split(widths, dim=-1)
        return q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (HV, V))

    check_floating({"A_log": A_log_H, "dt_bias": dt_bias_H}, {})
    _check_delta(*heads(mixed_BD), a_BH, b_BH, state_BHKV, slots_B, ("a", "b"))
    if backend == "torch":
        g, beta = variants.softplus_decay(a_BH, A_log_H, dt_bias_H), variants.learned_beta(b_BH)
        q, k, v = heads(conv_step(mixed_BD, tail_BWD, weight_DW, None, "silu", slots_B=slots_B, backend=backend))
        return delta_step(q, k, v, g, beta, state_BHKV, scale=scale, l2norm=True, slots_B=slots_B, backend=backend)
    from . import triton_decode

    _check_conv(mixed_BD, tail_BWD, weight_DW, None, "silu", slots_B)
    floats = {"mixed": mixed_BD, "tail": tail_BWD, "weight": weight_DW}
    floats |= {"a": a_BH, "b": b_BH, "A_log": A_log_H, "dt_bias": dt_bias_H}
    in_place = {"tail": tail_BWD, "state": state_BHKV}
    triton_decode.refuse({"W": weight_DW.shape[1], "K": K, "V": V}, floats, in_place, WAY_OUT)
    q, k, v = heads(operators.conv_step(mixed_BD, tail_BWD, weight_DW, None, True, slots_B))
    scale = K**-0.5 if scale is None else scale
    return operators.delta_step(
        q, k, v, a_BH, b_BH, state_BHKV, scale, variants.DELTA, True, slots_B, gates=(A_log_H, dt_bias_H)
    )


@torch.no_grad()
def normaliser_step(q_BHK: Tensor, k_BHK: Tensor, key_sum_BHK: Tensor) -> Tensor:
    """One token of the denominator, ``D_t = D_{t-1} + k_t``: adds k to ``key_sum_BHK`` in place, returns ``qD_BH``.

    Raises: ValueError, TypeError, where shapes, dtypes or devices do not fit.
    """
    check_floating({"q": q_BHK, "k": k_BHK, "key_sum": key_sum_BHK}, {})
    for name, x in {"k": k_BHK, "key_sum": key_sum_BHK}.items():
        if x.shape != q_BHK.shape:
            raise ValueError(f"{name}{list(x.shape)}: expected [B, H, K] = {list(q_BHK.shape)}, as q")
    _check_devices(q_BHK.device, {"k": k_BHK, "key_sum": key_sum_BHK})
    _check_own(key_sum_BHK, "key_sum")
    key_sum_BHK += k_BHK.to(key_sum_BHK.dtype)
    return (q_BHK.to(key_sum_BHK.dtype) * key_sum_BHK).sum(-1)


def _check_conv(
    x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape != (x.shape[1], weight.shape[1]) or not weight.shape[1]:
        raise ValueError(f"x{list(x.shape)} and weight{list(weight.shape)}: give x as [B, D], weight as [D, W]")
    check_floating({"x": x, "tail": tail, "weight": weight}, {"bias": bias})
    batch, channels = x.shape
    rows = tail.shape[0] if slots is not None and tail.dim() else batch
    wanted = (rows, weight.shape[1] - 1, channels)
    if tail.shape != wanted:
        raise ValueError(f"tail {list(tail.shape)} must hold the W-1 tokens before x, {list(wanted)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias{list(bias.shape)} must be [D] = [{channels}], or None")
    if activation not in ("silu", None):
        raise ValueError(f"activation {activation!r} is not known; give 'silu' or None")
    _check_devices(x.device, {"tail": tail, "weight": weight, "bias": bias, "slots": slots})
    _check_own(tail, "tail")
    _check_slots(slots, batch, rows)


def _check_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, slots: Tensor | None,
    gates: tuple[str, str] = ("g", "beta"),
) -> None:  # fmt: skip
    """``gates``: what g and beta are called."""
    check_floating({"q": q, "k": k, "v": v, gates[1]: beta}, {gates[0]: g})
    if q.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q{list(q.shape)}, v{list(v.shape)}: expected one token, q [B, H, K] and v [B, HV, V]")
    batch, heads, width = q.shape
    value_heads, value_width = v.shape[1:]
    if not heads or value_heads % heads:
        raise ValueError(f"{value_heads} value heads for {heads} key heads: make them a multiple of the key heads")
    if not width or not value_width:
        raise ValueError(f"K={width}, V={value_width}: heads are at least 1 wide; look at how q, k and v were split")
    rows = state.shape[0] if slots is not None and state.dim() else batch
    wanted = [rows, value_heads, width, value_width]
    if list(state.shape) != wanted:
        raise ValueError(f"state {list(state.shape)} must be [B, HV, K, V] = {wanted}")
    shapes = {"k": (k, [batch, heads, width]), "v": (v, [batch, value_heads, value_width])}
    of_heads = [batch, value_heads]
    for name, (x, shape) in {**shapes, gates[0]: (g, of_heads), gates[1]: (beta, of_heads)}.items():
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"{name}{list(x.shape)}: expected {shape}, from q{list(q.shape)} and v{list(v.shape)}")
    _check_devices(q.device, {"k": k, "v": v, gates[0]: g, gates[1]: beta, "state": state, "slots": slots})
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state is {state.dtype}: states are kept in fp32 (fp64 in torch operations); make it so")
    _check_own(state, "state")
    _check_slots(slots, batch, rows)


def _check_own(memory: Tensor, name: str) -> None:
    """That rows of a memory are no one else's: they are changed in place."""
    if any(stride == 0 and size > 1 for stride, size in zip(memory.stride(), memory.shape, strict=True)):
        raise ValueError(
            f"{name}{list(memory.shape)} has strides {list(memory.stride())}: its rows share memory, and it is updated "
            f"in place; make it with .clone(memory_format=torch.contiguous_format), and keep that"
        )


def _check_devices(device: torch.device, others: dict[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name} is on {x.device}, the token on {device}: move all to one device")


def _check_slots(slots: Tensor | None, batch: int, rows: int) -> None:
    if slots is None:
        return
    if slots.shape != (batch,) or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slots{list(slots.shape)} {slots.dtype}: expected [B] = [{batch}] int32 or int64, a row of the memories "
            f"for each row of the batch, negative where it is idle"
        )
    if slots.device.type == "cpu":  # values cost nothing to look at here
        live = [slot for slot in slots.tolist() if slot >= 0]
        if len(set(live)) != len(live) or max(live, default=0) >= max(rows, 1):
            raise ValueError(f"slots={slots.tolist()}: live ones must differ and be below {rows}, the memories' rows")
