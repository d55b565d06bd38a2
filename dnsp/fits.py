"""``dnsp doctor CONFIG``: whether a configuration can run on this machine, or on the hosts of a hostfile."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dnsp import checkpoint
from dnsp.begin import check_kernels
from dnsp.choices import MIB, choose_transports, shared_sizes
from dnsp.config import Config
from dnsp.data.mix import open_data
from dnsp.data.tokenizer import load_tokenizer
from dnsp.errors import RunError, UsageError
from dnsp.flops import step_flops
from dnsp.folder import check_new, check_origin, check_start, checkpoints
from dnsp.launch.local import cores
from dnsp.memory import GIB, Held, model_bytes
from dnsp.model.decoder import Decoder
from dnsp.parallel.errors import LayoutError, PlanError
from dnsp.parallel.probe import refusal_here
from dnsp.schedule import check_ranks, spans
from dnsp.watchdog import sharing

if TYPE_CHECKING:
    from dnsp.doctor import Row

ROOM = 0.9  # of the memory that is there may be planned with


def ranks_of(config: Config, asked: int | None, slots: int | None) -> int:
    """The ranks that a run would have: those asked for, else every slot, else every GPU, at least a sequence group."""
    here = slots or (torch.cuda.device_count() if torch.cuda.is_available() else 1)
    return asked or max(here, config.parallel.sequence or 1)


def examine(config: Config, ranks: int, here: bool) -> Iterator[Row]:
    """Rows on ranks, data, tokenizer, model, memory and run folder; ``here``: the ranks would be on this machine."""
    yield _tried("ranks", lambda: _ranks(config, ranks, here))
    if here:
        yield from _shared_gpus(ranks)
    yield _tried("settings", lambda: _settings(config))
    yield _tried("tokenizer", lambda: (load_tokenizer(config.data.tokenizer), config.data.tokenizer)[1])
    yield _tried("data", lambda: _data(config))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(config.model).parameters())
    longest = max(spans(config), key=lambda span: span.sequence_length)
    length = longest.sequence_length
    flops = step_flops(config.model, parameters, [length] * longest.global_batch)
    yield "model", "ok", f"{parameters:,} parameters, {flops / 1e12:,.3g} TFLOP a step of {length:,} tokens a row", ""
    yield from _memory(config, parameters, ranks, here)
    yield from _symmetric_memory(config, ranks, here)
    yield _tried("run folder", lambda: _folder(config))
    yield _disk(config, parameters)


def _tried(name: str, ask: Callable[[], str]) -> Row:
    try:
        return name, "ok", ask(), ""
    except (UsageError, RunError, LayoutError, PlanError) as error:
        found, cure = _split(str(error))
        return name, "missing", found, cure


def _split(message: str) -> tuple[str, str]:
    """A refusal into what is wrong and the way out."""
    for mark in ("; ", ": "):
        found, there, cure = message.rpartition(mark)
        if there:
            return found, cure
    return message, "change one of the values named"


def _ranks(config: Config, ranks: int, here: bool) -> str:
    check_ranks(config, ranks)
    sequence = config.parallel.sequence or ranks
    crowded = f", on {cores()} cores" if here and ranks > cores() else ""
    return f"{ranks // sequence} x {sequence} (data x sequence){crowded}"


def _shared_gpus(ranks: int) -> Iterator[Row]:
    """Where there are more ranks than GPUs: they run, and what that means."""
    if (many := sharing(ranks)) == 1:
        return
    gpus = torch.cuda.device_count()
    found = f"{many} ranks share a GPU ({ranks} on {gpus}): gloo in place of NCCL, and 1/{many} of its memory for each"
    cure = (
        "none needed to try things; for speed as many ranks as GPUs (parallel.sequence, --ranks), or more hosts "
        "(--hostfile). Ranks take turns on a GPU but under NVIDIA's MPS: nvidia-cuda-mps-control -d"
    )
    yield "shared GPUs", "warn", found, cure


def _settings(config: Config) -> str:
    check_kernels(config.model)
    check_origin(config)
    for where in (config.resume, config.init_from):
        if where not in ("none", "auto", None) and not where.startswith("hf:"):
            checkpoint.find(where)
    return "agree"


def _data(config: Config) -> str:
    for split in ("train", "heldout"):
        data = open_data(config.data, vocab_size=config.model.vocab_size, split=split)
        for span in spans(config):
            data.check_length(span.sequence_length)
    return f"{len(config.data.sources)} source{'s' if len(config.data.sources) > 1 else ''}"


def activation_bytes(config: Config, ranks: int) -> float:
    """The least that a rank keeps of a micro-batch's tokens for the backward: the residual stream, twice a layer."""
    group = config.parallel.sequence or ranks
    tokens = max(span.sequence_length * span.micro_batch for span in spans(config)) / group
    size = 2 if config.engine.dtype == "bf16" else 4
    return tokens * config.model.hidden_size * size * 2 * config.model.num_hidden_layers


