"""The short causal convolution, with SiLU, before queries, keys and values: what binds a token to those before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnsp.kernels.decode import conv_step
from dnsp.model.state import LayerState, conv_tail
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.plan import Plan


class ShortConvolution(nn.Module):
    """One filter of ``taps`` tokens a channel, over parts of ``widths`` side by side: one halo, not three.

    As in DeltaNet's layer (Yang et al., arXiv:2406.06484).
    """

    def __init__(self, widths: tuple[int, ...], taps: int) -> None:
        super().__init__()
        self.widths, self.taps = widths, taps
        self.weight = nn.Parameter(torch.empty(sum(widths), taps))

    def reset_parameters(self) -> None:
        bound = self.taps**-0.5  # by the fan-in, as nn.Conv1d's own
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, parts: tuple[Tensor, ...], plan: Plan, state: LayerState | None) -> tuple[Tensor, ...]:
        """Parts ``[B, T, width]``; the last inputs go to the state."""
        mixed = torch.cat(parts, dim=-1)
        if state is not None:
            state.conv_tail_BWD = conv_tail(mixed, plan.position_BT, self.taps)
        return causal_conv1d(mixed, self.weight, plan=plan).split(self.widths, dim=-1)

    def step(self, parts: tuple[Tensor, ...], state: LayerState) -> tuple[Tensor, ...]:
        """Parts ``[B, width]`` of one token; the state is updated in place."""
        assert state.conv_tail_BWD is not None
        return conv_step(torch.cat(parts, dim=-1), state.conv_tail_BWD, self.weight).split(self.widths, dim=-1)

    def empty_tail(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Of a state before its first token."""
        return torch.zeros(batch, self.taps - 1, sum(self.widths), dtype=dtype, device=device)
