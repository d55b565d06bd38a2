"""What ``dnsp bench decode`` measures: batches, the least bytes of a step, and random inputs.

    bytes of a delta step    8 B HV K V of fp32 states, B (2 H K + 2 HV V) numbers, B 2 HV fp32 gates
    bytes of a layer step    8 B HV K V of fp32 states, B D (2 W - 1) numbers for input and tail, D W filters, B HV V
                             numbers of output, B 2 HV of gates and 2 HV fp32 parameters, D = 2 H K + HV V

What a convolution hands to the delta rule does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.bench import common

KEYS = ("batch", "heads", "K", "V", "W", "dtype")
SHAPES = ("batch=1", "batch=4", "batch=16", "batch=64", "batch=256")
CPU_SHAPES = ("batch=2,heads=2/4,K=32,V=32",)


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    key_heads: int = 16
    value_heads: int = 32
    K: int = 128
    V: int = 128
    W: int = 4
    dtype: str = "bf16"

    def __str__(self) -> str:
        heads = f"{self.key_heads}/{self.value_heads} heads, K={self.K}, V={self.V}"
        return f"{self.batch} sequence{'s' * (self.batch > 1)}, {heads}, {self.dtype}"

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.K + self.value_heads * self.V

    @property
    def state_bytes(self) -> int:
        return 4 * self.batch * self.value_heads * self.K * self.V

    def bytes(self, what: str) -> int:
        """The least that a ``delta`` or ``layer`` step reads and writes."""
        size, B, HV = common.DTYPES[self.dtype].itemsize, self.batch, self.value_heads
        if what == "delta":
            numbers = 2 * self.key_heads * self.K + 2 * HV * self.V
            return 2 * self.state_bytes + B * (size * numbers + 4 * 2 * HV)
        of_sequences = B * (self.channels * (2 * self.W - 1) + HV * self.V + 2 * HV)
        return 2 * self.state_bytes + size * (of_sequences + self.channels * self.W) + 4 * 2 * HV


def parse_shape(text: str) -> Shape:
    """``batch=64,heads=16/32``; what is not named is as in :class:`Shape`.

    Raises: UsageError, for values that make no shape.
    """
    given = common.parse_settings(text, KEYS, "bench decode")
    numbers = [key for key in ("batch", "K", "V", "W") if key in given]
    values: dict[str, Any] = {key: common.whole_number(key, given[key]) for key in numbers}
    if "heads" in given:
        values["key_heads"], values["value_heads"] = common.parse_heads(given["heads"])
    if "dtype" in given:
        common.parse_dtype(given["dtype"])
        values["dtype"] = given["dtype"]
    return Shape(**values)


@dataclass
class Inputs:
    """One token; gates in fp32 for the delta step, as projections for the layer's."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    mixed: Tensor
    a: Tensor
    b: Tensor
    parameters: tuple[Tensor, Tensor, Tensor]  # filters, A_log, dt_bias

    def double(self) -> Inputs:
        weight, A_log, dt_bias = (x.double() for x in self.parameters)
        q, k, v, g, beta = (x.double() for x in (self.q, self.k, self.v, self.g, self.beta))
        mixed, a, b = (x.double() for x in (self.mixed, self.a, self.b))
        return Inputs(q, k, v, g, beta, mixed, a, b, (weight, A_log, dt_bias))


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    dtype, B, HV = common.DTYPES[shape.dtype], shape.batch, shape.value_heads

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    keys = B, shape.key_heads, shape.K
    g = F.logsigmoid(normal(B, HV, dtype=torch.float32)) / 16
    filters, gates = normal(shape.channels, shape.W) * 0.5, [normal(HV, dtype=torch.float32) for _ in range(2)]
    beta = normal(B, HV, dtype=torch.float32).sigmoid()
    return Inputs(normal(*keys), normal(*keys), normal(B, HV, shape.V), g, beta, normal(B, shape.channels),
                  normal(B, HV), normal(B, HV), (filters, gates[0], gates[1]))  # fmt: skip
