"""``dnsp tasks run`` and ``dnsp report``; what is slow to import is imported when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dnsp.errors import UsageError

tasks_app = typer.Typer(help="The experiments: recall, ablations, speed, language modelling.", no_args_is_help=True,
                        rich_markup_mode=None)  # fmt: skip


@tasks_app.command("run")
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="kv copy mqar recall32k ablations speed lm pitfalls all; "
                                        "several with commas.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                         help="Of every run's configuration, for example train.steps=100.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of runs and results; an unfinished queue goes on.")] = None,
    scale: Annotated[str, typer.Option(help="smoke (minutes on a CPU) or full (one GPU).")] = "smoke",
    device: Annotated[str | None, typer.Option(help="cpu, cuda (all GPUs) or cuda:N; a GPU where there is one.")] = None,
    models: Annotated[str | None, typer.Option(help="Some of attention,linear_attention,deltanet,gated_delta,hybrid.")] = None,
    text: Annotated[str | None, typer.Option(help="For lm: prefix of a .bin/.idx pair instead of python-stdlib.")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at once; left out, what the device and cores bear.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Save and stop before this time is over.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Local ranks that share each run's sequences.")] = 1,
    mps: Annotated[bool | None, typer.Option("--mps/--no-mps", help="NVIDIA's MPS for several runs on a GPU; left out, "
                                             "where it works.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete another queue's results in OUT.")] = False,
) -> None:  # fmt: skip
    """Train and measure; every model gets the same search. The same command goes on where it was stopped."""
    import torch

    from dnsp.tasks.queue import Request, devices_of
    from dnsp.tasks.queue import run as run_queue
    from dnsp.tasks.suite import MODELS, suite

    if scale not in ("smoke", "full"):
        raise UsageError(f"--scale {scale}: give smoke or full")
    if out is None:
        raise UsageError("--out is missing: name the folder for runs and results, as in --out results/recall")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices_of(device)
    chosen = MODELS if models is None else tuple(models.split(","))
    names = name.split(",")
    found = suite(names, scale, device != "cpu", chosen, text)  # type: ignore[arg-type]
    request = Request(names, scale, device, out, overrides or [], chosen, text, workers, minutes, ranks, overwrite, mps)  # type: ignore[arg-type]
    raise typer.Exit(run_queue(found, request))


@tasks_app.command("worker", hidden=True)
def worker() -> None:
    """What the queue starts."""
    from dnsp.tasks.worker import serve

    serve()


@tasks_app.command("prefill-rank", hidden=True)
def prefill_rank(folder: Path) -> None:
    """One rank of a prefill that speed measures."""
    from dnsp.tasks.speed import prefill_rank as run_rank

    run_rank(folder)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of dnsp tasks run --out.")],
) -> None:
    """Tables beside the document's figures in the terminal, report.md, CSV files and plots in the first DIR."""
    from dnsp.tasks.report import report as run_report

    raise typer.Exit(run_report(folders))
