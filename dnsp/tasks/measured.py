"""What a report says of speed, chunk lengths and pitfalls, as tables."""

from __future__ import annotations

from typing import Any

from dnsp.tasks import document
from dnsp.tasks.suite import MODELS
from dnsp.tasks.summary import Result
from dnsp.tasks.tables import Table

KEPT = {(512, 131072): 0.98}  # of a delta-rule model's speed from one context to another: what was to be reached
SETTLING = {  # what not every result has: earlier ones have none of it, and only a GPU's driver knows of clocks
    "tokens/s right behind the prefill": "first_tokens_per_s", "SM clock then, MHz": "first_sm_clock_mhz",
    "held down then by": "first_throttle", "SM clock, MHz": "sm_clock_mhz", "held down by": "throttle",
}  # fmt: skip


def chunk_tables(figures: list[Result]) -> list[Table]:
    rows = [[f["chunk"], f["tokens"], f["ms"], f["output_error"], f["gradient_error"]]
            for f in sorted(figures, key=lambda f: f["chunk"])]  # fmt: skip
    columns = ["chunk", "tokens", "ms, forward and backward", "error of outputs", "error of gradients"]
    return [Table("chunks", "Chunk length, torch path", columns, rows)]


def speed_tables(figures: list[Result]) -> list[Table]:
    alone = [f for f in figures if "ranks" not in f]
    spread_out = [f for f in figures if "ranks" in f]
    tables = []
    if alone:
        contexts = sorted({f["context"] for f in alone})
        models = [model for model in MODELS if any(f["name"] == model for f in alone)]
        at = {(f["name"], f["context"]): f for f in alone}

        def speed(model: str, context: int) -> float | None:
            return at[model, context]["tokens_per_s"] if (model, context) in at else None

        rows: list[list[Any]] = []
        for model in models:
            first, last = speed(model, contexts[0]), speed(model, contexts[-1])
            kept = last / first if first and last else None
            rows.append([model, *(speed(model, c) for c in contexts), kept])
        for model, stated in document.SPEED.items():
            if any(context in stated for context in contexts):
                rows.append([f"document: {model}", *(stated.get(c) for c in contexts), None])
        named = [f"{c:,}" for c in contexts]
        tables.append(Table("speed", "Tokens a second behind a context, batch 1", ["model", *named,
                            f"{named[-1]} over {named[0]}"], rows, speed_verdict(at, contexts)))  # fmt: skip
        read = {
            "model": "name", "context": "context", "layers": "layers", "width": "width", "parameters": "parameters",
            "weight bytes": "parameter_bytes", "state bytes": "state_bytes", "KV-cache bytes": "cache_bytes",
            "prefill tokens/s": "prefill_tokens_per_s",
        }  # fmt: skip
        read |= {column: name for column, name in SETTLING.items() if any(name in f for f in alone)}
        ordered = sorted(alone, key=lambda f: (models.index(f["name"]), f["context"]))
        rows = [[*map(f.get, read.values()), bandwidth_share(f)] for f in ordered]
        tables.append(Table("speed-bytes", "What a step reads", [*read, "share of copy bandwidth"], rows))
    if spread_out:
        over_ranks = {
            "model": "name", "context": "context", "ranks": "ranks", "of them on a GPU": "sharing",
            "prefill tokens/s": "prefill_tokens_per_s", "tokens/s after": "tokens_per_s",
            "error of the last hidden state": "error", "share of equal tokens": "same_tokens",
            "state bytes": "state_bytes", "KV-cache bytes": "cache_bytes",
        }  # fmt: skip
        rows = [list(map(f.get, over_ranks.values())) for f in spread_out]
        tables.append(Table("speed-ranks", "Prefill over ranks, then one device", list(over_ranks), rows))
    return tables


def bandwidth_share(figures: Result) -> float | None:
    """Bytes that a step has to read, over what the device copies in that time; near 1 is memory-bound."""
    if "copy_bytes_per_s" not in figures:
        return None
    read = figures["parameter_bytes"] + 2 * figures["state_bytes"] + figures["cache_bytes"]
    return read / figures["step_s"] / figures["copy_bytes_per_s"]


def speed_verdict(at: dict[tuple[str, int], Result], contexts: list[int]) -> str:
    said = []
    aim = KEPT.get((contexts[0], contexts[-1]))
    for model in ("deltanet", "gated_delta"):
        if (model, contexts[0]) in at and (model, contexts[-1]) in at:
            kept = at[model, contexts[-1]]["tokens_per_s"] / at[model, contexts[0]]["tokens_per_s"]
            reached = "" if aim is None else f", {'at least' if kept >= aim else 'below'} the {aim} to reach"
            span = f"from {contexts[0]:,} to {contexts[-1]:,} tokens"
            said.append(f"{model} keeps {kept:.3f} of its speed {span}{reached}")
    for model, stated in document.SPEED.items():
        if (model, 512) in at and (model, 8192) in at:
            kept = at[model, 8192]["tokens_per_s"] / at[model, 512]["tokens_per_s"]
            said.append(f"{model} keeps {kept:.3f} from 512 to 8,192, the document's {stated[8192] / stated[512]:.3f}")
    stated_ratio = document.SPEED["deltanet"][8192] / document.SPEED["attention"][8192]
    if ("deltanet", 8192) in at and ("attention", 8192) in at:
        delta, attention = at["deltanet", 8192], at["attention", 8192]
        ours = delta["tokens_per_s"] / attention["tokens_per_s"]
        reached = "at least" if ours >= stated_ratio else "below"
        weights, cache, state = attention["parameter_bytes"], attention["cache_bytes"], delta["state_bytes"]
        bound = (weights + cache) / (delta["parameter_bytes"] + 2 * state)
        share = bandwidth_share(attention)
        reads = "" if share is None else f", at {share:.2f} of the copy bandwidth"
        said.append(
            f"DeltaNet over attention at 8,192: {ours:.2f}, {reached} the document's {stated_ratio:.1f}; were both "
            f"bound by memory alone it would be {bound:.2f}, for a step of attention reads {weights / 2**30:.2f} GiB "
            f"of weights beside {cache / 2**30:.2f} GiB of cache at batch 1{reads}"
        )
    return "; ".join(said)


def pitfall_tables(figures: list[Result]) -> list[Table]:
    tables = []
    for found in sorted(figures, key=lambda f: f["number"]):
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row))
        rows = [[row.get(column) for column in columns] for row in found["rows"]]
        title = f"Pitfall {found['number']}: {found['pitfall']}"
        tables.append(Table(f"pitfall-{found['number']}", title, columns, rows, found["says"]))
    return tables
