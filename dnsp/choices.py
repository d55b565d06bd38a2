"""What may vary from machine to machine is chosen once: by rank 0, taken by all ranks, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dnsp.config import Config, ModelConfig
from dnsp.kernels import segments
from dnsp.kernels.backend import kernels_for_program
from dnsp.model.deltanet import head_dim
from dnsp.parallel.attention_backends import REPEATABLE, Heads, choose, unusable
from dnsp.parallel.errors import PlanError
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import filling_segment_tokens
from dnsp.parallel.probe import NO_GPU

MIB = 2**20
MULTIPROCESSORS = 132  # of an H100 or H200; where bits must not depend on the device


@dataclass(frozen=True)
class Choices:
    """``attention_backend``: of ``parallel/attention_backends.py``. ``multiprocessors``: that the delta rule's segments
    are to fill; 0 on a CPU, where one segment an interval is the fewest summaries. ``transport``: how states cross
    ranks; ``attention_transport``: how keys and values do."""

    attention_backend: str = "auto"
    multiprocessors: int = 0
    transport: str = "p2p"
    attention_transport: str = "ring"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def transports(self, config: Config, why_not_peer: str | None, shared: int) -> str:
        """In words, how ranks talk, and why by nothing faster; ``shared``: bytes of symmetric memory a rank."""
        words, attends = f"states cross ranks by {self.transport}", "attention" in config.model.layers
        if attends:
            words += f", keys and values by {self.attention_transport}"
        states_not = self.transport != "peer" and config.parallel.transport == "auto"
        keys_not = why_not_peer is not None and attends and config.parallel.attention_transport == "auto"
        if states_not or keys_not:
            words += f" (not by peer: {why_not_peer or unfit_for_peer(config.model) or 'the run began so'})"
        return words + (f"; {shared / MIB:.0f} MiB of symmetric memory a rank" if shared else "")

    def without_peer(self) -> Choices:
        """The same, with what every machine has in place of ``peer``."""
        states, keys = self.transport, self.attention_transport
        return replace(
            self,
            transport="p2p" if states == "peer" else states,
            attention_transport="ring" if keys == "peer" else keys,
        )

    def segment_tokens(self, config: Config, layout: Layout) -> int | None:
        """Tokens of the delta rule's segments; None: one segment an interval."""
        if config.parallel.segment_tokens is not None or not self.multiprocessors:
            return config.parallel.segment_tokens
        return filling_segment_tokens(layout, linear_heads(config), self.multiprocessors)


def linear_heads(config: Config) -> segments.Heads:
    """Of the model's gated delta rule. Segments follow from them as on a Hopper, whatever the GPU is: a run that moves
    keeps its bits, and ranks with other GPUs agree."""
    model = config.model
    return segments.Heads(
        config.train.micro_batch, model.linear_num_key_heads, model.linear_num_value_heads, model.linear_key_head_dim,
        model.linear_value_head_dim, torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32,
    )  # fmt: skip


def make_choices(
    config: Config,
    before: dict[str, Any] | None = None,
    why_not_peer: str | None = NO_GPU,
    several_hosts: bool = False,
    layout: Layout | None = None,
) -> tuple[Choices, str]:
    """What this machine is given, and in words how attention's backend came to be it.

    ``before``: the choices of the run that goes on; they are kept where they work here, too, and the configuration
    names no others. ``why_not_peer``: what keeps the group's ranks from each other's memory; None where nothing does.
    ``several_hosts``: the group spans them. ``layout``: of the run's sequences, for backends of attention are timed on
    an interval of it; None: of one process that holds all of a sequence.

    Raises: PlanError where the configuration asks for what cannot be used.
    """
    before = before or {}
    layout = layout or Layout("contiguous", 1, config.data.sequence_length)
    backend, why = _attention(config, before.get("attention_backend"), layout.interval_tokens)
    transports = choose_transports(config, before, why_not_peer, several_hosts)
    if not torch.cuda.is_available():
        return Choices(backend, 0, *transports), why
    count = MULTIPROCESSORS if config.engine.deterministic else torch.cuda.get_device_properties().multi_processor_count
    return Choices(backend, before.get("multiprocessors") or count, *transports), why


def choose_transports(
    config: Config, before: dict[str, Any], why_not_peer: str | None, several_hosts: bool = False
) -> tuple[str, str]:
    """How states cross ranks, and how keys and values do; as :func:`make_choices`."""
    why_not_keys = why_not_peer or ("the sequence group spans several hosts" if several_hosts else None)
    return (
        _transport(config, before.get("transport"), why_not_peer),
        _attention_transport(config, before.get("attention_transport"), why_not_keys),
    )


def _transport(config: Config, before: str | None, why_not_peer: str | None) -> str:
    """peer, p2p or gather: what was asked for, or before, or else the fastest that works."""
    asked, why_not = config.parallel.transport, why_not_peer or unfit_for_peer(config.model)
    if asked == "peer" and why_not:
        raise PlanError(f"parallel.transport=peer: {why_not}; use auto, p2p or gather")
    if asked != "auto":
        return asked
    if before and not (before == "peer" and why_not):
        return before
    return "p2p" if why_not else "peer"


