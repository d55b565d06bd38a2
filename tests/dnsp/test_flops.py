"""The written formulas against torch's own counter of matrix products, and against a count of the recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dnsp.config import ModelConfig
from dnsp.flops import document_lengths, forward_flops, state_flops, step_flops
from dnsp.kernels import decode, variants
from dnsp.kernels.reference import Rule
from dnsp.model.decoder import Decoder
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan

LEFT_OUT = 0.01  # vectors, gates and the convolution, counted as products of the parameters or not at all

WIDE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
}


def model_of(**settings: Any) -> tuple[ModelConfig, Decoder, int]:
    torch.manual_seed(0)
    config = ModelConfig(**{**WIDE, **settings})
    model = Decoder(config)
    return config, model, sum(p.numel() for p in model.parameters())


def products(model: Decoder, tokens: int, backward: bool) -> int:
    """FLOPs of matrix products, as torch counts them, of one row of one document."""
    plan = make_plan([[0]], Layout("contiguous", 1, tokens), Grid(1, 0, 1), 64, attention_backend="plain")
    row = torch.randint(model.config.vocab_size, (1, tokens))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model(row, row, plan)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backward", [False, True])
def test_products_and_attention(tied: bool, backward: bool) -> None:
    """c(T) = a T + b T^2: a is the products', b the attention's, twice, for the plain backend has the masked half."""
    config, model, parameters = model_of(pattern=["attention"], tie_word_embeddings=tied)
    formula = step_flops if backward else forward_flops
    T = 256
    counted, ours = ([f(n) for n in (T, 2 * T)] for f in (
        lambda n: products(model, n, backward), lambda n: formula(config, parameters, [n])))  # fmt: skip
    square = [(c[1] - 2 * c[0]) / (2 * T**2) for c in (counted, ours)]
    line = [c[0] / T - b * T for c, b in zip((counted, ours), square, strict=True)]
    assert line[1] == pytest.approx(line[0], rel=LEFT_OUT)
    # backward, plain attention makes the scores a second time: 5 products of the square for 2
    assert square[0] / square[1] == pytest.approx(2 * (7 / 6 if backward else 1), rel=1e-6)


@pytest.mark.parametrize("pattern", ["gated_delta", "deltanet", "linear_attention"])
def test_products_of_layers_with_a_state(pattern: str) -> None:
    """The decoder's step makes its state elementwise, so that what torch counts is the products alone."""
    config, model, parameters = model_of(pattern=[pattern])
    states = model.init_states(1)
    with FlopCounterMode(display=False) as counter:
        model.step(torch.tensor([3]), states)
    ours = forward_flops(config, parameters, [1]) - 2 * state_flops(config, pattern)
    assert ours == pytest.approx(counter.get_total_flops(), rel=LEFT_OUT)


class Elementwise(TorchDispatchMode):
    """Counts what each elementwise operation and sum does to the elements."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mul", "add", "sub"):
            self.operations += result.numel()
        elif name == "sum":
            self.operations += args[0].numel()
        return result


@pytest.mark.parametrize(
    ("settings", "rule", "decays"),
    [
        ({"pattern": ["gated_delta"]}, Rule(), True),
        ({"pattern": ["deltanet"]}, Rule(), False),
        ({"pattern": ["deltanet"], "deltanet": {"forget_gate": True}}, Rule(error_decay="previous"), True),
        ({"pattern": ["linear_attention"]}, variants.LINEAR_ATTENTION, False),
    ],
    ids=["gated_delta", "deltanet", "forget gate", "linear_attention"],
)
def test_the_recurrence(settings: dict[str, Any], rule: Rule, decays: bool) -> None:
    """One token through the recurrence, operation by operation; what the formula leaves out is V, Q and K wide."""
    config = ModelConfig(**{**WIDE, **settings})
    kind = config.layers[0]
    if kind == "gated_delta":
        H, K, V = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    else:
        H = config.deltanet.num_heads
        K = V = config.hidden_size // H
    q, k, v, beta = torch.randn(1, H, K), torch.randn(1, H, K), torch.randn(1, H, V), torch.rand(1, H)
    g = -torch.rand(1, H) if decays else None
    with Elementwise() as counter:
        decode.delta_step(q, k, v, g, beta, torch.zeros(1, H, K, V), rule=rule, backend="torch")
    left_out = H * (K + (2 if rule.erase else 1) * V)  # the scale, the error and its strength
    assert counter.operations == state_flops(config, kind) + left_out


def test_documents() -> None:
    """Attention is quadratic in each document, all else in the row."""
    config, _, parameters = model_of(pattern=["attention", "gated_delta"])
    lengths = document_lengths([0, 100, 612], 1024)
    assert lengths == [100, 512, 412]
    whole, parts = (forward_flops(config, parameters, documents) for documents in ([1024], lengths))
    pairs = 1024**2 - sum(length**2 for length in lengths)
    assert whole - parts == 2 * 4 * 64 * pairs
