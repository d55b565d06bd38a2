"""What one layer remembers of the tokens before: filled by a prefill, updated in place by a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def cache(self, keys_BGTK: Tensor, values_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values to the attention cache; returns all of them, ``[B, G, length, K]``."""
        assert self.keys_BGTK is not None and self.values_BGTK is not None
        end = self.length + keys_BGTK.shape[2]
        if end > self.keys_BGTK.shape[2]:  # doubling: a step stays O(1) but for the attention itself
            more = max(end, 2 * self.length) - self.keys_BGTK.shape[2]
            self.keys_BGTK = torch.nn.functional.pad(self.keys_BGTK, (0, 0, 0, more))
            self.values_BGTK = torch.nn.functional.pad(self.values_BGTK, (0, 0, 0, more))
        self.keys_BGTK[:, :, self.length : end] = keys_BGTK
        self.values_BGTK[:, :, self.length : end] = values_BGTK
        self.length = end
        return self.keys_BGTK[:, :, :end], self.values_BGTK[:, :, :end]


def conv_tail(x_BTD: Tensor, position_BT: Tensor, width: int) -> Tensor:
    """The last ``width - 1`` convolution inputs, zero where they stand before the last token's document."""
    batch, tokens, _ = x_BTD.shape
    x_BTD = torch.nn.functional.pad(x_BTD, (0, 0, max(width - 1 - tokens, 0), 0))
    tail = x_BTD[:, x_BTD.shape[1] - (width - 1) :]
    back = torch.arange(width - 2, -1, -1, device=x_BTD.device)  # how far before the last token
    inside = back <= position_BT[:, -1:]
    return torch.where(inside.unsqueeze(-1), tail, 0)
