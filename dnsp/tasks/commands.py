"""``dnsp tasks``; what is slow to import is imported when it is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dnsp.errors import UsageError

tasks_app = typer.Typer(help="The experiments: recall, ablations, speed, language modelling.", no_args_is_help=True,
                        rich_markup_mode=None)  # fmt: skip


NAMES_HELP = "kv copy mqar recall32k ablations speed lm pitfalls all; several with commas."
Name = Annotated[str, typer.Argument(metavar="NAME", help=NAMES_HELP)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of every run's configuration.")]
Out = Annotated[Path | None, typer.Option(help="The folder of runs and results; an unfinished queue goes on.")]
ScaleOption = Annotated[str, typer.Option(help="smoke (minutes on a CPU) or full (one GPU).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda (all GPUs) or cuda:N; a GPU where there is one.")]
Models = Annotated[str | None, typer.Option(help="attention,linear_attention,deltanet,gated_delta,hybrid or some.")]
Text = Annotated[str | None, typer.Option(help="For lm: prefix of a .bin/.idx pair, in place of python-stdlib-long.")]
Workers = Annotated[int | None, typer.Option(help="Runs at once; left out, what the device and the cores bear.")]
Minutes = Annotated[float | None, typer.Option(help="Save and stop before this time is over.")]
Ranks = Annotated[int, typer.Option(min=1, help="Local ranks that share each run's sequences.")]
MpsOption = Annotated[
    bool | None,
    typer.Option("--mps/--no-mps", help="NVIDIA's MPS for runs that share a GPU; left out, where it works."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete another queue's results in OUT.")]


@tasks_app.command("run")
def run(
    name: Name,
    overrides: Overrides = None,
    out: Out = None,
    scale: ScaleOption = "smoke",
    device: Device = None,
    models: Models = None,
    text: Text = None,
    workers: Workers = None,
    minutes: Minutes = None,
    ranks: Ranks = 1,
    mps: MpsOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Train and measure; every model gets the same search. The same command goes on where it was stopped."""
    import torch

    from dnsp.tasks.pool import devices_of
    from dnsp.tasks.pool import run as run_queue
    from dnsp.tasks.queue import Request
    from dnsp.tasks.suite import MODELS, Scale, suite

    if scale not in ("smoke", "full"):
        raise UsageError(f"--scale {scale}: give smoke or full")
    if out is None:
        raise UsageError("--out is missing: name the folder for runs and results, as in --out results/recall")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices_of(device)
    chosen = MODELS if models is None else tuple(models.split(","))
    names = name.split(",")
    if text is not None and not {"lm", "all"} & set(names):
        raise UsageError(f"--text {text} is what lm trains on, and {name} has no lm; leave it out")
    size: Scale = "full" if scale == "full" else "smoke"
    found = suite(names, size, device != "cpu", chosen, text)
    request = Request(names, size, device, out, overrides or [], chosen, text, workers, minutes, ranks, overwrite, mps)
    raise typer.Exit(run_queue(found, request))


@tasks_app.command("worker", hidden=True)
def worker() -> None:
    """What the queue starts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer

    from dnsp.tasks.worker import serve

    serve(answers)


@tasks_app.command("prefill-rank", hidden=True)
def prefill_rank(folder: Path) -> None:
    """One rank of a prefill that speed measures."""
    from dnsp.tasks.speed import prefill_rank as run_rank

    run_rank(folder)
