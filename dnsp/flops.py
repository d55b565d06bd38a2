"""The floating point operations that a model asks of a training step, whatever computes it.

A multiplication and an addition are two operations. Forward, for a row of T tokens in documents of L_1, L_2, ... tokens
(their sum is T):

    matrix products    2 N T                                N: all parameters but an embedding that is looked up
    attention          2 H D sum_i L_i^2     a layer        q k^T and p v, each 2 D a pair of tokens, half the pairs
    delta rule         (6 + 1) K V T         a value head   a token reads the state with k, adds to it and reads it
                                                            with q: 2 K V each; K V for the decay where there is one
    linear attention   4 K V T               a head         nothing is read with k

and twice that backward. This is the work of the recurrence: what a chunked algorithm does beyond it to have matrix
products, what recomputation does again and what runs over masked pairs is not the model's and does not count. Norms,
gates, activations, softmax and the convolution's sums over a document's start are left out; they are below 1 %. The
output projection counts for every token, also where few have a target and the others get no logits.

MFU is these operations a second over what the devices' bf16 matrix products reach.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dnsp.config import ModelConfig

CEILING_WIDTH = 8192  # of the square matrices whose product is the ceiling
BACKWARD = 2  # times the forward pass


def forward_flops(config: ModelConfig, parameters: int, documents: Iterable[int]) -> float:
    """Of one forward pass over documents of so many tokens each. ``parameters``: all of the model's, tied ones once."""
    lengths = list(documents)
    tokens = sum(lengths)
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size  # rows of the embedding are looked up
    pairs = sum(length**2 for length in lengths)
    total = 2 * parameters * tokens
    for kind in config.layers:
        if kind == "attention":
            total += 2 * config.num_attention_heads * config.head_dim * pairs
        else:
            total += state_flops(config, kind) * tokens
    return float(total)


def state_flops(config: ModelConfig, kind: str) -> int:
    """Of one token in a layer of a kind that keeps a state, all its heads."""
    if kind == "gated_delta":
        heads, size = config.linear_num_value_heads, config.linear_key_head_dim * config.linear_value_head_dim
        return heads * 7 * size
    options = config.deltanet
    width = options.head_dim or config.hidden_size // options.num_heads
    size = width * (options.value_head_dim or width)
    if kind == "linear_attention":
        return options.num_heads * 4 * size
    return options.num_heads * (7 if options.forget_gate or options.decay_every else 6) * size


def step_flops(config: ModelConfig, parameters: int, documents: Iterable[int]) -> float:
    """Of a training step over these documents, forward and backward, on all devices together."""
    return (1 + BACKWARD) * forward_flops(config, parameters, documents)


def document_lengths(starts: Iterable[int], length: int) -> list[int]:
    """Tokens of each document of a row of ``length`` tokens, from the index of each one's first token."""
    edges = [*starts, length]
    return [stop - start for start, stop in zip(edges, edges[1:], strict=False)]


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of square bf16 matrix products on a GPU: the best of 25."""
    shape, draw = (CEILING_WIDTH, CEILING_WIDTH), torch.Generator(device)  # the run's own generator is left alone
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16, generator=draw) for _ in range(2))
    best = float("inf")
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * CEILING_WIDTH**3 / best
