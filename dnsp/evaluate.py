"""Held-out loss, whole and by position in the document; ``dnsp eval`` and ``dnsp generate`` on a finished run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dnsp import checkpoint, watchdog
from dnsp.begin import settle_transports
from dnsp.choices import Choices, confirm, make_choices
from dnsp.config import Config, override_tree, parse_config
from dnsp.data.batch import batch
from dnsp.data.mix import Mixture, open_data
from dnsp.data.tokenizer import Tokenizer, load_tokenizer
from dnsp.errors import RunError, UsageError
from dnsp.generate import generate_text
from dnsp.launch.environment import Environment
from dnsp.model.decoder import Decoder
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan
from dnsp.tasks.sources import is_task

FIRST_BUCKET = 64  # positions 0-63, then powers of two: 64-127, 128-255, ...


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Mixture, tokenizer: Tokenizer, config: Config, grid: Grid, length: int, choices: Choices
) -> dict[str, Any]:
    """Loss of the first ``eval.sequences`` held-out sequences of ``length`` tokens, at most one epoch of them; every
    rank calls it, all get it.

    model: a Decoder, or the engine around one (ZeRO 3 gathers weights in its forward). choices: those of the run.

    Returns ``loss`` (nats a predicted token), ``bits_per_byte`` (not where a source is a task), ``tokens`` (predicted)
    and ``by_position``: the loss by the position in the document, in buckets of powers of two (``"64-127"``): what a
    longer context is worth.
    """
    device = next(model.parameters()).device
    layout = Layout(config.parallel.layout, grid.sequence_size, length)
    intervals = layout.intervals(grid.sequence_rank)
    buckets = max(1, math.ceil(math.log2(length / FIRST_BUCKET)) + 1) if length > FIRST_BUCKET else 1
    sums = torch.zeros(2 * buckets + 1, dtype=torch.float64)  # loss and count by bucket, bytes
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.engine.dtype == "bf16")
    # beyond one epoch the same tokens would be counted again
    sequences = min(config.eval.sequences, max(1, sum(packer.tokens for packer in data.packers) // length))
    step, vocabulary = data.step(data.start, length, sequences), config.model.vocab_size
    for index in range(grid.data_rank, len(step.sequences), grid.data_size):
        part = batch(step, index, micro_batch=1, data_rank=0, data_size=1, intervals=intervals, vocab_size=vocabulary)
        plan = make_plan(
            part.doc_starts,
            layout,
            grid,
            choices.segment_tokens(config, layout),
            transport=choices.transport,
            attention_transport=choices.attention_transport,
            attention_backend=choices.attention_backend,
        ).to(device)
        with autocast:
            losses = model(part.tokens_BT.to(device), part.targets_BT.to(device), plan, by_token=True)
        losses = losses.double().cpu().flatten()
        predicted = part.targets_BT.flatten() != -100
        position = plan.position_BT.flatten().cpu()[predicted].double()
        bucket = (position / FIRST_BUCKET).clamp_min(0.5).log2().floor().long() + 1
        sums[:buckets] += torch.bincount(bucket, losses[predicted], minlength=buckets)
        sums[buckets:-1] += torch.bincount(bucket, minlength=buckets)
        sums[-1] += tokenizer.count_bytes(part.targets_BT.flatten()[predicted].numpy())
    sums = watchdog.total(sums.to(device), grid).cpu()
    watchdog.check_peers()  # of the last forward pass too
    nats, counts = sums[:buckets], sums[buckets:-1]
    # what a task asks stands for no text, though some of its ids may be those of bytes
    text = not any(is_task(source.path) for source in config.data.sources)
    return {
        "loss": float(nats.sum() / counts.sum()),
        **({"bits_per_byte": float(nats.sum() / math.log(2) / sums[-1])} if text else {}),
        "tokens": int(counts.sum()),
        "by_position": {_span(i): float(nats[i] / counts[i]) for i in range(buckets) if counts[i] > 0},
    }


def headline(figures: dict[str, Any]) -> str:
    """The one figure of an evaluation for people: bits per byte, or of what is no text the loss."""
    if "bits_per_byte" in figures:
        return f"bits per byte {figures['bits_per_byte']:.3f}"
    return f"loss {figures['loss']:.4f}"


def _span(bucket: int) -> str:
    low = 0 if bucket == 0 else FIRST_BUCKET << (bucket - 1)
    return f"{low}-{(FIRST_BUCKET << bucket) - 1}"


def table(figures: dict[str, Any]) -> Table:
    """Loss by position for people."""
    shown = Table("position in the document", "held-out loss", title=headline(figures))
    for span, loss in figures["by_position"].items():
        shown.add_row(span, f"{loss:.4f}")
    shown.add_row("all", f"{figures['loss']:.4f}")
    return shown


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> tuple[Decoder, Config, checkpoint.Checkpoint]:
    """The model of a run folder (its newest whole checkpoint) or of one checkpoint, and the run's configuration.

    Raises:
        UsageError: when there is no whole checkpoint, or an override is not valid.
    """
    found, words = checkpoint.find(run)
    for word in words:
        Console(stderr=True, soft_wrap=True).print(f"{word}; using {found.path.name}", markup=False)
    config = parse_config(override_tree(found.state["config"], overrides), str(found.path))
    model = Decoder(config.model, mlp_tile=config.engine.mlp_tile or None)
    checkpoint.load_weights(model, found.weights(), str(found.path))
    model.set_rope_theta(found.state["rope_theta"])
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), config, found


def evaluate_run(run: Path, overrides: Sequence[str], environment: Environment) -> dict[str, Any]:
    """``dnsp eval``: held-out figures of a trained model, on one process or on the ranks of a launcher."""
    watchdog.take_device(environment)
    watchdog.join(environment)
    with watchdog.agreed():
        model, config, found = load_run(run, overrides)
        data = open_data(config.data, vocab_size=config.model.vocab_size, split="heldout")
        chosen = any(override.startswith("data.sequence_length=") for override in overrides)
        # the length that the run was at, which its stages may have raised
        grid_length = config.data.sequence_length if chosen else found.state["sequence_length"]
        data.check_length(grid_length)
    grid = make_grid(config.parallel.sequence if environment.world_size > 1 else None, config.run.timeout)
    why_not_peer = watchdog.peer_refusal(grid)
    with watchdog.agreed():
        layout, before = Layout(config.parallel.layout, grid.sequence_size, grid_length), found.state.get("choices")
        first = environment.rank == 0
        made = make_choices(config, before, why_not_peer, bool(grid.near), layout) if first else None
    choices, _ = watchdog.from_first(made)
    with watchdog.agreed():
        confirm(choices, config)
    choices, _, unshared = settle_transports(choices, config, grid, [(1, grid_length)])
    if unshared and first:
        said = choices.transports(config, unshared, 0)
        Console(stderr=True, highlight=False, soft_wrap=True).print(said, markup=False)
    figures = evaluate(model, data, load_tokenizer(config.data.tokenizer), config, grid, grid_length, choices)
    watchdog.leave()
    if environment.rank == 0:
        what = f"{figures['tokens']:,} held-out tokens in sequences of {grid_length:,}"
        Console(highlight=False, soft_wrap=True).print(f"{found.path}, {what}")
        Console(highlight=False).print(table(figures))
    return {"checkpoint": str(found.path), "step": found.step, **figures}


def generate_from_run(run: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """``dnsp generate``: the prompt and what the recurrent decoder of a trained model adds to it."""
    model, config, _ = load_run(run)
    tokenizer = load_tokenizer(config.data.tokenizer)
    return prompt + "".join(generate_text(model, tokenizer, prompt, tokens, temperature=temperature, seed=seed))


def export_run(run: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """``dnsp export``: a Hugging Face folder of a trained model, which appears whole or not at all.

    Raises:
        UsageError: ``out`` is there already, or the model has layers that transformers does not have.
    """
    from dnsp.model.hf import export

    if out.exists():
        raise UsageError(f"{out} exists already; name a folder that does not, or remove it")
    model, config, found = load_run(run)
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        export(model.cpu(), load_tokenizer(config.data.tokenizer), part, found.state["sequence_length"], dtype)
        part.rename(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; make room there") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found.path
