"""What one layer remembers of the tokens before: filled by a prefill, updated in place by a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 8  # numbers of a mask's row, for attention kernels to read it


@dataclass
class LayerState:
    """The memory of one layer for B sequences; a layer uses the parts that it needs, the others stay None.

    Position counts the tokens of the current document so far: it is the next token's rotary position. The delta-rule
    state and the key sum are at least fp32. The cache of an attention layer holds the last ``length`` tokens of the
    sequence, those of earlier documents included: what a row may see are its last ``position`` slots.
    """

    position_B: Tensor
    S_BHKV: Tensor | None = None
    conv_tail_BWD: Tensor | None = None  # the convolution's last W-1 inputs
    key_sum_BHK: Tensor | None = None  # the denominator D
    keys_BGTK: Tensor | None = None
    values_BGTK: Tensor | None = None
    length: int = 0
    end_1: Tensor | None = None  # the length of a cache of fixed size, on its device

    def fix(self, capacity: int) -> None:
        """Gives an attention cache room for ``capacity`` tokens in all, once: from here on a step writes where ``end``
        says and sees all slots, those to come masked, so that one CUDA graph holds every step."""
        if self.keys_BGTK is not None and self.values_BGTK is not None:
            # rows of a mask that lie aligned are read where they are; others each layer's attention copies first
            room = (0, 0, 0, -(-capacity // ALIGNED) * ALIGNED - self.length)
            self.keys_BGTK = torch.nn.functional.pad(self.keys_BGTK[:, :, : self.length], room)
            self.values_BGTK = torch.nn.functional.pad(self.values_BGTK[:, :, : self.length], room)
            self.end_1 = torch.full((1,), self.length, device=self.keys_BGTK.device)

    def cache(self, keys_BGTK: Tensor, values_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values to the attention cache (of fixed size: those of one token, which :func:`advance`
        counts); returns all of them, ``[B, G, length, K]``, of fixed size with the room behind them."""
        assert self.keys_BGTK is not None and self.values_BGTK is not None
        if self.end_1 is not None:
            self.keys_BGTK.index_copy_(2, self.end_1, keys_BGTK)
            self.values_BGTK.index_copy_(2, self.end_1, values_BGTK)
            return self.keys_BGTK, self.values_BGTK
        end = self.length + keys_BGTK.shape[2]
        if end > self.keys_BGTK.shape[2]:  # doubling: a step stays O(1) but for the attention itself
            more = max(end, 2 * self.length) - self.keys_BGTK.shape[2]
            self.keys_BGTK = torch.nn.functional.pad(self.keys_BGTK, (0, 0, 0, more))
            self.values_BGTK = torch.nn.functional.pad(self.values_BGTK, (0, 0, 0, more))
        self.keys_BGTK[:, :, self.length : end] = keys_BGTK
        self.values_BGTK[:, :, self.length : end] = values_BGTK
        self.length = end
        return self.keys_BGTK[:, :, :end], self.values_BGTK[:, :, :end]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What attention adds to the next token's scores, ``[B, 1, 1, T]`` over the cache with this token in it: 0 for
        its own document, itself included, -inf for the rest."""
        assert self.keys_BGTK is not None
        newest = self.length if self.end_1 is None else self.end_1
        slots = self.length + 1 if self.end_1 is None else self.keys_BGTK.shape[2]
        slot_T, position_B1 = torch.arange(slots, device=self.position_B.device), self.position_B.unsqueeze(1)
        hidden_BT = (slot_T < newest - position_B1) | (slot_T > newest)
        mask_BT = torch.zeros(hidden_BT.shape, dtype=dtype, device=hidden_BT.device)
        return mask_BT.masked_fill_(hidden_BT, float("-inf"))[:, None, None]


def next_mask(states: Sequence[LayerState], dtype: torch.dtype) -> Tensor | None:
    """:meth:`LayerState.mask` of the attention layers, the same for all of them; None where there are none."""
    return next((state.mask(dtype) for state in states if state.keys_BGTK is not None), None)


def advance(states: Sequence[LayerState]) -> None:
    """Counts the token that every layer has taken: one launch on a GPU."""
    ends = [state.end_1 for state in states if state.end_1 is not None]
    torch._foreach_add_([state.position_B for state in states] + ends, 1)


def conv_tail(x_BTD: Tensor, position_BT: Tensor, width: int) -> Tensor:
    """The last ``width - 1`` convolution inputs, zero where they stand before the last token's document."""
    batch, tokens, _ = x_BTD.shape
    x_BTD = torch.nn.functional.pad(x_BTD, (0, 0, max(width - 1 - tokens, 0), 0))
    tail = x_BTD[:, x_BTD.shape[1] - (width - 1) :]
    back = torch.arange(width - 2, -1, -1, device=x_BTD.device)  # how far before the last token
    inside = back <= position_BT[:, -1:]
    return torch.where(inside.unsqueeze(-1), tail, 0)
