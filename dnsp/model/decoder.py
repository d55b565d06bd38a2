"""The hybrid decoder: embeddings, layers of any mix of kinds, a norm, the output projection.

Structure and parameter names are those of transformers' Qwen3.5 text model, so that checkpoints go both ways.
A rank holds some intervals of a sequence; which ones, and whose documents, only the plan knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnsp.config import ModelConfig
from dnsp.kernels import kept
from dnsp.loss import cross_entropy_sum, token_losses
from dnsp.model.attention import Attention
from dnsp.model.deltanet import DeltaNet
from dnsp.model.gated_delta import GatedDelta
from dnsp.model.linear_attention import LinearAttention
from dnsp.model.mlp import MLP, feed_forward_tiled
from dnsp.model.norm import RMSNorm
from dnsp.model.offload import Offload
from dnsp.model.rotary import Rotary, rotary_angles
from dnsp.model.state import LayerState, advance, next_mask
from dnsp.parallel.plan import Plan
from dnsp.products import product_dtype


class Mixer(Protocol):
    """What a layer kind offers: all tokens of a plan at once, or one token a row with a state.

    Angles and attention's mask are made once for all layers, and the decoder counts a step's token in their states.
    """

    def __call__(self, x_BTD: Tensor, plan: Plan, rotary: Rotary | None, state: LayerState | None = None) -> Tensor: ...

    def step(self, x_BD: Tensor, rotary: Rotary | None, mask: Tensor | None, state: LayerState) -> Tensor: ...

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState: ...

    def reset_parameters(self, std: float) -> None: ...


# kind: the name that its parameters have in a layer, and what makes them
MIXERS: dict[str, tuple[str, Any]] = {
    "gated_delta": ("linear_attn", GatedDelta),
    "attention": ("self_attn", Attention),
    "deltanet": ("deltanet", DeltaNet),
    "linear_attention": ("linear_attention", LinearAttention),
}


class DecoderLayer(nn.Module):
    """Pre-norm, mixer, residual; pre-norm, SwiGLU, residual.

    ``recompute``: keep x before each half and no more for the backward pass, and what passes through ``kept`` (onto
    ``tape``, where one is given).
    ``tile``: tokens that are in the SwiGLU at once where there are more of them.
    """

    def __init__(self, config: ModelConfig, kind: str, recompute: bool = False, tile: int | None = None) -> None:
        super().__init__()
        self.recompute, self.tile = recompute, tile
        self.mixer_name, mixer = MIXERS[kind]
        self.add_module(self.mixer_name, mixer(config))
        # a deltanet block chooses its norm and whether it feeds forward; the others are as Qwen3.5 has them
        own = config.deltanet if kind == "deltanet" else None
        layer_norm = own is not None and own.norm == "layer"
        self.feeds_forward = own is None or own.feed_forward
        self.input_layernorm = _block_norm(config, layer_norm)
        if self.feeds_forward:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
            self.post_attention_layernorm = _block_norm(config, layer_norm)

    @property
    def mixer(self) -> Mixer:
        return getattr(self, self.mixer_name)

    def reset_parameters(self, std: float) -> None:
        self.mixer.reset_parameters(std)
        self.input_layernorm.reset_parameters()
        if self.feeds_forward:
            self.mlp.reset_parameters(std)
            self.post_attention_layernorm.reset_parameters()

    def forward(
        self,
        x_BTD: Tensor,
        plan: Plan,
        rotary: Rotary | None,
        state: LayerState | None = None,
        tape: list[Any] | None = None,
    ) -> Tensor:
        if self.recompute and torch.is_grad_enabled() and state is None:
            return self._feed_forward(kept.checkpoint(self._mix, x_BTD, plan, rotary, tape=tape), recompute=True)
        x_BTD = self._mix(x_BTD, plan, rotary, state)
        if state is not None:
            state.position_B.copy_(plan.position_BT[:, -1] + 1)
        return self._feed_forward(x_BTD)

    def step(self, x_BD: Tensor, rotary: Rotary | None, mask: Tensor | None, state: LayerState) -> Tensor:
        x_BD = x_BD + self.mixer.step(self.input_layernorm(x_BD), rotary, mask, state)
        return self._feed_forward(x_BD)

    def _mix(self, x_BTD: Tensor, plan: Plan, rotary: Rotary | None, state: LayerState | None = None) -> Tensor:
        return x_BTD + self.mixer(self.input_layernorm(x_BTD), plan, rotary, state)

    def _feed_forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        if not self.feeds_forward:
            return x
        tokens = x.numel() // x.shape[-1]
        tile = min(self.tile or tokens, tokens)
        if recompute or tile < tokens:
            return feed_forward_tiled(x, self.post_attention_layernorm, self.mlp, tile)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """All but the output projection; a module of its own for the sake of checkpoints' names, ``model.*``."""

    def __init__(self, config: ModelConfig, recompute: bool, tile: int | None, made: Callable[[Any], Any]) -> None:
        super().__init__()
        self.embed_tokens = made(nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(made(DecoderLayer(config, kind, recompute, tile)) for kind in config.layers)
        self.norm = made(RMSNorm(config.hidden_size, config.rms_norm_eps))


class Decoder(nn.Module):
    """A language model over this rank's part of a sequence, and its recurrent form.

    ``forward(tokens_BT, targets_BT, plan)`` is what training calls; with ``autocast`` set it runs under torch.autocast
    of that dtype (set here, for DeepSpeed turns off one that is around its engine).

    ``activation_checkpointing`` recomputes every layer in the backward pass; scans, halos and attention are kept from
    the first pass (``dnsp.kernels.kept``). ``activation_offloading`` has what is kept wait in the host's memory.
    ``mlp_tile``: tokens that are in a feed-forward at once; None for all.
    ``hollow``: the model has no weights yet (they are on the meta device); :meth:`fill` makes them, part by part.
    """

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: bool = False,
        *,
        activation_offloading: bool = False,
        mlp_tile: int | None = None,
        hollow: bool = False,
    ) -> None:
        super().__init__()
        # what a part's constructor draws is drawn here too, so that fill finds the generator where it would be
        made = _emptied if hollow else _as_it_is
        self.config = config
        self.activation_checkpointing, self.activation_offloading = activation_checkpointing, activation_offloading
        self.autocast: torch.dtype | None = None
        self.rope_theta = config.rope_theta
        self.hollow = hollow
        self.model = Trunk(config, activation_checkpointing, mlp_tile, made)
        self.lm_head = made(nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self._tie()
        if not hollow:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew, from torch's generator; the same seed gives every rank the same ones."""
        for _, _, draw in self._parts():
            draw()

    def fill(self) -> Iterator[tuple[str, nn.Module]]:
        """Makes a hollow model's weights on the CPU, those of a model that was never hollow to the last bit.

        Yields ``(prefix of its parameters' names, module)`` for each part, drawn; a caller that gives up most of a part
        before it asks for the next one never holds the whole model.
        """
        for prefix, part, draw in self._parts():
            part.to_empty(device="cpu")
            self._tie()
            draw()
            yield prefix, part
        self.hollow = False

    def _parts(self) -> Iterator[tuple[str, nn.Module, Callable[[], object]]]:
        """Modules that together have every parameter once, in the order that they are drawn in, and what draws them."""
        std = self.config.initializer_range
        embedding, norm, head = self.model.embed_tokens, self.model.norm, self.lm_head
        yield "model.embed_tokens.", embedding, lambda: nn.init.normal_(embedding.weight, std=std)
        for i, layer in enumerate(self._layers()):
            yield f"model.layers.{i}.", layer, partial(layer.reset_parameters, std)
        yield "model.norm.", norm, norm.reset_parameters
        if not self.config.tie_word_embeddings:
            yield "lm_head.", head, lambda: nn.init.normal_(head.weight, std=std)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_rope_theta(self, theta: float) -> None:
        """The base of the rotary frequencies, which longer contexts raise; no parameter depends on it."""
        self.rope_theta = theta

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        plan: Plan,
        by_token: bool = False,
        asked_N: Tensor | None = None,
    ) -> Tensor:
        """The loss in fp32, summed over local targets that are not -100; the caller divides by all of the step's.

        ``by_token``: each target's own instead, ``[B, T]``. ``asked_N``: where few tokens have a target, the indices of
        these, of B times T (:attr:`dnsp.data.batch.Batch.asked_N`).
        """
        with nullcontext() if self.autocast is None else torch.autocast(tokens_BT.device.type, self.autocast):
            if by_token:
                return token_losses(self.hidden(tokens_BT, plan), self.lm_head.weight, targets_BT)
            hidden = self.hidden(tokens_BT, plan)
            return cross_entropy_sum(hidden, self.lm_head.weight, targets_BT, asked_N=asked_N)

    def hidden(self, tokens_BT: Tensor, plan: Plan, states: list[LayerState] | None = None) -> Tensor:
        """What the output projection reads, ``[B, T, D]``. Fresh ``states`` are filled with what each layer keeps."""
        x = self._embedded(tokens_BT)
        rotary = self._rotary(plan.position_BT, x.dtype)
        offload = Offload() if self.activation_offloading and torch.is_grad_enabled() and x.is_cuda else None
        for i, layer in enumerate(self._layers()):
            if offload is None or i + 1 == len(self.config.layers):  # the last layer's are wanted back at once
                x = layer(x, plan.at_layer(i), rotary, None if states is None else states[i])
                continue
            with offload.saving():
                x = layer(x, plan.at_layer(i), rotary, tape=offload.tape())
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., V]``, at least fp32; for few tokens, training never holds them."""
        logits = F.linear(hidden, self.lm_head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def init_states(self, batch: int, device: torch.device | str | None = None) -> list[LayerState]:
        """One empty state a layer, for ``batch`` sequences."""
        weight = self.lm_head.weight
        device = weight.device if device is None else torch.device(device)
        return [layer.mixer.init_state(batch, device, weight.dtype) for layer in self._layers()]

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, plan: Plan) -> tuple[Tensor, list[LayerState]]:
        """The chunked pass over whole sequences: hidden ``[B, T, D]``, and the states from which :meth:`step` goes on.

        Rows may hold several documents; the states are those of each row's last one.

        Raises:
            ValueError: the plan holds a part of the sequence: an attention cache is not spread over ranks.
        """
        if plan.local_tokens != plan.tokens:
            raise ValueError(
                f"prefill was given {plan.local_tokens} of {plan.tokens} tokens, and a decoder's states need them all "
                "on one rank; use a plan of one process (local_plan)"
            )
        states = self.init_states(len(tokens_BT), tokens_BT.device)
        return self.hidden(tokens_BT, plan, states), states

    @torch.no_grad()
    def step(self, tokens_B: Tensor, states: list[LayerState]) -> Tensor:
        """Logits ``[B, V]`` after one more token a row; the states are updated in place."""
        x = self._embedded(tokens_B)
        rotary, mask = self._rotary(states[0].position_B, x.dtype), next_mask(states, x.dtype)
        for layer, state in zip(self._layers(), states, strict=True):
            x = layer.step(x, rotary, mask, state)
        advance(states)
        return self.logits(self.model.norm(x))

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups for the optimizer: matrices decay; norms, biases, ``A_log``, ``dt_bias`` and ``beta`` do not.

        The latter are what has one axis. Embeddings decay: tied, they are the output projection too.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        axes = [len(getattr(p, "ds_shape", p.shape)) for p in trained]  # of the whole, where ZeRO 3 keeps a shard
        return [
            {"params": [p for p, n in zip(trained, axes, strict=True) if n > 1], "weight_decay": weight_decay},
            {"params": [p for p, n in zip(trained, axes, strict=True) if n <= 1], "weight_decay": 0.0},
        ]

    def _layers(self) -> list[DecoderLayer]:
        return list(self.model.layers)  # type: ignore[arg-type]

    def _embedded(self, tokens: Tensor) -> Tensor:
        """The residual stream's first values; under autocast the stream is in its dtype, from the first layer on."""
        x = self.model.embed_tokens(tokens)
        return x.to(product_dtype(x))

    def _rotary(self, position: Tensor, dtype: torch.dtype) -> Rotary | None:
        """Angles for all attention layers at once."""
        if "attention" not in self.config.layers:
            return None
        return rotary_angles(position, self.rope_theta, self.config.rotary_dim, dtype)


def _as_it_is(part: Any) -> Any:
    return part


def _emptied(part: Any) -> Any:
    return part.to("meta")


def _block_norm(config: ModelConfig, layer_norm: bool) -> nn.LayerNorm | RMSNorm:
    if layer_norm:
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)
