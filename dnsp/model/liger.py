"""Kernels of liger-kernel (arXiv:2410.10989), taken for what lies on a GPU. The only file that imports it.

Their arithmetic, read from version 0.8.5: RMSNorm in its ``gemma`` mode has everything in fp32 and rounds once, after
the weight, which is Qwen3.5's; its weight's gradient is summed in fp32. SwiGLU takes silu in fp32 and rounds it to the
operands' dtype before the product. Rotary positions rotate in the dtype of the angles, fp32, and round once. Cross
entropy has its sums in fp32 and leaves the gradient in the logits' dtype.

``DNSP_LIGER=0`` in the environment takes torch's operations instead.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_BLOCK = 32768  # words of a row that the cross entropy's program holds at once


@functools.cache
def missing() -> str | None:
    """Why liger's kernels are not there, in words; None where they are."""
    try:
        importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error}); pip install 'liger-kernel>=0.8.5,<0.9'"
    return None


def wanted() -> bool:
    """Whether the environment leaves them on."""
    return os.environ.get("DNSP_LIGER", "1") != "0"


def takes(x: Tensor) -> bool:
    """Whether an operation on x is liger's."""
    return x.is_cuda and x.dtype in DTYPES and wanted() and missing() is None


def described() -> str:
    """Which operations a GPU takes, for the run's first lines."""
    if not wanted():
        return "torch's operations (DNSP_LIGER=0)"
    return missing() or f"liger-kernel {importlib.metadata.version('liger-kernel')}"


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """``dnsp.kernels.norm.rms_norm``, differentiable."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # not in place: the incoming gradient may be someone else's too
    return LigerRMSNormFunction.apply(x, weight, eps, 1.0 if zero_centred else 0.0, "gemma", False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, differentiable once: the backward overwrites gate and up."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, which take their places. All ``[tokens, width]``, contiguous."""
    from liger_kernel.ops.swiglu import swiglu_backward as backward

    return backward(gate, up, dact)


def rotate(q_BTHK: Tensor, k_BTGK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with the first 2R channels of every head rotated, channel i with i + R; differentiable.

    They are rotated where they lie, and so are the incoming gradients: none may be needed afterwards.
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    heads_first = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2)
    q, k = LigerRopeFunction.apply(*heads_first, cos_BTR, sin_BTR, None, 1, 2 * cos_BTR.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, ignore: int, with_grad: bool) -> Tensor:
    """Each token's loss ``[N]``, fp32, 0 where its target is ``ignore``; the logits are overwritten.

    ``with_grad``: by the gradient of the losses' sum. The host looks at no value, which liger's own functions do.
    """
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    tokens, words = logits_NV.shape
    losses = torch.zeros(tokens, dtype=torch.float32, device=logits_NV.device)
    kernel: Any = liger_cross_entropy_kernel
    with torch.cuda.device_of(logits_NV):
        kernel[(tokens,)](
            X_ptr=logits_NV,
            X_stride=logits_NV.stride(0),
            Y_ptr=targets_N,
            Y_stride=targets_N.stride(0),
            weight_ptr=None,
            loss_ptr=losses,
            z_loss_ptr=None,
            loss_stride=1,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=words,
            n_non_ignore=1,  # of means alone; of sums it is not read
            sum_non_ignore_weight=1,
            weight_sum=0.0,
            ignore_index=ignore,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="sum",
            softcap=None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(MAX_BLOCK, 1 << (words - 1).bit_length()),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=with_grad,
            num_warps=32,
        )
    return losses