def _attention_transport(config: Config, before: str | None, why_not_peer: str | None) -> str:
    asked = config.parallel.attention_transport
    if asked == "peer" and why_not_peer:
        raise PlanError(f"parallel.attention_transport=peer: {why_not_peer}; use auto, ring or gather")
    if asked != "auto":
        return asked
    if before and not (before == "peer" and why_not_peer):
        return before
    return "ring" if why_not_peer else "peer"


def delta_shapes(model: ModelConfig) -> set[tuple[int, int, int]]:
    """(value heads, key width, value width) of the states that the model's layers carry."""
    shapes, own = set(), model.deltanet
    if "gated_delta" in model.layers:
        shapes.add((model.linear_num_value_heads, model.linear_key_head_dim, model.linear_value_head_dim))
    if {"deltanet", "linear_attention"} & set(model.layers):
        width = head_dim(model)
        shapes.add((own.num_heads, width, own.value_head_dim or width))
    return shapes


def unfit_for_peer(model: ModelConfig) -> str | None:
    """Why the states of a model do not go by peer; None where they do."""
    for _, key, value in sorted(delta_shapes(model)):
        if key not in (16, 32, 64, 128) or value % 16:
            return f"states of {key} x {value} have no kernel that folds them (keys 16, 32, 64 or 128, values n x 16)"
    return "DNSP_DELTA_RULE=torch folds states without it" if kernels_for_program() == "torch" else None


def _attention(config: Config, before: str | None, tokens: int) -> tuple[str, str]:
    model, settings, repeat = config.model, config.parallel, config.engine.deterministic
    if "attention" not in model.layers:
        return settings.attention_backend, ""
    heads = _heads(config)
    keeps = before and settings.attention_backend == "auto" and not (repeat and before in REPEATABLE)
    if before and keeps and unusable(before, heads) is None:
        return before, ""
    # Where bits are to repeat, the same one is taken in every run, not the faster of two.
    backend, why = choose(heads, settings.attention_backend, repeat, 0 if repeat else tokens)
    return backend.name, why


def confirm(choices: Choices, config: Config) -> None:
    """Prove on this rank what rank 0 has chosen, before other ranks wait for it.

    Raises: PlanError where it cannot be used here.
    """
    if "attention" in config.model.layers:
        choose(_heads(config), choices.attention_backend, config.engine.deterministic)


def _heads(config: Config) -> Heads:
    model = config.model
    return Heads(
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.head_dim,
    )


def shared_sizes(
    config: Config, transport: str, attention_transport: str, ranks: int, batches: Sequence[tuple[int, int]]
) -> tuple[int | None, int | None]:
    """What crosses the ``ranks`` of a sequence group through symmetric memory, in ``batches`` of (rows, tokens a row):
    tiles of the largest state, and bytes of the largest message; None for what does not."""
    shapes, model = delta_shapes(config.model), config.model
    rows, tokens = max(rows for rows, _ in batches), max(rows * (length // ranks) for rows, length in batches)
    by_peer = transport == "peer" and bool(shapes), attention_transport == "peer" and "attention" in model.layers
    if ranks == 1 or not any(by_peer):
        return None, None
    from dnsp.parallel import symmetric

    tiles, message = None, 0
    if by_peer[0]:
        tiles = max(symmetric.tiles(rows, heads, width) for heads, _, width in shapes)
        channels = max(heads * (key + width) + heads * key for heads, key, width in shapes)
        taps = max(model.linear_conv_kernel_dim, model.deltanet.conv_size)
        message = 4 * rows * (taps - 1) * channels  # a halo
    if by_peer[1]:  # the gradients of all keys and values of a rank
        message = max(message, 4 * tokens * 2 * model.num_key_value_heads * model.head_dim)
    return tiles, message


def reserve(choices: Choices, config: Config, grid: Grid, batches: Sequence[tuple[int, int]]) -> int:
    """Symmetric memory for the largest messages of a run with ``batches`` of (rows, tokens a row); its bytes.

    Raises: CannotShare where the ranks of the sequence group cannot, or have no room for it.
    """
    ways = choices.transport, choices.attention_transport
    tiles, message = shared_sizes(config, *ways, grid.sequence_size, batches)
    if message is None:
        return 0
    from dnsp.parallel import post, symmetric

    comm, device = grid.transport(), torch.device("cuda", torch.cuda.current_device())
    used: list[symmetric.Region] = []
    if tiles is not None:
        states = symmetric.memory(comm, device)
        states.reserve(tiles)
        used.append(states)
    exchanges = symmetric.of_group(post.Post, comm, device)
    exchanges.reserve(message)
    return sum(region.bytes for region in [*used, exchanges])