def _needs(config: Config, parameters: int, ranks: int, **other: Any) -> Held:
    """In all, with ``other`` settings of the engine."""
    engine = config.engine.model_copy(update=other)
    held = [*model_bytes(parameters, engine, ranks).values()]
    kept = activation_bytes(config, ranks)
    held.append(Held(0, kept) if engine.activation_offloading else Held(kept))
    return Held(sum(one.device for one in held), sum(one.host for one in held))


def _memory(config: Config, parameters: int, ranks: int, here: bool) -> Iterator[Row]:
    needs = _needs(config, parameters, ranks)
    parts = model_bytes(parameters, config.engine, ranks)
    said = ", ".join(f"{name} {(one.device + one.host) / GIB:,.2f}" for name, one in parts.items())
    kept = f"what waits for the backward at least {activation_bytes(config, ranks) / GIB:,.2f}"
    found = f"about {(needs.device + needs.host) / GIB:,.2f} GiB a rank ({said}, {kept})"
    if not here:
        yield "memory", "info", found, ""
        return
    free = psutil.virtual_memory().available / ranks
    if not torch.cuda.is_available():
        fits = needs.device + needs.host < ROOM * free
        cure = "" if fits else _way(config, parameters, ranks, lambda held: held.device + held.host < ROOM * free)
        found += f", {free / GIB:,.1f} GiB of the memory that is free"
        yield "memory", "ok" if fits else "missing", found, cure
        return
    many = sharing(ranks)
    room = torch.cuda.get_device_properties(0).total_memory / many

    def suits(held: Held) -> bool:
        return held.device < ROOM * room and held.host < ROOM * free

    cure = "" if suits(needs) else _way(config, parameters, ranks, suits)
    found += f": {needs.device / GIB:,.2f} on the GPU, which has {room / GIB:,.1f}" + " for each" * (many > 1)
    if needs.host:
        found += f"; {needs.host / GIB:,.2f} on the host, where {free / GIB:,.1f} are free for it"
    yield "memory", "missing" if cure else "ok", found, cure


def _symmetric_memory(config: Config, ranks: int, here: bool) -> Iterator[Row]:
    """What a run reserves for states, halos, keys and values (:func:`dnsp.choices.reserve`)."""
    group = config.parallel.sequence or ranks
    try:
        ways = choose_transports(config, {}, refusal_here(ranks, group) if here else None)
    except PlanError as error:
        yield "symmetric memory", "missing", *_split(str(error))
        return
    tiles, message = shared_sizes(config, *ways, group, [span.shape for span in spans(config)])
    if message is None:
        return
    from dnsp.parallel import post, symmetric

    own = 0 if tiles is None else symmetric.bytes_of(tiles)
    need = own + post.bytes_of(group, message)
    found = f"{need / MIB:,.0f} MiB a rank, {own / MIB:,.0f} of them for states"
    if not here:
        yield "symmetric memory", "info", f"{found}, where ranks reach each other's", ""
        return
    free = torch.cuda.mem_get_info()[0] // sharing(ranks)
    found += f"; {free / MIB:,.0f} are free for it"
    if need < free:
        yield "symmetric memory", "ok", found, ""
    elif "peer" in (config.parallel.transport, config.parallel.attention_transport):
        cure = "parallel.transport=p2p parallel.attention_transport=ring, or more ranks"
        yield "symmetric memory", "missing", found, cure
    else:
        yield "symmetric memory", "warn", found, "none needed: the run takes p2p and ring; for peer more ranks"


def _way(config: Config, parameters: int, ranks: int, suits: Callable[[Held], bool]) -> str:
    """The first settings that would do, those that cost least first."""
    ways: list[dict[str, Any]] = [{"zero_stage": stage} for stage in (1, 2, 3)] if ranks > 1 else []
    if torch.cuda.is_available():
        ways += [{"zero_stage": max(stage, config.engine.zero_stage), "offload_optimizer": True} for stage in (1, 2, 3)]
        ways.append({"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True})
    for way in ways:
        if way["zero_stage"] >= config.engine.zero_stage and suits(_needs(config, parameters, ranks, **way)):
            changed = [(key, value) for key, value in way.items() if value != getattr(config.engine, key)]
            return " ".join(f"engine.{key}={str(value).lower()}" for key, value in changed) + " would fit"
    more = "a GPU for each rank" if sharing(ranks) > 1 else "more ranks (with engine.zero_stage=3 each keeps less)"
    return f"take {more}, or a smaller model"


def _folder(config: Config) -> str:
    if config.run.dir is None:
        return "a new one under runs/"
    check_start(config)
    check_new(config)
    folder = Path(config.run.dir)
    saved = checkpoints(folder)
    return f"{folder}: goes on from {saved[-1].name}" if saved else f"{folder}: begins"


def _disk(config: Config, parameters: int) -> Row:
    there = Path(config.run.dir or "runs").absolute()
    while not there.exists():
        there = there.parent
    free, one = shutil.disk_usage(there).free, 12 * parameters  # fp32, and two moments
    needed = (config.checkpoint.keep + 1) * one
    found = f"{config.checkpoint.keep + 1} checkpoints of {one / GIB:,.2f} GiB, {free / GIB:,.1f} GiB free at {there}"
    if needed < free:
        return "disk", "ok", found, ""
    return "disk", "missing", found, "make room, lower checkpoint.keep, or choose another run.dir"
